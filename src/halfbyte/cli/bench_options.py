"""What the benchmarks' command lines share: types of arguments, the options of every benchmark, and what becomes of the rows."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from halfbyte.bench.records import Record, Row, append, environment, render, tables
from halfbyte.bench.shapes import NAMED_SHAPES, MoEShape
from halfbyte.cli.documents import print_document
from halfbyte.cli.parser import path
from halfbyte.cli.terminal import comma_list, count, one_of, usable_device
from halfbyte.errors import InputError
from halfbyte.formats import FORMATS

named_shape = one_of("shape", NAMED_SHAPES, ", or give --shape")
block_format = one_of("format", FORMATS)
block_formats = comma_list(block_format)


def shape_of(text: str, needed: str, *rest: int) -> MoEShape:
    """For argparse types: the layer of the sizes in `text`, then `rest`: hidden, intermediate, experts, top k.

    >>> shape_of("64,32,4", "three integers", 1).num_experts
    4
    """
    try:
        hidden, intermediate, num_experts, top_k = *map(int, text.split(",")), *rest
        return MoEShape(text, hidden, intermediate, num_experts, top_k)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not {needed}") from error


def file_to_write(text: str) -> Path:
    """An argparse type: a file that can be written, there or not, as far as can be told before."""
    file = path(text)
    try:
        folder = file.absolute().parent
        if not folder.is_dir():
            raise argparse.ArgumentTypeError(f"no directory for {file}")
        if file.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is a directory, not a file to write")
        if not os.access(file if file.exists() else folder, os.W_OK):
            raise argparse.ArgumentTypeError(f"{file} cannot be written")
    except OSError as error:  # a name that is too long
        raise argparse.ArgumentTypeError(f"{error.strerror}: {file}") from error
    return file


def picture_to_write(text: str) -> Path:
    """An argparse type: a PNG that can be written."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return file_to_write(text)


def add_layer(parser: argparse.ArgumentParser, *, shape: dict[str, Any], name: dict[str, Any]) -> None:
    """--shape and --name, given as for `add_argument`, or --model, and --layer."""
    layer = parser.add_mutually_exclusive_group()
    layer.add_argument("--shape", **shape)
    layer.add_argument("--name", **name)
    layer.add_argument("--model", metavar="MODEL", help="a layer of this checkpoint: a directory or a Hub name org/name")
    parser.add_argument("--layer", type=count, metavar="N", help="which layer of --model")


def check_model(args: argparse.Namespace, format: object) -> None:
    """Raises argparse.ArgumentError when --model, --layer and --format contradict each other."""
    if (args.model is None) != (args.layer is None):
        raise argparse.ArgumentError(None, "--model and --layer need each other")
    if args.model is not None and format is not None:
        raise argparse.ArgumentError(None, "--model has the format of its files; leave --format out")


def add_output(parser: argparse.ArgumentParser, *, seed: str, chooses_device: bool = True) -> None:
    """--out, --seed (of what `seed` says), --device unless it cannot be chosen, and --json."""
    parser.add_argument("--out", type=file_to_write, metavar="FILE.jsonl", help="append every row to this file, as soon as it is measured")
    parser.add_argument("--seed", type=count, default=0, help=seed)
    if chooses_device:
        parser.add_argument("--device", help="torch device (default: the GPU where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def say(line: object) -> None:
    """Tell how it goes, on stderr."""
    print(line, file=sys.stderr, flush=True)


def start(args: argparse.Namespace) -> tuple[torch.device, dict[str, Any]]:
    """The device of --device, and the environment of this run.

    Raises:
        UnsupportedError: a device that is not there.
    """
    device = usable_device(args.device)
    return device, environment(device, ["halfbyte", *sys.argv[1:]])


def collect(args: argparse.Namespace, about: Mapping[str, Any], rows: Iterable[Row]) -> list[Record]:
    """The record of every row of a run, which `about` says all else of; each is told, and appended to --out, as soon as it is measured."""
    records = []
    for row in rows:
        record = Record(**about, row=row)
        say(record)
        records.append(record)
        if args.out:
            append(args.out, record)
    return records


def finish(args: argparse.Namespace, about: Mapping[str, Any], records: Sequence[Record]) -> int:
    """Print the tables, or with --json what the run was `about` and its rows; the exit code.

    That is 0 when every result was right, 1 when one was refused, 3 when nothing could be timed.
    """
    if args.json:
        print_document({**about, "rows": [record.row for record in records]}, default=asdict)
    elif records:
        print(render(tables(records)))
    statuses = {record.row.status for record in records}
    return 1 if "refused" in statuses else 0 if "ok" in statuses else 3
