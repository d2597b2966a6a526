"""`halfbyte inspect`: what a checkpoint holds, how it is quantised, how its scales look, and what is wrong with it."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from halfbyte.errors import printable

EXAMPLE = "halfbyte inspect nvidia/Qwen3-30B-A3B-NVFP4"
# First match wins; the order is also that of the printed table.
_KINDS = (
    ("shared experts", r"\.shared_experts?(_gate)?\."),
    ("experts", r"\.experts\."),
    ("router", r"\.(mlp|ffn|block_sparse_moe)\.(gate|router)\."),
    ("attention", r"attn|attention"),
    ("dense mlp", r"\.(mlp|ffn)\."),
    ("embeddings", r"embed|lm_head|^head\."),
    ("norms", r"norm"),
    ("other", ""),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from halfbyte.cli.terminal import count

    parser.add_argument("model", metavar="MODEL", help="a directory, a Hub name org/name, or demo (the embedded model)")
    parser.add_argument("--layer", type=count, metavar="N", help="examine the scales of this layer only")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--values", action="store_true", help="search experts in bf16 or fp8 for NaN (small checkpoints: always); reads all of them")
    parser.add_argument("--fp8-error", action="store_true", help="measure what Hopper's fp8 tensor cores round off (reads all experts)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 when the checkpoint has an error (warnings are no failure).

    Raises:
        CheckpointError, UnsupportedError: the checkpoint cannot be opened or described at all; no such MoE layer.
    """
    from halfbyte.cli.documents import print_document

    report = describe(args.model, args.layer, args.tensors, args.fp8_error, args.values)
    if args.json:
        print_document(report)
    else:
        print(_render(report))
    return int(any(problem["severity"] == "error" for problem in report["problems"]))


def describe(model: str, layer: int | None = None, tensors: bool = False, fp8_error: bool = False, values: bool = False) -> dict[str, Any]:
    """The report as a JSON-able dict; `layer` limits the scale statistics, fp8 errors and problems to one layer."""
    from halfbyte.arguments import dtype_name
    from halfbyte.checkpoint.defects import examine_layer, reads_values
    from halfbyte.checkpoint.source import Checkpoint

    checkpoint = Checkpoint.open(model)
    moe, quantization = checkpoint.moe, checkpoint.quantization
    layers = moe.expert_layers if layer is None else (layer,)
    examined = {index: examine_layer(checkpoint, index, values or None) for index in layers}
    report: dict[str, Any] = {
        "model": str(checkpoint.path),
        "moe": asdict(moe),
        "quantization": {"kind": quantization.kind, "format": quantization.format.name if quantization.format else None},
        "sizes": _sizes(checkpoint),
        "scales": [{"layer": index, **asdict(row)} for index, (rows, _) in examined.items() for row in rows],
        "values_read": quantization.format is None and reads_values(checkpoint, values or None),
        "problems": [asdict(defect) for _, defects in examined.values() for defect in defects],
    }
    if fp8_error:
        from halfbyte.cli.fp8_error import describe_layer

        broken = {problem["layer"] for problem in report["problems"] if problem["severity"] == "error"}
        report["fp8_error"] = [row for index in layers if index not in broken for row in describe_layer(checkpoint, index)]
    if tensors:
        report["tensors"] = [
            {"name": name, "dtype": dtype_name(dtype), "shape": shape, "file": checkpoint.file_of(name).name}
            for name in checkpoint.names
            for dtype, shape in (checkpoint.dtype_shape(name),)
        ]
    return report


def _sizes(checkpoint: Any) -> list[dict[str, Any]]:
    """Tensors, bytes and weights by kind. Packed codes count two weights per byte, scales none, so that bits per weight include the scales."""
    from halfbyte.checkpoint.dialects import is_scale, may_be_codes

    rows = {kind: [0, 0, 0] for kind, _ in (*_KINDS, ("total", ""))}
    for name in checkpoint.names:
        dtype, shape, nbytes = checkpoint.info(name)
        packed = (not dtype.is_floating_point and may_be_codes(name)) or "float4" in str(dtype)
        weights = 0 if is_scale(name) else math.prod(shape) * (2 if packed else 1)
        for kind in (next(kind for kind, pattern in _KINDS if re.search(pattern, name)), "total"):
            rows[kind] = [old + new for old, new in zip(rows[kind], (1, nbytes, weights), strict=True)]
    return [
        {"kind": kind, "tensors": count, "bytes": size, "weights": weights, "bits_per_weight": round(8 * size / weights, 3) if weights else None}
        for kind, (count, size, weights) in rows.items()
        if count
    ]


