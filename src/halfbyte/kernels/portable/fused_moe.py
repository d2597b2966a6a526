"""The mixture-of-experts layer on canonical FP4 weights, every GPU from sm_80 on: `grouped_gemm_w4a16` twice, between a sort and a sum in torch.

Defined by `kernels.reference.fused_moe`; activations in another format than "bf16" go through `encode_rows` before each product. Nothing waits for
the device, so a call can be captured in a CUDA graph, and no kernel is compiled for a number of tokens. Gradients reach weights; asking for hidden's
raises.

Memory beside the result: R rows of I elements in hidden's dtype and of H in fp32, and 12 bytes x T x H for the sum; R = T * k. With quantised
activations 2 bytes x T x H more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from halfbyte.errors import UnsupportedError
from halfbyte.experts import ExpertWeights
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.kernels.portable.gemm import choose_config, grouped_gemm_w4a16
from halfbyte.kernels.reference.fused_moe import combine
from halfbyte.kernels.shared.encode_rows import encode_rows


class DevicePermutation(NamedTuple):
    """Rows sorted by expert, every length known to the host: the slots whose expert is not held here come last and belong to no expert.

    `slot_of_row` int64 [T*k]: index into the flattened ids; `row_of_slot` int64 [T*k]: its inverse, -1 where the expert is not held here;
    `row_start` int32 [E+1]: expert e owns rows row_start[e] .. row_start[e+1].
    """

    slot_of_row: torch.Tensor
    row_of_slot: torch.Tensor
    row_start: torch.Tensor


def warm_up_calls(
    experts: ExpertWeights, top_k: int, max_tokens: int, activations: ActivationFormat, batch_invariant: bool
) -> list[tuple[list[int], dict[str, Any]]]:
    """See `kernels.table.KernelChoice`: the fewest tokens of each kernel, for real, because nothing else chooses it.

    >>> w = halfbyte.ExpertWeights(torch.zeros(8, 64, 32), torch.zeros(8, 32, 32))
    >>> warm_up_calls(w, 2, 1024, "bf16", False)
    [([1], {}), ([65], {}), ([513], {})]
    """
    fewest: dict[int, int] = {}
    for num_tokens in range(1, 2 if batch_invariant else max_tokens + 1):
        # Whatever the dtype and the activation function: for others the same numbers of rows, or less of them, make a difference.
        config = choose_config(num_tokens * top_k, experts.num_experts, gated=False, compute=torch.bfloat16)
        fewest.setdefault(config.block_m, num_tokens)
    return [([num_tokens], {}) for num_tokens in fewest.values()]


def fused_moe(
    hidden: torch.Tensor,
    experts: ExpertWeights,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    activations: ActivationFormat = "bf16",
    expert_offset: int = 0,
    out: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """hidden [T, H], ids int [T, k], weights float [T, k] to [T, H] of hidden's dtype (or out's); `moe.functional.fused_moe` checks the arguments."""
    assert activations == "bf16" or hidden.dtype != torch.float32, "the kernel table gives this kernel nothing else"
    permutation = sort_by_expert(ids, expert_offset, experts.num_experts)
    rows = _ExpertRows.apply(hidden, experts, permutation, ids.shape[1], activations, batch_invariant)
    result = combine(rows, weights, permutation.row_of_slot)
    return result.to(hidden.dtype) if out is None else out.copy_(result)


class _ExpertRows(torch.autograd.Function):
    """Run each row of `permutation` through its expert: fp32 [T*k, H]; rows of experts that are not held here are left unset."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        experts: ExpertWeights,
        permutation: DevicePermutation,
        top_k: int,
        activations: ActivationFormat,
        batch_invariant: bool,
    ) -> torch.Tensor:
        slot_of_row, _, row_start = permutation
        x, x_scale = encode_rows(hidden.contiguous(), activations, experts.w13_input_scale)
        h = torch.empty((len(slot_of_row), experts.intermediate), dtype=hidden.dtype, device=hidden.device)
        options: dict[str, Any] = {"slot_of_row": slot_of_row, "top_k": top_k, "batch_invariant": batch_invariant}
        grouped_gemm_w4a16(x, experts.w13, row_start, h, bias=experts.w13_bias, activation=experts.activation, x_scale=x_scale, **options)
        codes = None if activations == "bf16" else h.view(torch.bfloat16)
        h, h_scale = encode_rows(h, activations, experts.w2_input_scale, out=codes)
        rows = torch.empty((len(slot_of_row), experts.hidden), dtype=torch.float32, device=hidden.device)
        return grouped_gemm_w4a16(h, experts.w2, row_start, rows, bias=experts.w2_bias, x_scale=h_scale, batch_invariant=batch_invariant)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise UnsupportedError("the Triton kernel has no gradient", where="fused_moe", needed="backend='reference', which has")


def sort_by_expert(ids: torch.Tensor, expert_offset: int, num_experts: int) -> DevicePermutation:
    """`kernels.reference.fused_moe.sort_by_expert` without reading anything back to the host.

    >>> sort_by_expert(torch.tensor([[2, 0], [-1, 2]]), 0, 3).row_start.tolist()
    [0, 1, 1, 3]
    """
    local = ids.flatten().long() - expert_offset
    key, slot_of_row = torch.where((local >= 0) & (local < num_experts), local, num_experts).sort(stable=True)
    row_start = torch.searchsorted(key, torch.arange(num_experts + 1, device=ids.device), out_int32=True)
    row = torch.arange(len(key), device=ids.device)
    row_of_slot = torch.empty_like(slot_of_row).scatter_(0, slot_of_row, torch.where(row < row_start[-1], row, -1))
    return DevicePermutation(slot_of_row, row_of_slot, row_start)
