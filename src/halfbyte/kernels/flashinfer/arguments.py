"""What FlashInfer's two functions are called with: prepared experts, hidden states and a routing as their keyword arguments.

| | `trtllm_fp4_block_scale_routed_moe` | `cutlass_fused_moe` |
|---|---|---|
| experts | layout "trtllm_gen" | layout "cutlass", codes viewed as int64 and scales as int32 |
| ids | of the whole layer, and the offset of those held here | counted from the first expert held here; others are nobody's |
| weights of the routing | bf16, which every release takes | fp32 |
| biases | fp32, either | bf16, both or none |
| columns of the output | H | H padded as the layout says |

Ids that name no expert held here, -1 too, contribute nothing in both. A token that names one expert twice is not for trtllm-gen: with few tokens its
routing kernel keeps one of the two.

Sources: docstrings and launchers of FlashInfer 0.6.12 and 0.7.4 (`fused_moe/core.py`, `trtllm_fused_moe_kernel_launcher.cu`,
`flashinfer_cutlass_fused_moe_binding.cu`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from halfbyte.errors import UnsupportedError
from halfbyte.formats import NVFP4
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.formats.block_format import nvfp4_decode_scale
from halfbyte.formats.fp8_tensor import Fp8Tensor
from halfbyte.kernels.quantizers.fp4 import run as quantize_fp4
from halfbyte.kernels.quantizers.fp8 import run as quantize_fp8
from halfbyte.kernels.reference.expert_rows import largest
from halfbyte.weights.engines.common import EngineExperts

PRECOMPUTED = 1  # a routing method that the function checks and does not use: ids and weights are given


class Rows(NamedTuple):
    """Hidden states of T tokens, their H padded as the layout says.

    Attributes:
        values: bf16 [T, H], e4m3 [T, H] (MXFP8) or uint8 [T, H/2] (NVFP4).
        scales: None, uint8 e8m0 [T, H/32] or e4m3 [T, H/16], one row after another.
        row_scale: fp32 [T], the global scales of NVFP4 rows where the experts are not calibrated.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None

    def of(self, tokens: slice) -> Rows:
        return Rows(self.values[tokens], *(None if part is None else part[tokens] for part in (self.scales, self.row_scale)))


