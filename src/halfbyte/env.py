"""Every environment variable halfbyte reads, declared once. None of them changes numerics."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


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
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "halfbyte"
