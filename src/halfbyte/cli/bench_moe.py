"""`halfbyte bench moe`: time the fused MoE layer."""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from halfbyte.cli.bench import BENCHMARKS

if TYPE_CHECKING:
    import torch

    from halfbyte.bench.moe import LayerSource
    from halfbyte.bench.peers import Peer
    from halfbyte.bench.shapes import MoEShape
    from halfbyte.checkpoint.experts import ExpertWeights
    from halfbyte.formats import BlockFormat

HELP = BENCHMARKS["moe"]
_GPU_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
_CPU_TOKENS = (1, 4, 16)
_GPU_SHAPE = "qwen3-30b"
_CPU_SHAPE = "256,128,16,4"  # that of the embedded demo model
_Item = TypeVar("_Item")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from halfbyte.bench.gate import GLOBAL_LIMIT
    from halfbyte.bench.inputs import ROUTING_KINDS
    from halfbyte.bench.shapes import NAMED_SHAPES
    from halfbyte.cli.terminal import positive_int
    from halfbyte.formats.activations import ACTIVATION_FORMATS
    from halfbyte.kernels.table import CANDIDATES

    backends = [candidate.name for candidate in CANDIDATES if candidate.op == "fused_moe"]
    layer = parser.add_mutually_exclusive_group()
    layer.add_argument("--shape", dest="shapes", type=parse_shape, metavar="H,I,E,k", help="hidden, intermediate, experts, experts a token")
    layer.add_argument("--name", dest="shapes", type=comma_list(named_shape), metavar="NAME,...", help=f"of {', '.join(NAMED_SHAPES)}")
    layer.add_argument("--model", metavar="MODEL", help="a layer of this checkpoint: a directory or a Hub name org/name")
    parser.add_argument("--layer", type=int, metavar="N", help="which layer of --model")
    parser.add_argument("--tokens", type=comma_list(positive_int), metavar="T,...", help="how many tokens; default 1,4,16,..,4096, on a CPU to 16")
    parser.add_argument(
        "--format", dest="formats", type=comma_list(parse_format), metavar="NAME,...", help="nvfp4, mxfp4; default: as the model was published"
    )
    parser.add_argument("--activations", choices=ACTIVATION_FORMATS, default="bf16", help="what halfbyte computes on; peers compute on bf16")
    parser.add_argument("--routing", choices=ROUTING_KINDS, default="uniform", help="how tokens choose experts")
    parser.add_argument("--peers", type=comma_list(parse_peer), metavar="NAME,...", default=[], help="torch, reference, FILE.py:FUNCTION")
    parser.add_argument(
        "--peer-limit", type=float, metavar="X", default=GLOBAL_LIMIT, help="relative error over all tokens that peers are allowed; halfbyte is not"
    )
    parser.add_argument("--backend", choices=backends, help="the only kernel halfbyte may use")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append every row to this file, as soon as it is measured")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot the share of the floor over tokens")
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and routings")
    parser.add_argument("--budget-s", type=float, metavar="S", default=math.inf, help="start no row after this many seconds")
    parser.add_argument("--device", help="torch device (default: the GPU where there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Measure; 0 when every result was right, 1 when one was refused, 3 when nothing could be timed.

    Raises:
        InputError, CheckpointError, UnsupportedError: a layer that cannot be made, a device that is not there.
    """
    from halfbyte.bench.ceilings import measure_ceilings
    from halfbyte.bench.moe import Options, bench_moe
    from halfbyte.bench.results import Record, append, environment, render, tables
    from halfbyte.cli.terminal import usable_device

    problem = _contradiction(args)
    if problem:
        print(f"halfbyte bench moe: error: {problem}", file=sys.stderr)
        return 2
    device = usable_device(args.device)
    if args.plot:
        from halfbyte.bench.plot import plot_fractions  # before any work: it says what to install
    options = Options(
        tokens=tuple(dict.fromkeys(args.tokens or (_CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS))),
        activations=args.activations,
        routing=args.routing,
        backend=args.backend,
        peer_limit=args.peer_limit,
        seed=args.seed,
        budget_s=args.budget_s,
    )
    described = environment(device, ["halfbyte", *sys.argv[1:]])
    _say(f"measuring the ceilings of {described['device']}")
    ceilings = measure_ceilings(device)
    _say(", ".join(f"{name} {value:.4g}" for name, value in asdict(ceilings).items() if value is not None))
    records = []
    for row in bench_moe(_sources(args, device), args.peers, options, device, ceilings):
        _say(str(row))
        records.append(Record(described, ceilings, row))
        if args.out:
            append(args.out, records[-1])
    if args.json:
        document = {"environment": described, "ceilings": asdict(ceilings), "rows": [asdict(record.row) for record in records]}
        print(json.dumps(document, allow_nan=False))
    else:
        print(render(tables(records)))
    if args.plot:
        plot_fractions(tables(records), args.plot)
    statuses = {record.row.status for record in records}
    return 1 if "refused" in statuses else 0 if "ok" in statuses else 3


def comma_list(item: Callable[[str], _Item]) -> Callable[[str], list[_Item]]:
    """An argparse type: items between commas, none twice."""

    def parse(text: str) -> list[_Item]:
        return [item(part.strip()) for part in dict.fromkeys(text.split(","))]

    parse.__name__ = f"list of {item.__name__}"  # argparse names it in its messages
    return parse


def parse_shape(text: str) -> list[MoEShape]:
    """An argparse type: hidden, intermediate, experts and top k.

    >>> parse_shape("64,32,4,2")[0].intermediate
    32
    """
    from halfbyte.bench.shapes import MoEShape
    from halfbyte.errors import InputError

    try:
        hidden, intermediate, num_experts, top_k = map(int, text.split(","))
        return [MoEShape(text, hidden, intermediate, num_experts, top_k)]
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not four integers H,I,E,k: hidden, intermediate, experts, experts a token") from error


def named_shape(text: str) -> MoEShape:
    """An argparse type: one of `bench.shapes.NAMED_SHAPES`."""
    from halfbyte.bench.shapes import NAMED_SHAPES

    if text not in NAMED_SHAPES:
        raise argparse.ArgumentTypeError(f"unknown shape {text!r}; choose from {', '.join(NAMED_SHAPES)}, or give --shape H,I,E,k")
    return NAMED_SHAPES[text]


def parse_format(text: str) -> BlockFormat:
    """An argparse type: nvfp4 or mxfp4."""
    from halfbyte.formats.block_format import FORMATS

    if text not in FORMATS:
        raise argparse.ArgumentTypeError(f"unknown format {text!r}; choose from {', '.join(FORMATS)}")
    return FORMATS[text]


def parse_peer(text: str) -> Peer:
    """An argparse type: as `bench.peers.find_peer`."""
    from halfbyte.bench.peers import find_peer
    from halfbyte.errors import InputError

    try:
        return find_peer(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _contradiction(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments together, each being right alone."""
    if (args.model is None) != (args.layer is None):
        return "--model and --layer need each other"
    if args.model is not None and args.formats is not None:
        return "--model has the format of its files; leave --format out"
    for file in (args.out, args.plot):
        if file is not None and not file.absolute().parent.is_dir():
            return f"no directory for {file}"
    for shape in args.shapes or ():
        for format in args.formats or (shape.published,):
            if shape.hidden % format.block or shape.intermediate % format.block:
                return f"{shape.name}: hidden and intermediate do not divide into {format!r} blocks of {format.block}"
    return None


def _sources(args: argparse.Namespace, device: torch.device) -> Sequence[LayerSource]:
    from halfbyte.bench.inputs import model_experts, random_experts

    if args.model is not None:
        return [functools.partial(model_experts, args.model, args.layer)]
    shapes = args.shapes or (parse_shape(_CPU_SHAPE) if device.type == "cpu" else [named_shape(_GPU_SHAPE)])

    def random_layer(shape: MoEShape, format: BlockFormat, on: torch.device) -> tuple[MoEShape, ExpertWeights]:
        return shape, random_experts(shape, format, on, args.seed)

    return [functools.partial(random_layer, shape, format) for shape in shapes for format in args.formats or (shape.published,)]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
