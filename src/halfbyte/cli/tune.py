"""`halfbyte tune`: race the configurations of a layer's kernels on this GPU, keep what wins, and show what was measured."""

from __future__ import annotations

import argparse
import math
import time

from halfbyte.bench.shapes import MoEShape
from halfbyte.cli import bench_options as shared
from halfbyte.cli.bench_moe import parse_shape
from halfbyte.cli.documents import print_document
from halfbyte.cli.parser import path
from halfbyte.cli.terminal import comma_list, one_of, seconds, usable_device
from halfbyte.device import Target
from halfbyte.errors import InputError
from halfbyte.formats.activation_formats import ACTIVATION_FORMATS
from halfbyte.kernels.tuned import SHIPPED, Table, read, user_directory
from halfbyte.tuning import report
from halfbyte.tuning.layer import Layer, distinct, shape_of_model
from halfbyte.tuning.models import MODELS
from halfbyte.tuning.run import OnDevice, load, missing, tune
from halfbyte.tuning.store import write_table

EXAMPLE = """halfbyte tune ./Qwen3-30B-A3B-NVFP4 --activations bf16,fp8
halfbyte tune --name dsr1 --budget-s 60 --export table.json
halfbyte tune --report table.json"""
_activations = one_of("activations", {name: name for name in ACTIVATION_FORMATS})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    layer = parser.add_mutually_exclusive_group()
    layer.add_argument("model", nargs="?", type=path, metavar="MODEL", help="a directory, of which config.json is read")
    names = ", ".join(MODELS)
    layer.add_argument("--name", dest="shapes", type=comma_list(one_of("layer", MODELS, ", or give --shape")), metavar="NAME,...", help=f"of {names}")
    layer.add_argument(
        "--shape", dest="shapes", type=parse_shape, metavar="H,I,E,k", help="hidden, intermediate, experts held here, experts per token"
    )
    layer.add_argument(
        "--report", nargs="*", type=path, metavar="FILE.json", help="race nothing, show these tables; by default the user's and the package's"
    )
    parser.add_argument("--format", dest="formats", type=shared.block_formats, metavar="NAME,...", help="nvfp4, mxfp4; default: as it was published")
    activations, of = comma_list(_activations), ", ".join(ACTIVATION_FORMATS)
    parser.add_argument("--activations", type=activations, default=["bf16"], metavar="NAME,...", help=f"of {of}; default: bf16")
    parser.add_argument("--budget-s", type=seconds, metavar="S", default=math.inf, help="start no race after this many seconds; a second run goes on")
    parser.add_argument("--again", action="store_true", help="race also what is known already")
    parser.add_argument("--plot", type=shared.picture_to_write, metavar="FILE.png", help="draw a map of layers and buckets")
    parser.add_argument("--export", type=shared.file_to_write, metavar="FILE.json", help="write it all into one file, such as the package brings")
    parser.add_argument("--device", help="torch device (default: the GPU)")
    parser.add_argument("--json", action="store_true", help="print one JSON document, the tables")


def run(args: argparse.Namespace) -> int:
    """Tune and report; 0 when everything was raced, 1 when the budget ended before.

    Raises:
        InputError: tables of several GPUs for one file.
        CheckpointError: the model's files do not say what its layers are; a file that is no table; a directory that cannot be written.
        UnsupportedError: no kernel with a choice of configurations runs the layer here; matplotlib is not installed.
    """
    if args.plot:
        import halfbyte.tuning.plot  # noqa: F401  # before any work: it says what to install
    if args.report is not None:
        files = args.report or [file for directory in (user_directory(), SHIPPED) for file in sorted(directory.glob("*.json"))]
        return _show(args, [read(file) for file in files])
    if args.model is None and args.shapes is None:
        raise argparse.ArgumentError(None, "say what to tune: MODEL, --name or --shape; or --report")
    device = usable_device(args.device)
    layers = _layers(args, Target.of(device))
    start, number = time.monotonic(), 0
    racing = OnDevice(device)
    try:
        for layer, race in tune(layers, racing, budget_s=args.budget_s, again=args.again):
            number += 1
            shared.say(f"{time.monotonic() - start:5.1f} s: {layer}, up to {race.bucket}: {race}")
    finally:
        racing.close()
    shared.say(f"{number} buckets in {time.monotonic() - start:.1f} s")
    known = load(layers)
    _show(args, known)
    return int(any(missing(layer, table.layers[0]) for layer, table in zip(layers, known, strict=True)))


def _layers(args: argparse.Namespace, target: Target) -> list[Layer]:
    shapes: list[MoEShape] = [shape_of_model(args.model)] if args.model else args.shapes
    return distinct(
        [
            Layer(shape, format, activations, target)
            for shape in shapes
            for format in args.formats or [shape.published]
            for activations in args.activations
        ]
    )


def _show(args: argparse.Namespace, tables: list[Table]) -> int:
    devices = {table.device for table in tables}
    if args.export and len(devices) != 1:
        names = ", ".join(sorted(device.name for device in devices)) or "none"
        raise InputError("a file has the races of one GPU", where="--export", given=names, next_step="name its tables after --report")
    if args.json:
        print_document({"tables": [table.to_json() for table in tables]})
    else:
        print(report.render(tables))
        print("\n" + report.summary(layer for table in tables for layer in table.layers))
    if args.plot:
        from halfbyte.tuning.plot import plot

        plot(tables, args.plot)
    if args.export:
        write_table(Table(devices.pop(), tuple(layer for table in tables for layer in table.layers)), args.export)
    return 0
