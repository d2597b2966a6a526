"""Every environment variable halfbyte reads, declared once. None of them changes numerics."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import InputError


@dataclass(frozen=True)
class Variable:
    name: str
    meaning: str

    def get(self) -> str | None:
        return os.environ.get(self.name) or None


CACHE_DIR = Variable(
    "HALFBYTE_CACHE_DIR", "directory for prepared weights and tuning tables (default: $XDG_CACHE_HOME/halfbyte or ~/.cache/halfbyte)"
)
VARIABLES = (CACHE_DIR,)


def cache_dir() -> Path:
    """Return the cache directory; it is not created here."""
    explicit = CACHE_DIR.get()
    if explicit:
        return expanded(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else _home() / ".cache") / "halfbyte"


def expanded(path: str | os.PathLike[str]) -> Path:
    """`path` with its ~ or ~NAME as the home of a user: shells leave it as it is within quotes and in --option=~/file.

    Raises:
        InputError: there is no such user.

    >>> from halfbyte.env import expanded
    >>> expanded("~/models") == Path.home() / "models"
    True
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError("no home is known for this user", where=str(path), needed="a path; ./~NAME for a file of that name") from error


def _home() -> Path:
    """Of this user; / where the system knows none, as containers set it."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/")
