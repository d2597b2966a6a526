"""`halfbyte bench report`: tables and a plot of collected results."""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.cli.bench import BENCHMARKS
from halfbyte.cli.bench_options import file_to_write

HELP = BENCHMARKS["report"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl", help="results, the oldest first")
    parser.add_argument("--all", action="store_true", help="every run; otherwise the last one of each device, layer, format and routing")
    parser.add_argument("--plot", type=file_to_write, metavar="FILE.png", help="plot the share of the floor over tokens")


def run(args: argparse.Namespace) -> int:
    """Print the tables in Markdown.

    Raises:
        InputError: a file is not there or holds something else.
        UnsupportedError: matplotlib is not installed.
    """
    from halfbyte.bench.records import latest, read, render, tables
    from halfbyte.errors import InputError

    groups = tables(record for file in args.files for record in read(file))
    if not groups:
        raise InputError("no results", where=", ".join(map(str, args.files)))
    if not args.all:
        groups = latest(groups)
    print(render(groups))
    if args.plot:
        from halfbyte.bench.plot import plot_fractions

        plot_fractions(groups, args.plot)
    return 0
