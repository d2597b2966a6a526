"""`halfbyte bench quantize`: time the quantisers against the copy bandwidth."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path

from halfbyte.cli.bench import BENCHMARKS
from halfbyte.cli.bench_moe import comma_list, parse_format

HELP = BENCHMARKS["quantize"]
_GPU_ROWS, _CPU_ROWS = (64, 1024, 32768, 65536), (64,)
_GPU_WIDTHS, _CPU_WIDTHS = (4096, 7168), (1024,)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from halfbyte.cli.terminal import positive_int

    parser.add_argument("--rows", type=comma_list(positive_int), metavar="M,...", help="default 64,1024,32768,65536, on a CPU 64")
    parser.add_argument("--width", type=comma_list(positive_int), metavar="K,...", help="default 4096,7168, on a CPU 1024")
    parser.add_argument("--format", dest="formats", type=comma_list(parse_format), metavar="NAME,...", default="nvfp4", help="nvfp4, mxfp4")
    parser.add_argument("--layout", dest="layouts", type=comma_list(parse_layout), metavar="NAME,...", default="128x4", help="linear, 128x4, 8x4")
    parser.add_argument(
        "--experts", type=comma_list(experts), metavar="E,...", default="0", help="0: one matrix; else rows sorted by so many experts"
    )
    parser.add_argument(
        "--systems", type=comma_list(parse_system), metavar="NAME,...", default="halfbyte,naive", help="halfbyte, naive; with experts: scan, search"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append every row to this file, as soon as it is measured")
    parser.add_argument("--seed", type=int, default=0, help="of inputs and experts")
    parser.add_argument("--device", help="torch device (default: the GPU where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Measure; 0 when every result was right, 1 when one was refused, 3 when nothing could be timed.

    Raises:
        UnsupportedError: a device that is not there.
    """
    from halfbyte.bench.ceilings import measure_ceilings
    from halfbyte.bench.quantize import QuantizeCase, QuantizeRecord, bench_quantize, render
    from halfbyte.bench.results import append, environment
    from halfbyte.cli.terminal import usable_device

    device = usable_device(args.device)
    on_cpu = device.type == "cpu"
    widths = args.width or (_CPU_WIDTHS if on_cpu else _GPU_WIDTHS)
    problem = next((f"{k} does not divide into {f!r} blocks of {f.block}" for k in widths for f in args.formats if k % f.block), None)
    if args.out is not None and not args.out.absolute().parent.is_dir():
        problem = f"no directory for {args.out}"
    if problem:
        print(f"halfbyte bench quantize: error: {problem}", file=sys.stderr)
        return 2
    sizes = itertools.product(args.formats, args.layouts, args.experts, widths, args.rows or (_CPU_ROWS if on_cpu else _GPU_ROWS))
    cases = [QuantizeCase(rows, width, format.name, layout, experts) for format, layout, experts, width, rows in sizes]
    described = environment(device, ["halfbyte", *sys.argv[1:]])
    print(f"measuring the ceilings of {described['device']}", file=sys.stderr, flush=True)
    ceilings = measure_ceilings(device)
    records = []
    for row in bench_quantize(cases, args.systems, device, ceilings, args.seed):
        print(row, file=sys.stderr, flush=True)
        records.append(QuantizeRecord(described, ceilings, row))
        if args.out:
            append(args.out, records[-1], "quantize")
    if args.json:
        document = {"environment": described, "ceilings": asdict(ceilings), "rows": [asdict(record.row) for record in records]}
        print(json.dumps(document, allow_nan=False))
    elif records:
        print(render(records))
    statuses = {record.row.status for record in records}
    return 1 if "refused" in statuses else 0 if "ok" in statuses else 3


def parse_layout(text: str) -> str:
    """An argparse type: a scale layout."""
    from halfbyte.formats.scale_layout import LAYOUTS

    return _one_of(text, LAYOUTS)


def parse_system(text: str) -> str:
    """An argparse type: one of `bench.quantize.SYSTEMS`."""
    from halfbyte.bench.quantize import SYSTEMS

    return _one_of(text, SYSTEMS)


def experts(text: str) -> int:
    """An argparse type: 0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def _one_of(text: str, names: tuple[str, ...]) -> str:
    if text not in names:
        raise argparse.ArgumentTypeError(f"unknown {text!r}; choose from {', '.join(names)}")
    return text
