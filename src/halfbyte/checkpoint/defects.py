"""What is wrong, or odd, with the experts of a checkpoint; and the scale statistics that show it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from halfbyte.arguments import check_type
from halfbyte.checkpoint.layer_tensors import LayerTensors
from halfbyte.checkpoint.projections import GATE, Projection
from halfbyte.checkpoint.router import load_router
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.errors import CheckpointError, UnsupportedError

# An input scale this many times above or below the median of its layer is no calibration result: an expert that calibration never reached.
SCATTER_LIMIT = 1000.0
READ_ALWAYS = 4_000_000_000  # a checkpoint of so many bytes is read whole in a few seconds
_MOST_LISTED = 12
T = TypeVar("T")


@dataclass(frozen=True)
class Defect:
    """An `error` keeps a layer from loading; a `warning` loads, but deserves a look."""

    severity: Literal["error", "warning"]
    layer: int
    message: str


@dataclass(frozen=True)
class ScaleStatistics:
    """The scales of one projection over all experts of a layer.

    Attributes:
        smallest, median, largest: of the non-zero block scales, without the global scale.
        zero_blocks, saturated_blocks: blocks whose scale is 0 (NVFP4 only), or the largest the format has.
        global_scale, input_scale: smallest and largest decode multiplier, or None.
    """

    projection: Projection
    blocks: int
    smallest: float
    median: float
    largest: float
    zero_blocks: int
    saturated_blocks: int
    global_scale: tuple[float, float] | None
    input_scale: tuple[float, float] | None


def find_defects(checkpoint: Checkpoint, values: bool | None = None) -> list[Defect]:
    """Examine every MoE layer, and those that predict further tokens: missing, misshapen and superfluous tensors; NaN, zero and scattered scales.

    Reads scales, biases and routers; of codes the headers, unless a global scale of 0 makes a matrix suspect of being pruned. Experts in bf16 or fp8
    are searched for NaN with `values`; None: where the checkpoint has at most `READ_ALWAYS` bytes.

    >>> from pathlib import Path
    >>> find_defects(Checkpoint.open(Path(halfbyte.__file__).parent / "demo_model"))
    []
    """
    check_type("find_defects", Checkpoint, checkpoint=checkpoint)
    return [defect for layer in checkpoint.moe.expert_layers for defect in examine_layer(checkpoint, layer, values)[1]]


def reads_values(checkpoint: Checkpoint, values: bool | None = None) -> bool:
    """Whether `find_defects` with these arguments reads experts in bf16 or fp8."""
    return checkpoint.nbytes <= READ_ALWAYS if values is None else values


def examine_layer(checkpoint: Checkpoint, layer: int, values: bool | None = None) -> tuple[list[ScaleStatistics], list[Defect]]:
    """Statistics of the scales of one layer (none for dense experts) and its defects; errors of a kind are counted, the first is told.

    `values` as in `find_defects`.

    Raises:
        CheckpointError: there is no such layer, or it has no routed experts.
    """
    moe = checkpoint.moe
    moe.block_of(layer)
    failures: list[str] = []

    def attempt(function: Callable[..., T], *arguments: object) -> T | None:
        try:
            return function(*arguments)
        except (CheckpointError, UnsupportedError) as error:
            failures.append(str(error))
            return None

    statistics: list[ScaleStatistics] = []
    warnings: list[str] = []
    attempt(moe.check_layer, layer)
    if moe.routing is not None:
        attempt(load_router, checkpoint, layer)
    tensors = attempt(LayerTensors, checkpoint, layer)
    if tensors is not None:
        attempt(tensors.check_all_used)
        experts = range(moe.num_experts)
        for projection in tensors.projections:
            for expert in experts:
                sound = attempt(tensors.check_matrix, expert, projection)
                if sound and tensors.format is None and reads_values(checkpoint, values):
                    attempt(tensors.dense, expert, projection)
                if tensors.has_bias(projection):
                    attempt(tensors.bias, expert, projection)
        if tensors.format is not None:
            global_scales, input_scales = attempt(tensors.global_scales, experts), attempt(tensors.input_scales)
            for column, projection in enumerate(tensors.projections):
                histogram = torch.zeros(256, dtype=torch.int64)
                for expert in experts:
                    scales = attempt(tensors.scales, expert, projection)
                    if scales is not None:
                        histogram += torch.bincount(scales.flatten(), minlength=256)
                if histogram.any():
                    statistics.append(_statistics(tensors, projection, histogram, _extent(global_scales, column), _extent(input_scales, column)))
            warnings = [f"all {s.projection} blocks have scale 0: these experts are zero" for s in statistics if s.zero_blocks == s.blocks]
            warnings += _describe_gate_up(global_scales) if GATE in tensors.projections else []
            warnings += describe_missing(tensors.missing_input_scales())
            warnings += [] if input_scales is None else describe_scatter(input_scales, tensors.projections)
    if moe.activation is None:
        warnings.append("the activation is unknown, so that these experts cannot be loaded: the model family is not one halfbyte knows")
    defects = [Defect("warning", layer, message) for message in warnings]
    if failures:
        more = f" (and {len(failures) - 1} more errors in this layer)" if len(failures) > 1 else ""
        defects.insert(0, Defect("error", layer, failures[0] + more))
    return statistics, defects


def describe_missing(names: list[str]) -> list[str]:
    """Describe input scales that some experts of a layer lack; `names` of their tensors."""
    if not names:
        return []
    listed = ", ".join(names[:_MOST_LISTED]) + (f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else "")
    return [
        f"missing input scales: {listed}; bf16 activations have no use for them, "
        "NVFP4 activations take the largest of the layer, or the row's own where there is none"
    ]


def describe_scatter(input_scales: torch.Tensor, projections: Sequence[Projection]) -> list[str]:
    """Describe the experts whose input scale is more than `SCATTER_LIMIT` times off the median; input_scales fp32 [E, projections]."""
    messages = []
    for column, projection in enumerate(projections):
        values = input_scales[:, column]
        median = values.median()
        outliers = ((values > median * SCATTER_LIMIT) | (values < median / SCATTER_LIMIT)).nonzero().flatten().tolist()
        if outliers:
            worst = max(outliers, key=lambda expert: abs(float((values[expert] / median).log())))
            messages.append(
                f"{projection} input scales of {len(outliers)} of {len(values)} experts are over {SCATTER_LIMIT:g} times off the median "
                f"{float(median):.3g}, the worst {float(values[worst]):.3g} of expert {worst}; calibration hardly reached them"
            )
    return messages


def _describe_gate_up(global_scales: torch.Tensor | None) -> list[str]:
    if global_scales is None:
        return []
    ratio = (global_scales[:, 0] / global_scales[:, 1]).log().abs().exp()
    different = int((global_scales[:, 0] != global_scales[:, 1]).sum())
    if not different:
        return []
    return [
        f"gate and up have different global scales in {different} of {len(ratio)} experts, by up to {float(ratio.max()):.3g} times; "
        "halfbyte keeps both, engines that keep one are wrong by that much"
    ]


def _extent(scales: torch.Tensor | None, column: int) -> tuple[float, float] | None:
    if scales is None or scales[:, column].isnan().any():
        return None
    return scales[:, column].min().item(), scales[:, column].max().item()


def _statistics(
    tensors: LayerTensors,
    projection: Projection,
    histogram: torch.Tensor,
    global_scale: tuple[float, float] | None,
    input_scale: tuple[float, float] | None,
) -> ScaleStatistics:
    """Everything from the counts of the 256 scale bytes, which are in the order of their values."""
    assert tensors.format
    blocks = int(histogram.sum())
    zero_blocks = int(histogram[0]) if tensors.format.has_global_scale else 0  # e8m0 byte 0 is 2^-127, not 0
    nonzero = histogram.clone()
    nonzero[0] -= zero_blocks
    used = nonzero.nonzero().flatten()
    values = tensors.format.decode_scales(torch.arange(256, dtype=torch.uint8))
    middle = int((nonzero.cumsum(0) >= (int(nonzero.sum()) + 1) // 2).nonzero()[0]) if len(used) else 0
    smallest, largest = (float(values[used[0]]), float(values[used[-1]])) if len(used) else (0.0, 0.0)
    saturated = int(histogram[tensors.format.largest_scale_byte])
    return ScaleStatistics(projection, blocks, smallest, float(values[middle]), largest, zero_blocks, saturated, global_scale, input_scale)
