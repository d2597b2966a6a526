"""Files to canonical `ExpertWeights` and `RouterWeights`: outputs are preallocated and filled expert by expert from the mapped files."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from halfbyte.checkpoint.experts import ExpertWeights
from halfbyte.checkpoint.families import RoutingRule
from halfbyte.checkpoint.layer_tensors import DOWN, GATE, UP, LayerTensors
from halfbyte.checkpoint.problems import describe_scatter
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.errors import CheckpointError, InputError
from halfbyte.formats import BlockFormat, QuantTensor

_log = logging.getLogger("halfbyte")


@dataclass(frozen=True)
class RouterWeights:
    """The router of one MoE layer: logits = hidden @ weight.T (+ logit_bias), then `route(logits, ..., bias=correction_bias)` by `rule`.

    Attributes:
        weight: [E, H] in the file's dtype; compute the logits in fp32.
        rule: method name and parameters.
        logit_bias: [E], added to the logits (gpt-oss), or None.
        correction_bias: fp32 [E], added to the scores for selection only (DeepSeek-V3, GLM-4, DeepSeek-V4), or None.
        token_experts: int64 [vocabulary, k], the experts of every token id (DeepSeek-V4's first layers, which do not select), or None.
    """

    weight: torch.Tensor
    rule: RoutingRule
    logit_bias: torch.Tensor | None = None
    correction_bias: torch.Tensor | None = None
    token_experts: torch.Tensor | None = None


def load_experts(model: str | Path | Checkpoint, layer: int, device: torch.device | str = "cpu", *, experts: range | None = None) -> ExpertWeights:
    """Read the experts of one layer into canonical form, whatever the checkpoint's format and naming.

    Peak memory: the result, plus (for fp8-block sources only) one dequantised matrix; files are memory-mapped.

    Args:
        model: directory, Hub name `org/name`, or an open `Checkpoint`.
        layer: decoder layer index.
        device: where the result goes.
        experts: contiguous slice of the experts (expert parallel), all by default. Input scales always cover all of them.

    Raises:
        CheckpointError: a damaged or inconsistent checkpoint, a missing, NaN or non-positive scale, no experts in this layer.
        UnsupportedError: a family, quantisation or dtype halfbyte does not read.
        InputError: `experts` is not a contiguous slice of the layer's experts.

    >>> from pathlib import Path
    >>> w = load_experts(Path(halfbyte.__file__).parent / "demo_model", 0)
    >>> w.w13.shape, w.w2.shape
    (torch.Size([16, 256, 256]), torch.Size([16, 256, 128]))
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    tensors = LayerTensors(checkpoint, layer)
    moe = checkpoint.moe
    chosen = range(moe.num_experts) if experts is None else experts
    if chosen.step != 1 or not 0 <= chosen.start <= chosen.stop <= moe.num_experts:
        raise InputError("experts must be a contiguous slice of the layer's experts", given=experts, needed=f"within range(0, {moe.num_experts})")
    input_scales = tensors.input_scales()
    if input_scales is not None:
        for message in describe_scatter(input_scales):
            _log.warning("%s, layer %d: %s", checkpoint.path, layer, message)
    w13, w2 = _weights(tensors, chosen, torch.device(device))
    return ExpertWeights(
        w13,
        w2,
        moe.activation,
        _bias(tensors, chosen, (GATE, UP), device),
        _bias(tensors, chosen, (DOWN,), device),
        None if input_scales is None else input_scales[:, :2].contiguous().to(device),
        None if input_scales is None else input_scales[:, 2].contiguous().to(device),
        first_expert=chosen.start,
        num_global_experts=moe.num_experts,
    )


def load_router(model: str | Path | Checkpoint, layer: int, device: torch.device | str = "cpu") -> RouterWeights:
    """Read the router of one MoE layer.

    Raises:
        CheckpointError: no router, a wrong shape, or no MoE layer.

    >>> from pathlib import Path
    >>> router = load_router(Path(halfbyte.__file__).parent / "demo_model", 0)
    >>> router.weight.shape, router.rule.method, router.rule.top_k
    (torch.Size([16, 256]), 'renormalize', 4)
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    moe = checkpoint.moe
    block = moe.block_of(layer)
    gate = next((name for name in (f"{block}.gate", f"{block}.router") if f"{name}.weight" in checkpoint), f"{block}.gate")

    def read(name: str, *shape: int) -> torch.Tensor | None:
        if name not in checkpoint:
            return None
        dtype, given = checkpoint.dtype_shape(name)
        if given[: len(shape)] != shape or dtype.itemsize < 2:
            raise CheckpointError(
                f"router tensor {name} does not fit", where=str(checkpoint.file_of(name)), given=f"{dtype} {given}", needed=f"unquantised {shape}"
            )
        return checkpoint.read(name).to(device, copy=True)

    weight = read(f"{gate}.weight", moe.num_experts, moe.hidden)
    if weight is None:
        raise CheckpointError("no router", where=str(checkpoint.path), needed=f"{gate}.weight or {block}.router.weight")
    correction, bias = read(f"{gate}.e_score_correction_bias", moe.num_experts), read(f"{gate}.bias", moe.num_experts)
    if moe.routing.method == "deepseek_v4" and correction is None:
        correction, bias = bias, None  # its own files call the correction bias gate.bias
    correction = None if correction is None else correction.float()
    return RouterWeights(weight, moe.routing, bias, correction, read(f"{gate}.tid2eid"))


def _weights(tensors: LayerTensors, chosen: range, device: torch.device) -> tuple[QuantTensor, QuantTensor] | tuple[torch.Tensor, torch.Tensor]:
    hidden, intermediate = tensors.moe.hidden, tensors.moe.intermediate
    shape13, shape2 = (len(chosen), 2 * intermediate, hidden), (len(chosen), hidden, intermediate)
    place = {GATE: (0, slice(0, intermediate)), UP: (0, slice(intermediate, None)), DOWN: (1, slice(None))}
    if tensors.format is None:
        dense = tuple(torch.empty(shape, dtype=tensors.dense_dtype(), device=device) for shape in (shape13, shape2))
        for slot, expert in enumerate(chosen):
            for projection, (which, rows) in place.items():
                dense[which][slot, rows].copy_(tensors.dense(expert, projection))
        return dense[0], dense[1]
    scales = tensors.global_scales(chosen)
    scales = None if scales is None else scales.to(device)
    w13 = _empty(tensors.format, shape13, None if scales is None else scales[:, :2].contiguous(), device)
    w2 = _empty(tensors.format, shape2, None if scales is None else scales[:, 2].contiguous(), device)
    for slot, expert in enumerate(chosen):
        for projection, (which, rows) in place.items():
            target = (w13, w2)[which]
            target.codes[slot, rows].copy_(tensors.codes(expert, projection))
            target.scales.view(torch.uint8)[slot, rows].copy_(tensors.scales(expert, projection))
    return w13, w2


def _empty(format: BlockFormat, shape: tuple[int, int, int], global_scale: torch.Tensor | None, device: torch.device) -> QuantTensor:
    experts, rows, columns = shape
    codes = torch.empty(experts, rows, columns // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(experts, rows, columns // format.block, dtype=format.scale_dtype, device=device)
    return QuantTensor(codes, scales, global_scale, format)


def _bias(tensors: LayerTensors, chosen: range, projections: tuple[str, ...], device: torch.device | str) -> torch.Tensor | None:
    if not tensors.has_bias(projections[0]):
        return None
    parts = [torch.stack([tensors.bias(expert, projection) for expert in chosen]) for projection in projections]
    return torch.cat(parts, dim=1).to(device)
