"""Command lines that end in options of an engine: `halfbyte serve MODEL [options] -- ENGINE OPTIONS`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

_SEPARATOR = "--"


def add_engine_options(parser: argparse.ArgumentParser, usage: str) -> None:
    """Let `parser` take what follows `--` as `engine_options`, a tuple of strings."""
    parser.usage = f"{usage} [{_SEPARATOR} ENGINE OPTIONS]"
    parser.set_defaults(engine_options=())


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """`parser.parse_args`, which would mix what follows `--` with the positional arguments before it.

    >>> parser = argparse.ArgumentParser()
    >>> add_engine_options(parser, "serve")
    >>> parse(parser, ["--", "--port", "1"]).engine_options
    ('--port', '1')
    """
    if _SEPARATOR not in arguments or parser.get_default("engine_options") is None:
        return parser.parse_args(arguments)
    place = list(arguments).index(_SEPARATOR)
    args = parser.parse_args(arguments[:place])
    args.engine_options = tuple(arguments[place + 1 :])
    return args
