"""The one progress bar: what it shows, and when it shows nothing."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

from halfbyte.cli import progress
from halfbyte.cli.progress import Bar
from halfbyte.cli.terminal import load_model


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def every_step_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "tqdm", partial(tqdm, mininterval=0, miniters=1))


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


def test_a_line_every_ten_seconds_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 5.0, 11.0, 11.0, 15.0, 21.5, 21.5])  # what the bar asks for: at its start, at each step, and after a line
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with Bar("evaluating", 4000, unit="tokens") as bar:
        bar.update(1000)
        bar.update(1000)
        bar.reach(3000, 4000)
        bar.reach(4000, 4000)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "evaluating: 50% of 4,000 tokens\nevaluating: 100% of 4,000 tokens\n")


def test_loading_a_model_shows_its_tensors(every_step_shows: None) -> None:
    with redirect_stderr(Terminal()) as terminal:
        load_model("demo", torch.device("cpu"))
    shown = terminal.getvalue()
    assert "loading demo:   1%" in shown and "loading demo: 100%" in shown and "Loading weights" not in shown
    with redirect_stderr(Terminal()) as terminal:
        load_model("demo", torch.device("cpu"), shown=False)
    assert not terminal.getvalue()
