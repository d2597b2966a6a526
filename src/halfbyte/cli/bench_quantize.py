"""`halfbyte bench quantize`: time the quantisers against the copy bandwidth."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict

from halfbyte.bench import ceilings
from halfbyte.bench.quantize import OF_EXPERTS, SYSTEMS, QuantizeCase, bench_quantize
from halfbyte.cli import bench_options as shared
from halfbyte.cli.terminal import comma_list, expert_count, one_of, positive_int
from halfbyte.formats.scale_layout import LAYOUTS

_GPU_ROWS, _CPU_ROWS = (64, 1024, 32768, 65536), (64,)
_GPU_WIDTHS, _CPU_WIDTHS = (4096, 7168), (1024,)

EXAMPLE = "halfbyte bench quantize --out results.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=comma_list(positive_int), metavar="M,...", help="default 64,1024,32768,65536, on a CPU 64")
    parser.add_argument("--width", type=comma_list(positive_int), metavar="K,...", help="default 4096,7168, on a CPU 1024")
    parser.add_argument("--format", dest="formats", type=shared.block_formats, metavar="NAME,...", default="nvfp4", help="nvfp4, mxfp4")
    layouts = comma_list(one_of("layout", {name: name for name in LAYOUTS}))
    parser.add_argument("--layout", dest="layouts", type=layouts, metavar="NAME,...", default="128x4", help="linear, 128x4, 8x4")
    parser.add_argument(
        "--experts", type=comma_list(expert_count), metavar="E,...", default="0", help="0: one matrix; else rows sorted by so many experts"
    )
    systems = comma_list(one_of("system", {name: name for name in SYSTEMS}))
    parser.add_argument("--systems", type=systems, metavar="NAME,...", default="halfbyte,naive", help="halfbyte, naive; with experts: scan, search")
    shared.add_output(parser, seed="of inputs and experts")


def run(args: argparse.Namespace) -> int:
    """Measure; 0 when every result was right, 1 when one was refused, 3 when nothing could be timed.

    Raises:
        UnsupportedError: a device that is not there.
    """
    device, described = shared.start(args)
    on_cpu = device.type == "cpu"
    widths = args.width or (_CPU_WIDTHS if on_cpu else _GPU_WIDTHS)
    for width, format in itertools.product(widths, args.formats):
        if width % format.block:
            raise argparse.ArgumentError(None, f"{width} does not divide into {format!r} blocks of {format.block}")
    if not any(args.experts) and set(args.systems) <= OF_EXPERTS:
        raise argparse.ArgumentError(None, f"{' and '.join(args.systems)} need rows of --experts")
    sizes = itertools.product(args.formats, args.layouts, args.experts, widths, args.rows or (_CPU_ROWS if on_cpu else _GPU_ROWS))
    cases = [QuantizeCase(rows, width, format.name, layout, experts) for format, layout, experts, width, rows in sizes]
    shared.say(f"measuring the ceilings of {described['device']}")
    measured = ceilings.measure_ceilings(device)
    rows = bench_quantize(cases, args.systems, device, measured, args.seed)
    about = {"benchmark": "quantize", "environment": described, "ceilings": asdict(measured)}
    return shared.finish(args, about, shared.collect(args, about, rows))