def _render(report: dict[str, Any]) -> str:
    blocks = [_model(report), _sizes_table(report["sizes"])]
    if report["scales"]:
        blocks.append(_scales_table(report["scales"]))
    if "fp8_error" in report:
        from halfbyte.cli.fp8_error import render

        blocks.append([render(row) for row in report["fp8_error"]] or ["  no FP4 experts whose fp8 error could be measured"])
    if "tensors" in report:
        rows = [(tensor["name"], tensor["dtype"], list(tensor["shape"]), tensor["file"]) for tensor in report["tensors"]]
        blocks.append(_table(("tensor", "dtype", "shape", "file"), rows))
    blocks.append(_problems(report))
    return "\n\n".join("\n".join(block) for block in blocks)


def _model(report: dict[str, Any]) -> list[str]:
    from halfbyte.checkpoint.families import format_range

    moe, quantization = report["moe"], report["quantization"]
    routing, activation = moe["routing"], moe["activation"]
    routed = f"routing unknown (model_type {moe['family']!r} is not one halfbyte knows)"
    if moe["router_refusal"]:
        routed = f"router not one halfbyte computes: {moe['router_refusal']}"
    if routing:
        routed = f"top {routing['top_k']} by {routing['method']}"
    computed = activation["kind"] if activation else "activation unknown"
    behind = f" (and {format_range(moe['predicting_layers'])}, which predict further tokens)" if moe["predicting_layers"] else ""
    stored = printable(quantization["kind"]) + (f" {quantization['format'].upper()}" if quantization["format"] else "")
    return [
        printable(report["model"]),
        f"  {printable(moe['family'])}, {stored}",
        f"  {moe['num_layers']} layers, MoE in {format_range(moe['moe_layers'])}{behind}; {moe['num_experts']} experts, {routed}; "
        f"hidden {moe['hidden']}, expert intermediate {moe['intermediate']}, {computed}",
    ]


def _sizes_table(sizes: list[dict[str, Any]]) -> list[str]:
    rows = [(row["kind"], row["tensors"], f"{row['bytes'] / 2**20:.2f}", f"{row['weights']:,}", _number(row["bits_per_weight"])) for row in sizes]
    return _table(("kind", "tensors", "MiB", "weights", "bits/weight"), rows)


def _scales_table(scales: list[dict[str, Any]]) -> list[str]:
    header = ("layer", "projection", "blocks", "scale min", "median", "max", "zero", "saturated", "global scale", "input scale")
    rows = [
        (
            row["layer"],
            row["projection"],
            row["blocks"],
            *(_number(row[key]) for key in ("smallest", "median", "largest")),
            row["zero_blocks"],
            row["saturated_blocks"],
            *(_extent(row[key]) for key in ("global_scale", "input_scale")),
        )
        for row in scales
    ]
    return _table(header, rows)


def _problems(report: dict[str, Any]) -> list[str]:
    if report["problems"]:
        return [printable(f"{problem['severity']}: layer {problem['layer']}: {problem['message']}") for problem in report["problems"]]
    unread = report["quantization"]["format"] is None and not report["values_read"]
    return ["no problems found" + ("; values of experts in bf16 or fp8 were not looked at: --values does" if unread else "")]


def _table(header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> list[str]:
    """Columns as wide as their widest cell; text to the left, numbers to the right."""
    cells = [header, *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numeric = [all(row[column][:1].isdigit() or row[column] == "-" for row in cells[1:]) for column in range(len(header))]
    aligned = ([cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric, strict=True)] for row in cells)
    return ["  " + "  ".join(row).rstrip() for row in aligned]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _extent(extent: tuple[float, float] | None) -> str:
    if extent is None:
        return "-"
    return _number(extent[0]) if extent[0] == extent[1] else f"{_number(extent[0])}..{_number(extent[1])}"
