"""`halfbyte bench prepare`: time the arranging of weights."""

from __future__ import annotations

import argparse

from halfbyte.bench.ceilings import measure_copy_gbps
from halfbyte.bench.inputs import model_experts, random_experts
from halfbyte.bench.prepare import PEERS, bench_prepare
from halfbyte.bench.shapes import NAMED_SHAPES, MoEShape
from halfbyte.cli import bench_options as shared
from halfbyte.cli.terminal import layer_count, positive_int

EXAMPLE = "halfbyte bench prepare --name qwen3-30b"
_CPU_SHAPE = "256,128,16"  # that of the embedded demo model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_layer(
        parser,
        shape={"type": parse_sizes, "metavar": "H,I,E", "help": "hidden, intermediate, experts"},
        name={"dest": "shape", "type": shared.named_shape, "metavar": "NAME", "help": f"one of {', '.join(NAMED_SHAPES)}"},
    )
    parser.add_argument("--format", type=shared.block_format, metavar="NAME", help="nvfp4 or mxfp4; default: as the model was published")
    parser.add_argument("--layout", choices=PEERS, default="hopper", help="the arrangement")
    parser.add_argument("--naive-experts", type=positive_int, metavar="N", default=4, help="how many experts the naive way packs")
    parser.add_argument("--layers", type=layer_count, metavar="N", default=1, help="how many layers are packed one after another")
    shared.add_output(parser, seed="of the weights")


def run(args: argparse.Namespace) -> int:
    """Measure; 0 when every result was right, 1 when one was refused.

    Raises:
        InputError, CheckpointError, UnsupportedError: a layer that cannot be made, a device that is not there.
    """
    shared.check_model(args, args.format)
    device, described = shared.start(args)
    copy_gbps = measure_copy_gbps(device)
    shared.say(f"{described['device']}: copies {copy_gbps:.4g} GB/s")
    if args.model is not None:
        shape, weights = model_experts(args.model, args.layer, device)
    else:
        shape = args.shape or (parse_sizes(_CPU_SHAPE) if device.type == "cpu" else NAMED_SHAPES["dsr1"])
        weights = random_experts(shape, args.format or shape.published, device, args.seed)
    rows = bench_prepare(shape.name, weights, args.layout, copy_gbps, few_experts=args.naive_experts, layers=args.layers)
    about = {"benchmark": "prepare", "environment": described, "ceilings": {"copy_gbps": copy_gbps}}
    return shared.finish(args, about, shared.collect(args, about, rows))


def parse_sizes(text: str) -> MoEShape:
    """An argparse type: hidden, intermediate and experts."""
    return shared.shape_of(text, "three integers H,I,E: hidden, intermediate, experts", 1)
