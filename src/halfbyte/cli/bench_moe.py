"""`halfbyte bench moe`: time the fused MoE layer."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence
from dataclasses import asdict

import torch

from halfbyte.bench import ceilings
from halfbyte.bench.gate import PEER_LIMIT
from halfbyte.bench.inputs import ROUTING_KINDS, model_experts, random_experts
from halfbyte.bench.moe import LayerSource, Options, bench_moe
from halfbyte.bench.peers import Peer, find_peer
from halfbyte.bench.records import MOST_PANELS, tables
from halfbyte.bench.shapes import NAMED_SHAPES, MoEShape
from halfbyte.cli import bench_options as shared
from halfbyte.cli.terminal import comma_list, positive_int, relative_error, seconds
from halfbyte.errors import InputError
from halfbyte.experts import ExpertWeights
from halfbyte.formats import BlockFormat
from halfbyte.formats.activation_formats import ACTIVATION_FORMATS
from halfbyte.kernels.table import PROVIDERS

EXAMPLE = "halfbyte bench moe --name qwen3-30b --tokens 1,64,4096 --peers torch --out results.jsonl"
_GPU_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
_CPU_TOKENS = (1, 4, 16)
_GPU_SHAPE = "qwen3-30b"
_CPU_SHAPE = "256,128,16,4"  # that of the embedded demo model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    backends = list(PROVIDERS["fused_moe"])
    shared.add_layer(
        parser,
        shape={"dest": "shapes", "type": parse_shape, "metavar": "H,I,E,k", "help": "hidden, intermediate, experts, experts per token"},
        name={"dest": "shapes", "type": comma_list(shared.named_shape), "metavar": "NAME,...", "help": f"of {', '.join(NAMED_SHAPES)}"},
    )
    parser.add_argument("--tokens", type=comma_list(positive_int), metavar="T,...", help="how many tokens; default 1,4,16,..,4096, on a CPU to 16")
    parser.add_argument(
        "--format", dest="formats", type=shared.block_formats, metavar="NAME,...", help="nvfp4, mxfp4; default: as the model was published"
    )
    parser.add_argument("--activations", choices=ACTIVATION_FORMATS, default="bf16", help="what halfbyte computes on; peers compute on bf16")
    parser.add_argument("--routing", choices=ROUTING_KINDS, default="uniform", help="how tokens choose experts")
    parser.add_argument("--peers", type=comma_list(parse_peer), metavar="NAME,...", default=[], help="torch, reference, FILE.py:FUNCTION")
    parser.add_argument(
        "--peer-limit",
        type=relative_error,
        metavar="X",
        default=PEER_LIMIT,
        help="relative error over many tokens that peers are allowed; halfbyte is not",
    )
    parser.add_argument("--backend", choices=backends, help="the only kernel halfbyte may use")
    parser.add_argument("--plot", type=shared.picture_to_write, metavar="FILE.png", help="plot the share of the floor over tokens")
    parser.add_argument("--budget-s", type=seconds, metavar="S", default=math.inf, help="start no row after this many seconds")
    shared.add_output(parser, seed="of weights, inputs and routings")


def run(args: argparse.Namespace) -> int:
    """Measure; 0 when every result was right, 1 when one was refused, 3 when nothing could be timed.

    Raises:
        InputError, CheckpointError, UnsupportedError: a layer that cannot be made, a device that is not there.
    """
    _check(args)
    device, described = shared.start(args)
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
    shared.say(f"measuring the ceilings of {described['device']}")
    measured = ceilings.measure_ceilings(device)
    about = {"benchmark": "moe", "environment": described, "ceilings": asdict(measured)}
    shared.say(", ".join(f"{name} {value:.4g}" for name, value in asdict(measured).items() if value is not None))
    records = shared.collect(args, about, bench_moe(_sources(args, device), args.peers, options, device, measured))
    code = shared.finish(args, about, records)
    if args.plot:
        plot_fractions(tables(records), args.plot)
    return code


def parse_shape(text: str) -> list[MoEShape]:
    """An argparse type: hidden, intermediate, experts and top k.

    >>> parse_shape("64,32,4,2")[0].intermediate
    32
    """
    return [shared.shape_of(text, "four integers H,I,E,k: hidden, intermediate, experts, experts per token")]


def parse_peer(text: str) -> Peer:
    """An argparse type: as `bench.peers.find_peer`."""
    try:
        return find_peer(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _check(args: argparse.Namespace) -> None:
    """Raises argparse.ArgumentError when arguments contradict each other, each being right alone."""
    shared.check_model(args, args.formats)
    if args.plot and len(args.shapes or (None,)) * len(args.formats or (None,)) > MOST_PANELS:
        raise argparse.ArgumentError(None, f"--plot shows at most {MOST_PANELS} tables: name fewer layers, or plot some of them with bench report")
    for shape in args.shapes or ():
        for format in args.formats or (shape.published,):
            if shape.hidden % format.block or shape.intermediate % format.block:
                needed = f"{format!r} blocks of {format.block}"
                raise argparse.ArgumentError(None, f"{shape.name}: hidden and intermediate do not divide into {needed}")


def _sources(args: argparse.Namespace, device: torch.device) -> Sequence[LayerSource]:
    if args.model is not None:
        return [functools.partial(model_experts, args.model, args.layer)]
    shapes = args.shapes or (parse_shape(_CPU_SHAPE) if device.type == "cpu" else [NAMED_SHAPES[_GPU_SHAPE]])

    def random_layer(shape: MoEShape, format: BlockFormat, on: torch.device) -> tuple[MoEShape, ExpertWeights]:
        return shape, random_experts(shape, format, on, args.seed)

    return [functools.partial(random_layer, shape, format) for shape in shapes for format in args.formats or (shape.published,)]
