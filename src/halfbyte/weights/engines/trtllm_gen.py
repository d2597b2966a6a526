"""The layout of the trtllm-gen kernels (sm_100, in FlashInfer and TensorRT-LLM): rows in the order in which a transposed MMA writes them.

`common.py` has the tensors. The order of rows, out[new] = in[old] (r a row of a block of 32, by new order):

    w2, and w13 without a gate    old = 32 b + 4 (r % 8) + r // 8
    w13 [up; gate] with a gate    old = h N/2 + 16 b + 2 i + p    where r = 16 p + 8 h + i: gate and up of a column lie 8 rows apart

Rows of scales move like rows of codes and then go into 128x4 tiles. This order is that of kernels whose epilogue tile is a multiple of 128, the only
ones that engines pick for FP4. Padding: H to 256 (512 without a gate, below which kernels that scale activations token by token read garbage), I to
128 (NVFP4) or 256 (MXFP4), each half on its own.

Scalars, with a13 and a2 the largest input scales of the whole layer and s the global scales of an expert's weights, all decoding:

    g1_alphas = a13 s_gate    g1_scale_c = a13 s_up / a2 (1 / a2 without a gate)    g2_alphas = a2 s_w2    w13_input_scale_quant = 1 / a13

The kernel computes g1_scale_c * (up + beta) * act(g1_alphas * gate), so gate and up have a scale each: exact when they differ. What is added to or
compared with an accumulator is in the accumulator's units: biases are divided by a13 s_gate, a13 s_up and a2 s_w2, beta by a13 s_up. The limit too,
but there is only one for both: where s_gate and s_up differ, no value is right, and `pack` refuses. MXFP4 has no global scales: all of them are 1.

Sources: FlashInfer 0.7.4 (`fused_moe/core.py`, `utils.py`), TensorRT-LLM's `BatchedGemmInterface.h` (bias, limit, beta), padding in vLLM and SGLang.
"""

from __future__ import annotations

import torch

from halfbyte.arguments import check_integers
from halfbyte.errors import InputError
from halfbyte.experts import Activation
from halfbyte.formats import NVFP4, BlockFormat
from halfbyte.weights.engines.common import Arrangement
from halfbyte.weights.engines.scalars import Multipliers, activation_scalars

BLOCK_ROWS = 32


def trtllm_gen_row_order(rows: int, gated: bool) -> torch.Tensor:
    """The permutation of a matrix's rows for trtllm-gen kernels, int64 [rows] on the CPU: out[new] = in[order[new]].

    Args:
        rows: of one expert's w13 or w2, a multiple of 32.
        gated: the matrix is a w13 [up; gate]: its halves are interleaved (they are *not* exchanged; checkpoints have [gate; up]).

    Raises:
        InputError: `rows` is not a multiple of 32.

    >>> halfbyte.trtllm_gen_row_order(64, gated=False)[:10].tolist()
    [0, 4, 8, 12, 16, 20, 24, 28, 1, 5]
    >>> halfbyte.trtllm_gen_row_order(64, gated=True)[:10].tolist()
    [0, 2, 4, 6, 8, 10, 12, 14, 32, 34]
    """
    check_integers("trtllm_gen_row_order", 0, rows=rows)
    if rows % BLOCK_ROWS:
        raise InputError("rows do not divide into blocks", where="trtllm_gen_row_order", given=rows, needed=f"a multiple of {BLOCK_ROWS}")
    old = torch.arange(rows, dtype=torch.int64)
    blocks = rows // BLOCK_ROWS
    if gated:
        return old.view(2, blocks, 8, 2).permute(1, 3, 0, 2).reshape(-1)  # h, b, i, p to b, p, h, i
    return old.view(blocks, 8, 4).transpose(1, 2).reshape(-1)


def _multiples(format: BlockFormat, gated: bool) -> tuple[int, int]:
    return 256 if gated else 512, 128 if format == NVFP4 else 256


def _rows(storage: torch.Tensor, halves: int) -> tuple[torch.Tensor, ...]:
    blocks = storage.shape[-2] // BLOCK_ROWS
    if halves == 1:
        return (storage.unflatten(-2, (blocks, 4, 8)).transpose(-3, -2),)
    up, gate = storage.unflatten(-2, (blocks, 2, 2, 8)).unbind(-3)  # b, p, h, i
    return gate.transpose(-3, -2), up.transpose(-3, -2)


def _scalars(m: Multipliers, activation: Activation) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    gate, up, down = m.w13_input * m.gate, m.w13_input * m.up, m.w2_input * m.w2
    scalars = {
        "w13_input_scale_quant": 1 / m.w13_input,
        "g1_alphas": gate,
        "g1_scale_c": (1 / m.w2_input) * (up if activation.gated else torch.ones_like(up)),
        "g2_alphas": down,
    }
    return scalars | activation_scalars(activation, limit_divisor=gate, beta_divisor=up), (gate, up, down)


TRTLLM_GEN = Arrangement("trtllm_gen", _multiples, _rows, _scalars)
