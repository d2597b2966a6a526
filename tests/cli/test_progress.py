"""The one progress bar: what it shows, and when it shows nothing."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr
from functools import partial

import pytest
import tqdm

from halfbyte.cli.progress import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def every_step_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tqdm, "tqdm", partial(tqdm.tqdm, mininterval=0, miniters=1))


def last_bar(terminal: Terminal) -> str:
    return terminal.getvalue().split("\r")[-1]


def test_counts_up_to_a_total_that_is_known(every_step_shows: None) -> None:
    with redirect_stderr(Terminal()) as terminal, Bar("evaluating", 4) as bar:
        bar.update(1)
        bar.update(2)
        assert "evaluating:  75%" in last_bar(terminal) and "3/4" in last_bar(terminal)
    assert last_bar(terminal) == ""  # wiped out


def test_reaches_what_the_work_tells(every_step_shows: None) -> None:
    with redirect_stderr(Terminal()) as terminal, Bar("quantize", unit="B") as bar:
        for done in (1000, 3000):
            bar.reach(done, 4000)
        assert "quantize:  75%" in last_bar(terminal) and "3.00k/4.00k" in last_bar(terminal)


def test_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("evaluating", 4) as bar:
        bar.update(1)
        bar.reach(4, 4)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_says_once_that_tqdm_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with Bar("evaluating", 4) as bar:
        bar.update(1)
        bar.reach(4, 4)
    assert capsys.readouterr().err == "halfbyte: no progress bar, tqdm is not installed\n"
