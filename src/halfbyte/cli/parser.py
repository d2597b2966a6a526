"""`Parser`: the argument parser of every command, with an example and the defaults in its help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from halfbyte.env import expanded
from halfbyte.errors import InputError


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Says the default of an option where it has one that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, (), []) or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose help ends with an example: one command line, or several lines."""

    def __init__(self, *, example: str, **options: Any):
        lines = "\n".join(f"  {line}" for line in example.splitlines())
        super().__init__(epilog=f"example:\n{lines}", formatter_class=_Formatter, **options)


def path(text: str) -> Path:
    """An argparse type: a path, ~ expanded."""
    try:
        return expanded(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
