"""`pack` and `unpack`: canonical experts to the Hopper layout (`layout.py`) and back, exactly.

What can be wrong with the experts is found first (`weights.checks`). Then one of two modules with the same functions does the work on whole
matrices, chosen once by the device: `pack_kernels` on a GPU, where `pack_in_place` takes over when the result lies in the weights' own memory, or
`pack_torch`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from halfbyte.device import Target
from halfbyte.experts import ExpertWeights
from halfbyte.formats import MXFP4, NVFP4, QuantTensor
from halfbyte.weights.checks import ScaleCheck, check_scales, fp4_matrices, has_unusable_scalars
from halfbyte.weights.hopper import pack_torch
from halfbyte.weights.hopper.bits import WordsFor
from halfbyte.weights.hopper.layout import (
    ELEMENT_EXPONENT,
    MAX_SHIFTED_EXPONENT,
    HopperExperts,
    HopperMatrix,
    RowOrder,
    nvfp4_factor,
    source_rows,
    w13_order,
)

BUFFER_BYTES = 32 << 20  # on a GPU, for weights from elsewhere; fits the L2 of an sm_90 GPU: what goes through it is read from there


class _Side(NamedTuple):
    """One matrix on its way, the bias that goes with it, and where both go."""

    matrix: QuantTensor
    bias: torch.Tensor | None
    order: RowOrder
    out: HopperMatrix


def pack(w: ExpertWeights, out: HopperExperts, first: int = 0, scale_check: ScaleCheck | None = None) -> None:
    """Arrange the experts of `w` in tiles and write them to the experts `first` and following of `out`.

    `w` may lie on another device than `out`, and `out` may lie in the storage of `w`, expert upon expert (`layout.REUSED`). On a GPU a kernel reads
    and writes every byte once; from another device, and in place on a GPU that is not sm_90, through a buffer of 32 MiB, or of one projection of one
    expert. Elsewhere, and without Triton, torch does the same; in place, and from another device, one expert at a time from a copy of one projection
    of it.

    Exact: `unpack` gives every value back, and every byte except codes under a zero scale, which become zero.

    `scale_check`, where given, gets the flag that says whether a scale is unusable; then the host does not wait for it.

    Raises:
        InputError: a scale is negative or not finite; nothing was written.
    """
    w13, w2 = fp4_matrices(w, "hopper")
    if w.num_experts:
        here = slice(first, first + w.num_experts)
        sides = _Side(w13, w.w13_bias, w13_order(w.activation), out.w13), _Side(w2, w.w2_bias, "straight", out.w2)
        refused = has_unusable_scalars(w).to(torch.uint8)
        largest = [_executor(w.device).largest_of_rows(*_raw_scales(side.matrix), refused) for side in sides]
        is_refused = _read_later(refused) if scale_check is None else None
        if scale_check is not None:
            scale_check(refused)
        pack_matrix = _pack_matrix_on_gpu if _has_kernels(out.device) else pack_torch.pack_matrix
        refused = refused.to(out.device)  # who packs looks at it and need not wait for the host
        for side in sides:
            codes, scales = side.matrix.codes, side.matrix.scales.view(torch.uint8)
            pack_matrix(codes, scales, side.out.words[here], side.out.scales[here], side.order, out.words_for, refused)
        if is_refused is not None and is_refused():
            check_scales(w)
        for side, of_rows in zip(sides, largest, strict=True):
            _pack_vectors(side, of_rows, here)
    for kept, scale in ((out.w13_input_scale, w.w13_input_scale), (out.w2_input_scale, w.w2_input_scale)):
        if kept is not None and scale is not None:
            kept.copy_(scale)


def unpack(experts: HopperExperts) -> ExpertWeights:
    """Give the canonical experts back: the inverse of `pack`."""
    order, rows = w13_order(experts.activation), experts.activation.halves * experts.intermediate
    w13, w13_bias = _unpack_matrix(experts.w13, experts, order, rows, experts.hidden)
    w2, w2_bias = _unpack_matrix(experts.w2, experts, "straight", experts.hidden, experts.intermediate)
    return ExpertWeights(
        w13,
        w2,
        experts.activation,
        w13_bias,
        w2_bias,
        experts.w13_input_scale,
        experts.w2_input_scale,
        experts.first_expert,
        experts.num_global_experts,
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and _has_triton()


def _executor(device: torch.device) -> ModuleType:
    """The module whose functions work on tensors of `device`."""
    if not _has_kernels(device):
        return pack_torch
    from halfbyte.weights.hopper import pack_kernels

    return pack_kernels


def _raw_scales(w: QuantTensor) -> tuple[torch.Tensor, int]:
    """Scale bytes uint8 [E, N, C] and the largest that is a number: negative scales and NaN have larger bytes."""
    return w.scales.view(torch.uint8).contiguous(), w.format.largest_scale_byte


def _read_later(flag: torch.Tensor) -> Callable[[], bool]:
    """What gives the value of a flag, uint8 [], for which the host waits when it is called, but not for what has been queued on the device since."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    copy, copied = torch.empty((), dtype=torch.uint8, pin_memory=True), torch.cuda.Event()
    copy.copy_(flag, non_blocking=True)
    copied.record(torch.cuda.current_stream(flag.device))

    def read() -> bool:
        copied.synchronize()
        return bool(copy)

    return read


