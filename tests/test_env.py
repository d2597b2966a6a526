"""Where files go that the user names by ~, or does not name."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.cli.main import main
from halfbyte.env import cache_dir, expanded
from halfbyte.errors import InputError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HALFBYTE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_the_first_place_that_is_named_holds_the_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_dir() == home / ".cache" / "halfbyte"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/halfbyte")
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", "~/mine")
    assert cache_dir() == home / "mine"


def test_a_user_without_home_has_a_cache_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call on a GPU looks for tables there."""

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    assert cache_dir() == Path("/.cache/halfbyte")


def test_nobody_has_no_home() -> None:
    with pytest.raises(InputError, match="~no-such-user/x: no home is known for this user"):
        expanded("~no-such-user/x")


@pytest.mark.parametrize("arguments", [["quantize", "demo", "~/to/out"], ["prepare", "demo", "--layers", "0", "--cache-dir=~/to"]])
def test_commands_write_to_the_home_that_is_meant(home: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    (home / "here").mkdir()
    monkeypatch.chdir(home / "here")
    assert main(arguments) == 0
    assert not list((home / "here").iterdir()) and len(list((home / "to").iterdir())) == 1


@pytest.mark.parametrize("arguments", [["inspect", "~no-such-user/m"], ["quantize", "demo", "~no-such-user/m"]])
def test_commands_know_no_home_of_nobody(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code in (1, 2) and "~no-such-user/m: no home is known for this user" in capsys.readouterr().err
