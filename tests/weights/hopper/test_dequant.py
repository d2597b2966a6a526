"""bf16 weights of the Hopper layout: the kernel's own PTX, executed on the CPU, against the codec. Nothing is rounded, so every bit must be there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx import run
from random_experts import make_experts

import halfbyte as hb
from halfbyte.experts import RELU2, SWIGLU, Activation
from halfbyte.weights.hopper import layout
from halfbyte.weights.hopper.pack import pack

pytest.importorskip("triton")

from halfbyte.weights.hopper.dequant_bf16 import _assembly


def kernel_weights(
    matrix: layout.HopperMatrix, format: hb.BlockFormat, words_for: layout.WordsFor, expert: int, spoil: tuple[str, str] = ("", ""), *,
    exchanged: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Decode an expert as the kernel does: fp64 [N, K] in tile row order, columns in natural order, times the multipliers.

    `exchanged`: the kernel decodes for an x whose pairs of odd steps are exchanged.
    """
    thread = torch.arange(128)
    row, column = thread // 32 * 16 + thread % 32 // 4, 16 * (thread % 4)
    result = torch.empty(matrix.row_tiles * 64, matrix.column_tiles * 64, dtype=torch.float64)
    for tile in range(matrix.row_tiles):
        for k in range(matrix.column_tiles):
            words = matrix.words[expert, tile, k].view(128, 4)
            entry = thread if format is hb.NVFP4 else thread // 2
            scale_word = matrix.scales[expert, tile, k // 4][entry].contiguous().view(torch.int32).view(128, 2)[:, k % 4 // 2]
            inputs = [*words.T.numpy(), *[scale_word.numpy()] * 4]
            if matrix.shift is not None:
                inputs += [np.array([int(matrix.shift[expert]) * 0x00800080 & 0xFFFFFFFF], np.uint32)] * 4
            registers = run(_assembly(2 * (k % 2), format is hb.NVFP4, words_for, exchanged).replace(*spoil), ["r"] * 16, inputs)
            for s in range(4):
                for p in range(2):
                    for h in range(2):
                        pair = torch.from_numpy(registers[4 * s + 2 * p + h].view(np.int16)).view(128, 2).view(torch.bfloat16).double()
                        for e in range(2):
                            place = 64 * k + column + 4 * s + 2 * p + (e ^ (exchanged and s % 2))
                            result[64 * tile + row + 8 * h, place] = pair[:, e] * matrix.multiplier[expert, h].double()
    return result


@pytest.mark.parametrize(("words_for", "exchanged"), [("bf16", False), ("fp8", False), ("fp8", True)])
@pytest.mark.parametrize("activation", [SWIGLU, RELU2], ids=["gated", "plain"])
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
def test_the_kernels_assembly_decodes_what_the_codec_does(
    format: hb.BlockFormat, activation: Activation, words_for: layout.WordsFor, exchanged: bool
) -> None:
    w = make_experts(2, 160, 96, format, activation)
    w.w13.scales.view(torch.uint8)[:, ::5, 1] = 0
    packed = layout.allocate(w, "cpu", words_for)
    pack(w, packed)
    for matrix, q, order in ((packed.w13, w.w13, layout.w13_order(activation)), (packed.w2, w.w2, "straight")):
        rows = layout.source_rows(order, q.shape[1])
        for expert in range(2):
            decoded, exact = kernel_weights(matrix, format, words_for, expert, exchanged=exchanged), q[expert].dequantize()
            kept = rows >= 0
            assert torch.equal(decoded[kept][:, : q.shape[2]].float(), exact[rows[kept]])  # -0 equals 0
            assert not decoded[~kept].any() and not decoded[:, q.shape[2] :].any()


def test_a_rotation_by_another_number_is_seen() -> None:
    w = make_experts(1, 64, 64, hb.NVFP4)
    packed = layout.allocate(w, "cpu")
    pack(w, packed)
    right = kernel_weights(packed.w2, hb.NVFP4, "bf16", 0)
    assert torch.equal(right.float(), w.w2[0].dequantize())
    assert not torch.equal(kernel_weights(packed.w2, hb.NVFP4, "bf16", 0, ("shl.b32 t, $17, 6", "shl.b32 t, $17, 5")), right)
