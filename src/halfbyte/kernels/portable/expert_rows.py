"""Both products of the layer on canonical FP4 weights, every GPU from sm_80 on: `gemm` twice. Rows fp32 [T * k, H] in the order of a work list.

Defined by `kernels.reference.expert_rows`; activations in another format than "bf16" go through `encode_rows` before each product, hidden states that
arrive quantised through `decode_rows`. Nothing waits for the device, so a call can be captured in a CUDA graph, and no kernel is compiled for a
number of tokens. Asking for a gradient of hidden raises.

Memory beside the result: R rows of I elements in hidden's dtype; with quantised activations 2 bytes x T x H more.
"""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.arguments import dense_rows
from halfbyte.device import Target
from halfbyte.errors import UnsupportedError
from halfbyte.experts import ExpertWeights
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.kernels.portable.gemm import Config, choose_config, configs, grouped_gemm_w4a16
from halfbyte.kernels.problem import Hidden, Problem, Size, Support, layer_problem, needs_capability
from halfbyte.kernels.shared.decode_rows import decode_rows
from halfbyte.kernels.shared.encode_rows import encode_rows
from halfbyte.kernels.work_list import WorkList

__all__ = ["choose_config", "configs", "run", "supports"]  # what the table reads


def supports(problem: Problem) -> Support:
    if problem.layout != "canonical":
        return Support.no(f"reads layout 'canonical', the weights are in {problem.layout!r}")
    if problem.format is None:
        return Support.no("reads NVFP4 and MXFP4 weights, these are dense")
    if problem.activations != "bf16" and problem.dtype == torch.float32 and problem.quantized is None:
        return Support.no(f"quantises activations of bfloat16 and float16 to {problem.activations!r}, these are float32")
    instead = "the portable Triton kernel runs instead; on sm_90, prepare(w, layout='hopper') is what the fast kernel needs"
    return needs_capability(problem.target, 80) or Support.slow(instead)


def run(
    hidden: Hidden,
    experts: ExpertWeights,
    work: WorkList,
    *,
    activations: ActivationFormat = "bf16",
    config: Config | None = None,
) -> torch.Tensor:
    """hidden [T, H] to rows fp32 [T * k, H]; those of slots whose expert is not held here are left unset. `work` has a row_start."""
    assert activations == "bf16" or not isinstance(hidden, torch.Tensor) or hidden.dtype != torch.float32, "the table gives this kernel nothing else"
    if config is None:
        problem = layer_problem("expert_rows", experts, Target.of(experts.device), "canonical", activations, hidden)
        config = choose_config(problem, Size(work.row_of_slot.shape[0]))
    return _ExpertRows.apply(hidden, experts, work, activations, config)


class _ExpertRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Hidden,
        experts: ExpertWeights,
        work: WorkList,
        activations: ActivationFormat,
        config: Config,
    ) -> torch.Tensor:
        num_rows, device = work.row_of_slot.shape[0], experts.device
        if isinstance(hidden, torch.Tensor):
            dtype = hidden.dtype
            x, x_scale = encode_rows(dense_rows(hidden), activations, experts.w13_input_scale)
        else:
            dtype = torch.bfloat16
            x, x_scale = decode_rows(hidden)
        h = torch.empty((num_rows, experts.intermediate), dtype=dtype, device=device)
        options: dict[str, Any] = {"token_of_row": work.token_of_row, "bias": experts.w13_bias, "activation": experts.activation}
        grouped_gemm_w4a16(x, experts.w13, work.row_start, h, config=config, x_scale=x_scale, **options)
        codes = None if activations == "bf16" else h.view(torch.bfloat16)
        h, h_scale = encode_rows(h, activations, experts.w2_input_scale, out=codes)
        rows = torch.empty((num_rows, experts.hidden), dtype=torch.float32, device=device)
        return grouped_gemm_w4a16(h, experts.w2, work.row_start, rows, config=config, bias=experts.w2_bias, x_scale=h_scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise UnsupportedError("the Triton kernel has no gradient", where="fused_moe", needed="backend='reference', which has")
