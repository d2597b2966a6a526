"""`halfbyte bench prepare`: time the arranging of weights."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.bench import BENCHMARKS

if TYPE_CHECKING:
    from halfbyte.bench.shapes import MoEShape

HELP = BENCHMARKS["prepare"]
_CPU_SHAPE = "256,128,16"  # that of the embedded demo model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from halfbyte.bench.prepare import PEERS
    from halfbyte.bench.shapes import NAMED_SHAPES
    from halfbyte.cli.bench_moe import named_shape, parse_format
    from halfbyte.cli.terminal import positive_int

    layer = parser.add_mutually_exclusive_group()
    layer.add_argument("--shape", type=parse_sizes, metavar="H,I,E", help="hidden, intermediate, experts")
    layer.add_argument("--name", dest="shape", type=named_shape, metavar="NAME", help=f"one of {', '.join(NAMED_SHAPES)}")
    layer.add_argument("--model", metavar="MODEL", help="a layer of this checkpoint: a directory or a Hub name org/name")
    parser.add_argument("--layer", type=int, metavar="N", help="which layer of --model")
    parser.add_argument("--format", type=parse_format, metavar="NAME", help="nvfp4 or mxfp4; default: as the model was published")
    parser.add_argument("--layout", choices=PEERS, default="hopper", help="the arrangement")
    parser.add_argument("--naive-experts", type=positive_int, metavar="N", default=4, help="how many experts the naive way packs")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append every row to this file")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--device", help="torch device (default: the GPU where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Measure; 0 when every result was right, 1 when one was refused.

    Raises:
        InputError, CheckpointError, UnsupportedError: a layer that cannot be made, a device that is not there.
    """
    from halfbyte.bench.ceilings import measure_copy_gbps
    from halfbyte.bench.inputs import model_experts, random_experts
    from halfbyte.bench.prepare import bench_prepare, render
    from halfbyte.bench.results import environment
    from halfbyte.bench.shapes import NAMED_SHAPES
    from halfbyte.cli.terminal import usable_device

    problem = _contradiction(args)
    if problem:
        print(f"halfbyte bench prepare: error: {problem}", file=sys.stderr)
        return 2
    device = usable_device(args.device)
    described = environment(device, ["halfbyte", *sys.argv[1:]])
    copy_gbps = measure_copy_gbps(device)
    print(f"{described['device']}: copies {copy_gbps:.4g} GB/s", file=sys.stderr, flush=True)
    if args.model is not None:
        shape, weights = model_experts(args.model, args.layer, device)
    else:
        shape = args.shape or (parse_sizes(_CPU_SHAPE) if device.type == "cpu" else NAMED_SHAPES["dsr1"])
        weights = random_experts(shape, args.format or shape.published, device, args.seed)
    rows = []
    for row in bench_prepare(shape.name, weights, args.layout, copy_gbps, few_experts=args.naive_experts):
        rows.append(row)
        if args.out:
            line = {"benchmark": "prepare", "environment": described, "copy_gbps": copy_gbps, "row": asdict(row)}
            with args.out.open("a") as stream:
                stream.write(json.dumps(line, allow_nan=False) + "\n")
    if args.json:
        print(json.dumps({"environment": described, "copy_gbps": copy_gbps, "rows": [asdict(row) for row in rows]}, allow_nan=False))
    else:
        first = rows[0]
        print(
            f"### {first.shape} {first.format.upper()}, layout {first.layout}: {described['device']}, copies {copy_gbps:.4g} GB/s\n\n{render(rows)}"
        )
    return 1 if any(row.status == "refused" for row in rows) else 0


def parse_sizes(text: str) -> MoEShape:
    """An argparse type: hidden, intermediate and experts.

    >>> parse_sizes("64,32,4").num_experts
    4
    """
    from halfbyte.bench.shapes import MoEShape
    from halfbyte.errors import InputError

    try:
        hidden, intermediate, num_experts = map(int, text.split(","))
        return MoEShape(text, hidden, intermediate, num_experts, top_k=1)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not three integers H,I,E: hidden, intermediate, experts") from error


def _contradiction(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments together, each being right alone."""
    if (args.model is None) != (args.layer is None):
        return "--model and --layer need each other"
    if args.model is not None and args.format is not None:
        return "--model has the format of its files; leave --format out"
    if args.out is not None and not args.out.absolute().parent.is_dir():
        return f"no directory for {args.out}"
    return None
