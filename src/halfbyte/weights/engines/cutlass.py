"""The layout of the CUTLASS grouped GEMMs (sm_100 and sm_120, in FlashInfer, vLLM and TensorRT-LLM): rows in order, w13 [up; gate].

`common.py` has the tensors. I is padded to 128, each half on its own, so that a tile of scales never has rows of both; H to the alignment of the
tensor memory accelerator's 4-bit rows, 32 (NVFP4) or 128 (MXFP4, which multiplies with 8-bit activations).

Scalars, with a13 and a2 the largest input scales of the whole layer and s the global scales of an expert's weights, all decoding:

    w13_input_scale_quant = 1 / a13    g1_alphas = a13 s_gate    w2_input_scale_quant = (1 / a2) (s_up / s_gate)    g2_alphas = a2 s_w2

The kernel multiplies both halves of an accumulator by the one g1_alphas, which is right for gate. Up, and so the product with the activated gate,
is too large by s_gate / s_up; w2_input_scale_quant, of which an engine takes one per expert, takes that out again before the product is quantised.
So differing scales cost nothing but the rounding of this ratio, and equal ones (ratio 1) not even that. Biases, beta and the limit are in units of
the dequantised values; the bias of up and beta are too large by the same ratio. The limit clamps gate and up alike: where s_gate and s_up differ, no
value is right, and `pack` refuses. MXFP4 has no global scales: all of them are 1.

Sources: FlashInfer's and TensorRT-LLM's `moe_gemm_kernels.h` (alignment of scales), `cutlass_fused_moe` (shapes, the scale per expert).
"""

from __future__ import annotations

import torch

from halfbyte.experts import Activation
from halfbyte.formats import NVFP4, BlockFormat
from halfbyte.weights.engines.common import Arrangement
from halfbyte.weights.engines.scalars import Multipliers, activation_scalars


def _multiples(format: BlockFormat, gated: bool) -> tuple[int, int]:
    return 32 if format == NVFP4 else 128, 128


def _rows(storage: torch.Tensor, halves: int) -> tuple[torch.Tensor, ...]:
    in_order = storage.unflatten(-2, (halves, storage.shape[-2] // (halves * 8), 8, 1))
    return tuple(reversed(in_order.unbind(-5)))


def _scalars(m: Multipliers, activation: Activation) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    ratio, one = m.up / m.gate, torch.ones_like(m.gate)
    scalars = {
        "w13_input_scale_quant": 1 / m.w13_input,
        "g1_alphas": m.w13_input * m.gate,
        "w2_input_scale_quant": (1 / m.w2_input) * ratio,
        "g2_alphas": m.w2_input * m.w2,
    }
    return scalars | activation_scalars(activation, limit_divisor=one, beta_divisor=ratio), (one, ratio, one)


CUTLASS = Arrangement("cutlass", _multiples, _rows, _scalars)