def encode(hidden: torch.Tensor | Fp8Tensor, experts: EngineExperts, activations: ActivationFormat) -> Rows:
    """Hidden states, bf16 or MXFP8, in the format that the kernels multiply."""
    width = experts.padded_hidden
    if isinstance(hidden, Fp8Tensor):
        codes, scales = _widened(hidden.codes.view(torch.uint8), width), _widened(hidden.scales, width // 32)
        return Rows(codes.view(torch.float8_e4m3fn), scales)
    hidden = _widened(hidden, width)
    if activations == "bf16":
        return Rows(hidden)
    if activations == "mxfp8":
        mx = quantize_fp8(hidden, "mx")
        return Rows(mx.codes, mx.scales)
    calibrated = largest(experts.w13_input_scale)
    scale = nvfp4_decode_scale(hidden.abs().amax(dim=-1)) if calibrated is None else calibrated
    fp4 = quantize_fp4(hidden, NVFP4, scale)
    return Rows(fp4.codes, fp4.scales, scale if calibrated is None else None)


def check_scalars(experts: EngineExperts) -> None:
    """Raise UnsupportedError where a scale per token would change the unit of numbers that belong to the layer."""
    given = [name for name in ("w13_input_scale", "w2_input_scale") if getattr(experts, name) is not None]
    if experts.format != NVFP4 or len(given) == 2:
        return
    given += [name for name in ("w13_bias", "w2_bias", "gemm1_beta", "gemm1_clamp_limit") if getattr(experts, name) is not None]
    if given:
        raise UnsupportedError(
            "without input scales, activations get a scale per token, and these are in units of another",
            where="flashinfer fused_moe",
            given=", ".join(given),
            needed="w13_input_scale and w2_input_scale",
            next_step="quantise with calibration, or prepare(w, 'canonical')",
        )


def of_trtllm_gen(
    rows: Rows, experts: EngineExperts, topk_ids: torch.Tensor, topk_weights: torch.Tensor, expert_offset: int, output: torch.Tensor
) -> dict[str, Any]:
    """Keyword arguments of `trtllm_fp4_block_scale_routed_moe`, which writes to output bf16 [T, H].

    MXFP4 has no scales but those of its blocks: the three scalars stay out. FlashInfer takes the bytes of all block scales as e4m3.
    """
    held, scaled = experts.num_experts, experts.format == NVFP4

    def as_e4m3(scales: torch.Tensor | None) -> torch.Tensor | None:
        return None if scales is None else scales.view(torch.float8_e4m3fn)

    return {
        "topk_ids": (topk_ids.to(torch.int32), topk_weights.to(torch.bfloat16)),
        "routing_bias": None,
        "hidden_states": rows.values,
        "hidden_states_scale": as_e4m3(rows.scales),
        "gemm1_weights": experts.w13_codes,
        "gemm1_weights_scale": as_e4m3(experts.w13_scales),
        "gemm1_bias": experts.w13_bias,
        "gemm1_alpha": experts.gemm1_alpha,
        "gemm1_beta": experts.gemm1_beta,
        "gemm1_clamp_limit": experts.gemm1_clamp_limit,
        "gemm2_weights": experts.w2_codes,
        "gemm2_weights_scale": as_e4m3(experts.w2_scales),
        "gemm2_bias": experts.w2_bias,
        "output1_scale_scalar": experts.g1_scale_c if scaled else None,
        "output1_scale_gate_scalar": experts.g1_alphas if scaled else None,
        "output2_scale_scalar": experts.g2_alphas if scaled else None,
        "num_experts": max(experts.num_global_experts, expert_offset + held),
        "top_k": topk_ids.shape[1],
        "n_group": None,
        "topk_group": None,
        "intermediate_size": experts.padded_intermediate,
        "local_expert_offset": expert_offset,
        "local_num_experts": held,
        "routed_scaling_factor": None,
        "routing_method_type": PRECOMPUTED,
        "do_finalize": True,
        "per_token_scale": rows.row_scale,
        "output": output,
    }


def of_cutlass(
    rows: Rows, experts: EngineExperts, topk_ids: torch.Tensor, topk_weights: torch.Tensor, expert_offset: int, output: torch.Tensor
) -> dict[str, Any]:
    """Keyword arguments of `cutlass_fused_moe`, which writes to output bf16 [T, H padded].

    It knows only ranks of equally many experts. Ids are therefore counted from the first expert here, as if this were the first rank of as many as
    there must be: any offset is one.
    """
    held = experts.num_experts
    w13_scales, w2_scales = experts.w13_scales.view(torch.int32), experts.w2_scales.view(torch.int32)
    if experts.format == NVFP4:
        quant_scales = [
            experts.w13_input_scale_quant[0], w13_scales, experts.g1_alphas, experts.w2_input_scale_quant, w2_scales, experts.g2_alphas
        ]  # fmt: skip
    else:
        quant_scales = [w13_scales, experts.g1_alphas, w2_scales, experts.g2_alphas]
    w13_bias, w2_bias = _biases(experts)
    return {
        "input": rows.values,
        "token_selected_experts": (topk_ids - expert_offset).to(torch.int32),
        "token_final_scales": topk_weights.float(),
        "fc1_expert_weights": experts.w13_codes.view(torch.int64),
        "fc2_expert_weights": experts.w2_codes.view(torch.int64),
        "output_dtype": torch.bfloat16,
        "quant_scales": quant_scales,
        "fc1_expert_biases": w13_bias,
        "fc2_expert_biases": w2_bias,
        "input_sf": rows.scales,
        "swiglu_alpha": experts.gemm1_alpha,
        "swiglu_beta": experts.gemm1_beta,
        "swiglu_limit": experts.gemm1_clamp_limit,
        "ep_size": -(-max(experts.num_global_experts, expert_offset + held) // held),
        "ep_rank": 0,
        "output": output,
        "use_mxfp8_act_scaling": experts.format != NVFP4,
        "swizzled_input_sf": False,
    }


def _biases(experts: EngineExperts) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if experts.w13_bias is None and experts.w2_bias is None:
        return None, None

    def in_bf16(bias: torch.Tensor | None, codes: torch.Tensor) -> torch.Tensor:
        return torch.zeros(codes.shape[:2], dtype=torch.bfloat16, device=codes.device) if bias is None else bias.bfloat16()

    return in_bf16(experts.w13_bias, experts.w13_codes), in_bf16(experts.w2_bias, experts.w2_codes)


def _widened(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """[T, K] contiguous, with zeros up to `width` columns."""
    return F.pad(matrix, (0, width - matrix.shape[1])) if matrix.shape[1] < width else matrix.contiguous()
