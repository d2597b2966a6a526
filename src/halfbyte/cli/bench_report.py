"""`halfbyte bench report`: tables and a plot of collected results."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from halfbyte.bench.records import ROW_MODULES, Record, latest, read, render, tables
from halfbyte.cli.bench_options import picture_to_write
from halfbyte.cli.documents import print_document
from halfbyte.cli.parser import path
from halfbyte.errors import InputError

EXAMPLE = "halfbyte bench report results.jsonl --plot results.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=path, metavar="FILE.jsonl", help="results of any benchmarks, the oldest first")
    parser.add_argument("--all", action="store_true", help="every run; otherwise the last one of each benchmark, device and subject")
    parser.add_argument("--only", metavar="TEXT", help="only tables whose heading has this text: 'NVFP4, bf16'")
    parser.add_argument(
        "--plot", type=picture_to_write, metavar="FILE.png", help="plot the MoE layer's share of the floor over tokens, at most six tables"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Print the tables in Markdown, one benchmark after another.

    Raises:
        InputError: a file is not there or holds something else; there is nothing to print, or to plot.
        UnsupportedError: matplotlib is not installed.
    """
    groups = tables(record for file in args.files for record in read(file) if (args.only or "") in record.row.subject)
    if not groups:
        about = f" about {args.only!r}" if args.only else ""
        raise InputError(f"no results{about}", where=", ".join(map(str, args.files)))
    if not args.all:
        groups = latest(groups)
    if args.plot:
        from halfbyte.bench.plot import plot_fractions

        plot_fractions(groups, args.plot)
    groups.sort(key=lambda group: list(ROW_MODULES).index(group[0].benchmark))
    if args.json:
        print_document({"tables": [_document(group) for group in groups]})
    else:
        print(_render(groups))
    return 0


def _render(groups: list[list[Record]]) -> str:
    parts = []
    for benchmark in dict.fromkeys(group[0].benchmark for group in groups):
        parts += [f"## halfbyte bench {benchmark}", render(group for group in groups if group[0].benchmark == benchmark)]
    return "\n\n".join(parts)


def _document(group: list[Record]) -> dict[str, Any]:
    about = {name: getattr(group[0], name) for name in ("benchmark", "environment", "ceilings")}
    return {"subject": group[0].row.subject, **about, "rows": [asdict(record)["row"] for record in group]}
