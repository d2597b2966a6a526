"""e4m3 weights of the Hopper layout: the kernel's own PTX, executed on the CPU, against plain torch; fragment order; rounding errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import assert_equal_bits
from ptx import run

import halfbyte as hb
from halfbyte.experts import RELU2, SWIGLU, Activation, ExpertWeights
from halfbyte.weights.hopper import layout, rounding_fp8
from halfbyte.weights.hopper.pack import pack

pytest.importorskip("triton")

from halfbyte.weights.hopper.dequant_fp8 import _assembly


def make_matrix(rows: int, columns: int, format: hb.BlockFormat, low: int, high: int) -> hb.QuantTensor:
    """Random codes; scale bytes from low to high, also where the first one of each row is 0."""
    random = torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(0, 256, (1, rows, columns // 2), dtype=torch.uint8, generator=random)
    scales = torch.randint(low, high, (1, rows, columns // format.block), dtype=torch.uint8, generator=random)
    scales[:, ::5, 0] = 0
    return hb.QuantTensor(codes, scales, torch.ones(1) if format is hb.NVFP4 else None, format)


def kernel_weights(matrix: layout.HopperMatrix, format: hb.BlockFormat, words_for: layout.WordsFor) -> torch.Tensor:
    """Decode expert 0 as the kernel does: fp32 [N, K] in tile row order, columns in natural order, times 2^j."""
    row_tiles, column_tiles = matrix.row_tiles, matrix.column_tiles
    thread = torch.arange(128)
    row = thread // 32 * 16 + thread % 32 // 4
    exponents = matrix.row_exponent[0].view(row_tiles, 64).int()
    low, high = exponents[:, row], exponents[:, row + 8]
    if format is hb.NVFP4:
        limits = [((8 * (low + 16)) & 0xFFFF) | (8 * (high + 16)) << 16] * 4 + [-8 * (low + (high << 16) + 14 * 0x10001)] * 4
    else:
        limits = [j + 122 for j in (low, low, high, high)]
        limits += [-8 * (j + 120) * ones + first for j in (low, high) for ones, first in ((0x01010100, 0x03FFF800), (0x01010101, 0x14100C08))]
    result = torch.empty(row_tiles * 64, column_tiles * 64)
    column = torch.tensor(layout.FRAGMENT_COLUMN_FP8)
    for tile in range(row_tiles):
        for k in range(column_tiles):
            words = matrix.words[0, tile, k].view(128, 4)
            entry = thread if format is hb.NVFP4 else thread // 2
            scale_word = matrix.scales[0, tile, k // 4][entry].contiguous().view(torch.int32).view(128, 2)[:, k % 4 // 2]
            beside_the_words = [*[scale_word.numpy()] * 4, *(tensor[tile].numpy() for tensor in limits)]
            registers = run(_assembly(2 * (k % 2), format is hb.NVFP4, words_for), ["r"] * 8, [*words.T.numpy(), *beside_the_words])
            for s in range(4):
                for h in range(2):
                    values = torch.from_numpy(registers[2 * s + h].view(np.uint8)).view(128, 4).view(torch.float8_e4m3fn).float()
                    for b in range(4):
                        slot = 16 * s + 4 * (thread % 4) + b
                        result[64 * tile + row + 8 * h, 64 * k + column[slot]] = values[:, b]
    return torch.ldexp(result, matrix.row_exponent[0].int().unsqueeze(1))


@pytest.mark.parametrize("words_for", ["bf16", "fp8"])
@pytest.mark.parametrize("activation", [SWIGLU, RELU2], ids=["gated", "plain"])
@pytest.mark.parametrize(
    ("format", "low", "high"),
    [(hb.NVFP4, 1, 0x7F), (hb.NVFP4, 0x60, 0x7F), (hb.NVFP4, 1, 4), (hb.MXFP4, 110, 125), (hb.MXFP4, 60, 254), (hb.MXFP4, 0, 8)],
)
def test_the_kernels_assembly_decodes_what_torch_rounds(
    format: hb.BlockFormat, low: int, high: int, activation: Activation, words_for: layout.WordsFor
) -> None:
    halves = activation.halves
    w13, w2 = make_matrix(halves * 96, 160, format, low, high), make_matrix(160, 96, format, low, high)
    w = ExpertWeights(w13, w2, activation)
    packed = layout.allocate(w, "cpu", words_for)
    pack(w, packed)
    for matrix, expected, order in ((packed.w13, w13, layout.w13_order(activation)), (packed.w2, w2, "straight")):
        rows = layout.source_rows(order, expected.shape[-2])
        decoded = kernel_weights(matrix, format, words_for)
        columns = expected.shape[-1]
        kept = rows >= 0
        assert torch.equal(decoded[kept][:, :columns], rounding_fp8.round_to_fp8(expected)[0][rows[kept]])  # -0 equals 0
        assert not decoded[~kept].any() and not decoded[:, columns:].any()


def test_the_slot_order_follows_the_fragments_of_the_instruction() -> None:
    """PTX ISA, wgmma m64nNk32 A fragment: register r of a thread t of a quad has row half r % 2, slots 16 (r // 2) + 4 t + b of each 32."""
    assert sorted(layout.FRAGMENT_COLUMN_FP8) == list(range(64))
    for slot, column in enumerate(layout.FRAGMENT_COLUMN_FP8):
        assert column // 16 == slot // 4 % 4  # a thread's slots are its own 16 columns
        assert column % 16 // 4 == slot // 16  # and a register's are four neighbours
    assert layout.FRAGMENT_COLUMN_FP8[:4] == (0, 2, 1, 3) and layout.FRAGMENT_COLUMN_FP8[16:20] == (5, 7, 4, 6)


@pytest.mark.parametrize(("span", "rows"), [(11, 0), (12, 32), (40, 32)])
def test_mxfp4_is_exact_up_to_eleven_octaves(span: int, rows: int) -> None:
    codes = torch.full((1, 64, 32), 0x71, dtype=torch.uint8)  # 0.5 and 6
    scales = torch.full((1, 64, 2), 120, dtype=torch.uint8)
    scales[..., 1] = 120 - span
    q = hb.QuantTensor(codes, scales, None, hb.MXFP4)
    w = ExpertWeights(replace(q, codes=codes[:, :32], scales=scales[:, :32]), replace(q, codes=codes[..., :16], scales=scales[..., :1]), RELU2)
    errors = rounding_fp8.weight_error(w)
    assert errors["w13"].rows == rows and errors["w13"].total_rows == 32
    assert (errors["w2"].rows, errors["w2"].total_rows, errors["w2"].relative) == (0, 64, 0.0)
    bound = 64**0.5 * 2**-11
    assert (errors["w13"].relative == 0) if rows == 0 else (0 < errors["w13"].relative < bound)


def test_nvfp4_rounds_only_magnitudes_with_two_bits() -> None:
    w = hb.quantize(torch.randn(1, 256, 512, generator=torch.Generator().manual_seed(0)), hb.NVFP4)
    exact, rounded = w.dequantize(), rounding_fp8.round_to_fp8(w)
    magnitude = w.codes.view(1, 256, 256, 1).expand(1, 256, 256, 2).clone()
    magnitude[..., 1] >>= 4
    one_bit = torch.isin(magnitude.flatten(-2) & 7, torch.tensor([0, 1, 2, 4, 6], dtype=torch.uint8))
    assert_equal_bits(rounded[one_bit].abs(), exact[one_bit].abs())
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 0.015 < error < 0.025
    measured = rounding_fp8.weight_error(ExpertWeights(w, replace(w, codes=w.codes.view(1, 512, 128), scales=w.scales.view(1, 512, 16)), RELU2))
    assert measured["w13"].relative == pytest.approx(error, rel=1e-4)


def test_a_table_of_every_scale_is_what_e4m3_rounds_to() -> None:
    """One row for each of the 126 scales above zero, alone in its row: 8 magnitudes, exact products rounded once to 4 significant bits."""
    bytes_ = torch.arange(1, 0x7F, dtype=torch.uint8)
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8).expand(126, 8)
    q = hb.QuantTensor(codes, bytes_.view(-1, 1), torch.tensor(1.0), hb.NVFP4)
    value = q.dequantize()
    mantissa, exponent = torch.frexp(value)
    away_from_zero = torch.copysign(torch.floor(mantissa.abs() * 16 + 0.5) / 16, value)
    assert torch.equal(rounding_fp8.round_to_fp8(q), torch.ldexp(away_from_zero, exponent))
