"""FlashInfer's two functions in plain torch, as their docstrings and launchers describe them: from the bytes and scalars that they are handed.

They check dtypes and shapes as the launchers do, undo the arrangement of rows and scales by FlashInfer's own definitions, decode, and compute in
fp64. `calls` collects what they were called with.
"""

from __future__ import annotations

import functools
from enum import IntEnum
from typing import Any

import torch

import halfbyte as hb
from halfbyte.formats import e2m1
from halfbyte.formats.activation_formats import round_trip
from halfbyte.kernels.reference.activation import activate

calls: list[dict[str, Any]] = []


class ActivationType(IntEnum):
    Swiglu = 3
    Geglu = 4
    Relu2 = 6


@functools.cache
def shuffled_rows(rows: int, gated: bool) -> list[int]:
    """out[new] = in[order[new]]: the halves interleaved (`reorder_rows_for_gated_act_gemm`), then shuffled in blocks of 32 (`shuffle_matrix_a`)."""
    interleaved = list(range(rows))
    if gated:
        for i in range(rows // 2):
            interleaved[2 * i], interleaved[2 * i + 1] = i, rows // 2 + i
    return [interleaved[new // 32 * 32 + 4 * (new % 8) + new % 32 // 8] for new in range(rows)]


def trtllm_fp4_block_scale_routed_moe(
    topk_ids: tuple[torch.Tensor, torch.Tensor], routing_bias: None, hidden_states: torch.Tensor, hidden_states_scale: torch.Tensor | None,
    gemm1_weights: torch.Tensor, gemm1_weights_scale: torch.Tensor, gemm1_bias: torch.Tensor | None, gemm1_alpha: torch.Tensor | None,
    gemm1_beta: torch.Tensor | None, gemm1_clamp_limit: torch.Tensor | None, gemm2_weights: torch.Tensor, gemm2_weights_scale: torch.Tensor,
    gemm2_bias: torch.Tensor | None, output1_scale_scalar: torch.Tensor | None, output1_scale_gate_scalar: torch.Tensor | None,
    output2_scale_scalar: torch.Tensor | None, num_experts: int, top_k: int, n_group: None, topk_group: None, intermediate_size: int,
    local_expert_offset: int, local_num_experts: int, routed_scaling_factor: None, routing_method_type: int, do_finalize: bool,
    activation_type: int, per_token_scale: torch.Tensor | None, output: torch.Tensor,
) -> list[torch.Tensor]:  # fmt: skip
    calls.append(locals())
    ids, weights = topk_ids
    num_tokens, padded_hidden = len(hidden_states), hidden_states.shape[1] * (2 if hidden_states.dtype == torch.uint8 else 1)
    gated = activation_type != ActivationType.Relu2
    rows = (2 if gated else 1) * intermediate_size
    block = 16 if rows * padded_hidden // gemm1_weights_scale[0].numel() <= 16 else 32
    assert ids.dtype == torch.int32 and weights.dtype == torch.bfloat16 and ids.shape == weights.shape == (num_tokens, top_k) and do_finalize
    assert gemm1_weights_scale.dtype == gemm2_weights_scale.dtype == torch.float8_e4m3fn
    assert gemm1_weights.shape == (local_num_experts, rows, padded_hidden // 2) and gemm1_weights.dtype == torch.uint8
    assert gemm2_weights.shape == (local_num_experts, padded_hidden, intermediate_size // 2) and gemm2_weights.dtype == torch.uint8
    assert local_expert_offset >= 0 and local_expert_offset + local_num_experts <= num_experts
    assert padded_hidden % 256 == 0 and intermediate_size % 128 == 0
    assert output.dtype == torch.bfloat16 and output.is_contiguous() and len(output) == num_tokens and output.shape[1] % 8 == 0
    scalars = (output1_scale_scalar, output1_scale_gate_scalar, output2_scale_scalar)
    assert (hidden_states.dtype == torch.uint8) == (block == 16) == (scalars[0] is not None)
    per_expert = (gemm1_alpha, gemm1_beta, gemm1_clamp_limit, *scalars, gemm1_bias, gemm2_bias)
    assert all(part is None or (part.dtype == torch.float32 and len(part) == local_num_experts) for part in per_expert)

    def dense(codes: torch.Tensor, scales: torch.Tensor, is_gated: bool) -> torch.Tensor:
        values = _decoded(codes, scales, block)
        return torch.empty_like(values).index_copy_(0, torch.tensor(shuffled_rows(len(values), is_gated)), values)

    def vector(part: torch.Tensor | None, expert: int, is_gated: bool) -> torch.Tensor | float:
        if part is None:
            return 0.0
        return torch.empty_like(part[expert]).index_copy_(0, torch.tensor(shuffled_rows(part.shape[1], is_gated)), part[expert]).double()

    x = _hidden(hidden_states, hidden_states_scale)
    if per_token_scale is not None:
        assert per_token_scale.dtype == torch.float32 and per_token_scale.shape == (num_tokens,)
        x = x * per_token_scale.double().unsqueeze(1)
    total = torch.zeros(num_tokens, padded_hidden, dtype=torch.float64)
    for expert in range(local_num_experts):
        token, slot = (ids == local_expert_offset + expert).nonzero(as_tuple=True)
        accumulator = x[token] @ dense(gemm1_weights[expert], gemm1_weights_scale[expert], gated).T + vector(gemm1_bias, expert, gated)
        limit, beta = _scalar(gemm1_clamp_limit, expert, torch.inf), _scalar(gemm1_beta, expert, 0.0)
        up, gate = accumulator.chunk(2, dim=1) if gated else (torch.ones((), dtype=torch.float64), accumulator)
        if gated:
            up, gate = up.clamp(-limit, limit) + beta, gate.clamp(max=limit)
        kinds = {ActivationType.Swiglu: "swiglu", ActivationType.Geglu: "geglu_tanh", ActivationType.Relu2: "relu2"}
        act = _act(gate * _scalar(output1_scale_gate_scalar, expert, 1.0), kinds[activation_type], _scalar(gemm1_alpha, expert, 1.0))
        h = _scalar(output1_scale_scalar, expert, 1.0) * up * act
        if hidden_states.dtype != torch.bfloat16:
            one = None if per_token_scale is not None else torch.ones(())
            h = round_trip(h.float(), "nvfp4" if block == 16 else "mxfp8", one).double()
        y = h @ dense(gemm2_weights[expert], gemm2_weights_scale[expert], False).T + vector(gemm2_bias, expert, False)
        total.index_add_(0, token, weights[token, slot].double().unsqueeze(1) * y * _scalar(output2_scale_scalar, expert, 1.0))
    output.copy_(total[:, : output.shape[1]])
    return [output]


def cutlass_fused_moe(
    input: torch.Tensor, token_selected_experts: torch.Tensor, token_final_scales: torch.Tensor, fc1_expert_weights: torch.Tensor,
    fc2_expert_weights: torch.Tensor, output_dtype: torch.dtype, quant_scales: list[torch.Tensor], fc1_expert_biases: torch.Tensor | None,
    fc2_expert_biases: torch.Tensor | None, input_sf: torch.Tensor, swiglu_alpha: torch.Tensor | None, swiglu_beta: torch.Tensor | None,
    swiglu_limit: torch.Tensor | None, ep_size: int, ep_rank: int, output: torch.Tensor, use_mxfp8_act_scaling: bool, activation_type: int,
    swizzled_input_sf: bool,
) -> torch.Tensor:  # fmt: skip
    calls.append(locals())
    assert fc1_expert_weights.dtype == fc2_expert_weights.dtype == torch.int64 and output_dtype == torch.bfloat16 and not swizzled_input_sf
    held, hidden, inter = len(fc2_expert_weights), fc2_expert_weights.shape[1], fc2_expert_weights.shape[2] * 16
    gated = activation_type != ActivationType.Relu2
    assert fc1_expert_weights.shape == (held, (2 if gated else 1) * inter, hidden // 16)
    assert token_selected_experts.dtype == torch.int32 and token_final_scales.dtype == torch.float32
    assert output.shape == (len(input), hidden) and output.dtype == torch.bfloat16 and 0 <= ep_rank < ep_size
    if use_mxfp8_act_scaling:
        assert input.dtype == torch.float8_e4m3fn and hidden % 128 == inter % 128 == 0
        block, (w13_scales, global13, w2_scales, global2) = 32, quant_scales
        act2 = torch.ones(held)
    else:
        assert input.dtype == torch.uint8 and hidden % 32 == 0
        block, (act13, w13_scales, global13, act2, w2_scales, global2) = 16, quant_scales
        assert act13.ndim == 0 and act13.dtype == act2.dtype == torch.float32 and act2.shape == (held,)
    assert w13_scales.dtype == w2_scales.dtype == torch.int32 and global13.shape == global2.shape == (held,)
    assert (fc1_expert_biases is None) == (fc2_expert_biases is None)
    for bias, weights in ((fc1_expert_biases, fc1_expert_weights), (fc2_expert_biases, fc2_expert_weights)):
        assert bias is None or (bias.dtype == torch.bfloat16 and bias.shape == weights.shape[:2])
    scale_dtype = torch.float8_e4m3fn if block == 16 else torch.uint8
    x = _hidden(input, input_sf)
    total = torch.zeros(len(input), hidden, dtype=torch.float64)
    for expert in range(held):
        token, slot = (token_selected_experts == ep_rank * held + expert).nonzero(as_tuple=True)
        w13 = _decoded(fc1_expert_weights[expert].view(torch.uint8), w13_scales[expert].view(scale_dtype), block)
        w2 = _decoded(fc2_expert_weights[expert].view(torch.uint8), w2_scales[expert].view(scale_dtype), block)
        y = x[token] @ w13.T * global13[expert].double() + (0.0 if fc1_expert_biases is None else fc1_expert_biases[expert].double())
        limit, beta = _scalar(swiglu_limit, expert, torch.inf), _scalar(swiglu_beta, expert, 0.0)
        kinds = {ActivationType.Swiglu: "swiglu", ActivationType.Geglu: "geglu", ActivationType.Relu2: "relu2"}
        if gated:
            linear, gate = y.chunk(2, dim=1)
            h = (linear.clamp(-limit, limit) + beta) * _act(gate.clamp(max=limit), kinds[activation_type], _scalar(swiglu_alpha, expert, 1.0))
        else:
            h = _act(y, kinds[activation_type], 1.0)
        h = round_trip((h * act2[expert].double()).float(), "nvfp4" if block == 16 else "mxfp8", torch.ones(())).double()
        y = h @ w2.T * global2[expert].double() + (0.0 if fc2_expert_biases is None else fc2_expert_biases[expert].double())
        total.index_add_(0, token, token_final_scales[token, slot].double().unsqueeze(1) * y)
    return output.copy_(total)


def _hidden(values: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """fp64 [T, H], without global scales."""
    if values.dtype == torch.bfloat16:
        assert scales is None
        return values.double()
    assert scales is not None and scales.element_size() == 1 and scales.is_contiguous() and values.is_contiguous()
    if values.dtype == torch.uint8:
        assert scales.shape == (len(values), values.shape[1] // 8)
        return hb.QuantTensor(values, scales.view(torch.float8_e4m3fn), torch.ones(()), hb.NVFP4).dequantize(torch.float64)
    assert scales.shape == (len(values), values.shape[1] // 32)
    return hb.Fp8Tensor(values, scales.view(torch.uint8), "mx").dequantize(torch.float64)


def _decoded(codes: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """One expert's matrix in fp64 from uint8 codes and scales in 128x4 tiles, without its global scale."""
    format = hb.NVFP4 if block == 16 else hb.MXFP4
    linear = hb.unswizzle_scales(scales.view(format.scale_dtype), "128x4", codes.shape[0], codes.shape[1] * 2 // block)
    values = e2m1.decode_packed(codes).double().unflatten(-1, (-1, block)) * format.decode_scales(linear).double().unsqueeze(-1)
    return values.flatten(-2)


def _scalar(part: torch.Tensor | None, expert: int, default: float) -> torch.Tensor | float:
    return default if part is None else part[expert].double()


def _act(x: torch.Tensor, kind: Any, alpha: torch.Tensor | float) -> torch.Tensor:
    """act(x), the gated ones with an up of 1."""
    activation = hb.Activation(kind, alpha=float(alpha))
    return activate(torch.cat([x, torch.ones_like(x)], dim=-1), activation) if activation.gated else activate(x, activation)