def _pack_matrix_on_gpu(
    codes: torch.Tensor, scales: torch.Tensor, words: torch.Tensor, scale_words: torch.Tensor, order: RowOrder, words_for: WordsFor,
    refused: torch.Tensor,
) -> None:  # fmt: skip
    """As `pack_torch.pack_matrix`, on the device of `words`."""
    from halfbyte.weights.hopper.pack_kernels import pack_matrix

    sources = (codes, scales)
    if all(pack_torch.in_lanes(tensor, words.device) for tensor in sources):
        if not pack_torch.share_storage(sources, (words, scale_words)):
            pack_matrix(codes, scales, words, scale_words, order, words_for, refused)
            return
        target = Target.of(words.device)
        if target.arch == "sm_90":
            from halfbyte.weights.hopper.pack_in_place import pack_matrix_in_place

            pack_matrix_in_place(codes, scales, words, scale_words, order, words_for, refused, target.num_sms)
            return
    step = max(1, BUFFER_BYTES // (codes[0].nbytes + scales[0].nbytes))
    buffers = [torch.empty((min(step, len(codes)), *tensor.shape[1:]), dtype=torch.uint8, device=words.device) for tensor in sources]
    for expert in range(0, len(codes), step):
        batch = slice(expert, expert + step)
        staged_codes, staged_scales = (
            buffer[: len(tensor[batch])].copy_(tensor[batch], non_blocking=True) for buffer, tensor in zip(buffers, sources, strict=True)
        )
        pack_matrix(staged_codes, staged_scales, words[batch], scale_words[batch], order, words_for, refused)
    if codes.device.type == "cpu":
        torch.cuda.current_stream(words.device).synchronize()  # pinned memory may still be read, and is the caller's to change


def _pack_vectors(side: _Side, largest: torch.Tensor, here: slice) -> None:
    """What a row or an expert has one of. `largest`: uint8 [E, N], the largest scale byte of each row; `here`: the experts in `side.out`."""
    w, bias, order, out = side
    num_experts, device = w.codes.shape[0], out.words.device
    largest = largest.to(device)
    _executor(device).write_row_exponents(largest, out.row_exponent[here], order, nvfp4=w.format == NVFP4)
    if w.format == NVFP4:
        assert w.global_scale is not None
        out.multiplier[here] = (w.global_scale.view(num_experts, -1).expand(num_experts, 2) * nvfp4_factor()).to(device)
    else:
        assert out.shift is not None
        shift = (MAX_SHIFTED_EXPONENT - largest.amax(1).int()).clamp(max=MAX_SHIFTED_EXPONENT - 4)
        out.shift[here] = shift
        power_of_two = (127 - ELEMENT_EXPONENT - shift) << 23  # its bits in fp32
        out.multiplier[here] = power_of_two.view(torch.float32).unsqueeze(1)
    if bias is not None:
        assert out.bias is not None
        rows = source_rows(order, w.codes.shape[1]).to(device)
        out.bias[here] = pack_torch.in_order(bias.to(device).float().T, rows, num_experts).T


def _unpack_matrix(matrix: HopperMatrix, experts: HopperExperts, order: RowOrder, rows: int, columns: int) -> tuple[QuantTensor, torch.Tensor | None]:
    num_experts, device, format = experts.num_experts, experts.device, experts.format
    codes = torch.empty((num_experts, rows, columns // 2), dtype=torch.uint8, device=device)
    scales = torch.empty((num_experts, rows, columns // format.block), dtype=torch.uint8, device=device)
    _executor(device).unpack_matrix(matrix.words, matrix.scales, codes, scales, order, experts.words_for)
    bias = None
    if matrix.bias is not None:
        source = source_rows(order, rows).to(device)
        kept = source >= 0
        bias = matrix.bias.new_empty((num_experts, rows))
        bias[:, source[kept]] = matrix.bias[:, kept]
    if format == MXFP4:
        return QuantTensor(codes, scales, None, format), bias
    global_scale = (matrix.multiplier if order == "gate_up" else matrix.multiplier[:, 0]) / nvfp4_factor()
    return QuantTensor(codes, scales.view(torch.float8_e4m3fn), global_scale, format), bias
