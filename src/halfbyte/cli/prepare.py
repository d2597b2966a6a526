"""`halfbyte prepare`: arrange a model's experts for this machine's kernels once, and keep them on disk."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.cli.parser import path
from halfbyte.errors import printable

if TYPE_CHECKING:
    from halfbyte.checkpoint import Checkpoint
    from halfbyte.loading.prepared import Wanted

EXAMPLE = "halfbyte prepare nvidia/Qwen3-30B-A3B-NVFP4 --compile bf16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from halfbyte.cli.terminal import add_threads
    from halfbyte.formats.activation_formats import ACTIVATION_FORMATS
    from halfbyte.weights.layouts import LAYOUTS

    parser.add_argument("model", metavar="MODEL", help="a directory, a Hub name org/name, or demo (the embedded model)")
    parser.add_argument("--layout", choices=("auto", *LAYOUTS), default="auto", help="auto: what the kernels of the device read best")
    parser.add_argument("--activations", choices=ACTIVATION_FORMATS, default="bf16", help="what the layers will be called with, for --layout auto")
    parser.add_argument("--device", help="where the model will run, and where the work is done (default: the GPU where there is one)")
    parser.add_argument("--layers", type=parse_layers, metavar="N,N-N,...", help="only these decoder layers (default: all with experts)")
    parser.add_argument("--experts", type=parse_experts, metavar="A:B", help="only experts A to B - 1, those of one rank (default: all)")
    parser.add_argument(
        "--cache-dir", type=path, metavar="DIR", help="default: $HALFBYTE_CACHE_DIR, or $XDG_CACHE_HOME/halfbyte, or ~/.cache/halfbyte"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--force", action="store_true", help="write files that are there already again")
    existing.add_argument("--verify", action="store_true", help="check every byte of files that are there already, not only their headers")
    parser.add_argument(
        "--compile",
        type=parse_activations,
        default=(),
        metavar="FORMAT,...",
        help="also compile the kernels for these activations: bf16, fp8, ...",
    )
    parser.add_argument("--fp8-error", action="store_true", help="also measure what Hopper's fp8 tensor cores round off (reads all experts)")
    add_threads(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Prepare layer by layer; a layer that is done stays when a later one fails.

    Raises:
        CheckpointError, UnsupportedError, InputError: as `load_experts`, `prepare` and `warm_up`; the disk is full, the directory cannot be written.
    """
    from halfbyte.checkpoint import Checkpoint
    from halfbyte.cli.documents import print_document
    from halfbyte.cli.progress import Bar
    from halfbyte.cli.terminal import set_threads, usable_device
    from halfbyte.loading.prepared import Wanted, prepare_on_disk

    set_threads(args.threads)
    device = usable_device(args.device)
    checkpoint = Checkpoint.open(args.model)
    layers = args.layers or checkpoint.moe.moe_layers
    for layer in layers:
        checkpoint.moe.block_of(layer)  # before any work: a layer that is not there
    wanted = Wanted(device, args.layout, activations=args.activations, experts=args.experts, cache_dir=args.cache_dir)
    start, rows = time.perf_counter(), []
    if args.compile:
        _compile(checkpoint, layers, wanted, args.compile)
        compiled_s = time.perf_counter() - start
    with Bar("prepare", unit="B") as bar:
        for index, layer in enumerate(layers):

            def progress(done: int, total: int, before: int = index) -> None:
                bar.reach(before * total + done, len(layers) * total)

            rows.append(prepare_on_disk(checkpoint, layer, wanted, force=args.force, verify=args.verify, progress=progress))
    report = {
        "model": str(checkpoint.path),
        "device": str(device),
        "seconds": round(time.perf_counter() - start, 3),
        "bytes": sum(row.nbytes for row in rows),
        "layers": [
            {"layer": row.layer, "layout": row.layout, "file": str(row.file), "bytes": row.nbytes, "written": row.written, "reason": row.reason}
            for row in rows
        ],
    }
    if args.compile:
        report["compiled"] = {"activations": args.compile, "seconds": round(compiled_s, 3)}
    if args.fp8_error:
        from halfbyte.cli.fp8_error import describe_layer

        report["fp8_error"] = [row for layer in layers for row in describe_layer(checkpoint, layer, device, args.experts)]
    if args.json:
        print_document(report)
    else:
        print(_render(report))
    return 0


def _compile(checkpoint: Checkpoint, layers: Sequence[int], wanted: Wanted, kinds_of_activations: Sequence[Any]) -> None:
    """Compile what `route` and the routers of transformers ask of layers like these."""
    import torch

    from halfbyte.cli.progress import Bar
    from halfbyte.loading.prepared import kinds_of_layers
    from halfbyte.moe import warm_up

    dtypes = ((torch.int32, torch.float32), (torch.int64, torch.float32), (torch.int64, torch.bfloat16))
    for activations in kinds_of_activations:
        for kind in kinds_of_layers(checkpoint, layers, replace(wanted, activations=activations)):
            with Bar(f"compile {activations}", len(dtypes), "pass") as bar:
                for ids_dtype, weights_dtype in dtypes:
                    warm_up(kind, checkpoint.moe.top_k, ids_dtype=ids_dtype, weights_dtype=weights_dtype)
                    bar.update(1)


def parse_activations(text: str) -> list[str]:
    """An argparse type: names of activation formats.

    >>> parse_activations("bf16,fp8")
    ['bf16', 'fp8']
    """
    from halfbyte.cli.terminal import comma_list, one_of
    from halfbyte.formats.activation_formats import ACTIVATION_FORMATS

    return comma_list(one_of("activation format", {name: name for name in ACTIVATION_FORMATS}))(text)


def parse_layers(text: str) -> tuple[int, ...]:
    """An argparse type: layers and ranges of layers, in order, none twice.

    >>> parse_layers("0,3-5,4")
    (0, 3, 4, 5)
    """
    from halfbyte.checkpoint.families.description import MAX_LAYERS

    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise argparse.ArgumentTypeError(f"{part!r} is no layer like 3 and no range like 3-5")
        if last >= MAX_LAYERS:  # before a range is written out
            raise argparse.ArgumentTypeError(f"{part!r} goes beyond layer {MAX_LAYERS - 1}, which no model has")
        layers |= set(range(first, last + 1))
    return tuple(sorted(layers))


def parse_experts(text: str) -> range:
    """An argparse type: the range A:B, B not included.

    >>> parse_experts("32:64")
    range(32, 64)
    """
    match = re.fullmatch(r"\s*(\d+):(\d+)\s*", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no range of experts like 0:32 (32 not included)")
    return range(int(match[1]), int(match[2]))


def _render(report: dict[str, Any]) -> str:
    rows = report["layers"]
    lines = [report["model"], f"  in {Path(rows[0]['file']).parent}" if rows else "  no layers with experts"]
    for row in rows:
        state = f"written: {row['reason']}" if row["written"] else row["reason"]
        lines.append(f"  layer {row['layer']:>3}  {row['layout']}  {row['bytes'] / 1e6:10.2f} MB  {state}")
    if report.get("fp8_error"):
        from halfbyte.cli.fp8_error import render

        lines += map(render, report["fp8_error"])
    if "compiled" in report:
        lines.append(f"  compiled for {', '.join(report['compiled']['activations'])} activations in {report['compiled']['seconds']:.1f} s")
    written = sum(row["written"] for row in rows)
    return "\n".join(
        [*map(printable, lines), f"{written} written, {len(rows) - written} kept, {report['bytes'] / 1e9:.2f} GB, {report['seconds']:.1f} s"]
    )
