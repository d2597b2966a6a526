"""Run by test_pack_kernels.py under TRITON_INTERPRET=1: the kernels against the torch code, byte for byte, into memory that holds something else."""

import torch
from helpers import assert_equal_bits
from random_experts import make_experts

import halfbyte as hb
from halfbyte.experts import RELU2, SWIGLU, Activation
from halfbyte.weights.hopper import layout, pack_kernels
from halfbyte.weights.hopper.pack import pack, unpack


def check(
    num_experts: int, hidden: int, intermediate: int, format: hb.BlockFormat, activation: Activation, words_for: layout.WordsFor = "bf16"
) -> None:
    w = make_experts(num_experts, hidden, intermediate, format, activation)
    for q in (w.w13, w.w2):
        raw = q.scales.view(torch.uint8).flatten(1)
        raw[:, :0x7F:3] = torch.arange(0, 0x7F, 3, dtype=torch.uint8)[: raw.shape[1] // 3 + 1]  # zero, subnormal and largest scales
        raw[:, 1:9] = torch.arange(8, dtype=torch.uint8)
    expected = layout.allocate(w, "cpu", words_for)
    pack(w, expected)
    unpacked = unpack(expected)
    for name, order in (("w13", layout.w13_order(activation)), ("w2", "straight")):
        q, matrix, back = getattr(w, name), getattr(expected, name), getattr(unpacked, name)
        scales = q.scales.view(torch.uint8)
        words, scale_words, row_exponent = (torch.full_like(tensor, -1) for tensor in (matrix.words, matrix.scales, matrix.row_exponent))
        untouched = words.clone()
        pack_kernels.pack_matrix(q.codes, scales, words, scale_words, order, words_for, torch.ones((), dtype=torch.uint8))
        assert_equal_bits(words, untouched)
        pack_kernels.pack_matrix(q.codes, scales, words, scale_words, order, words_for, torch.zeros((), dtype=torch.uint8))
        refused = torch.zeros((), dtype=torch.uint8)
        for limit in (255, int(scales.max()), int(scales.max()) - 1):
            largest = pack_kernels.largest_of_rows(scales, limit, refused)
            assert_equal_bits(largest, scales.amax(2))
            assert refused == (limit < scales.max())
        pack_kernels.write_row_exponents(largest, row_exponent, order, nvfp4=format is hb.NVFP4)
        assert_equal_bits(words, matrix.words)
        assert_equal_bits(scale_words, matrix.scales)
        assert_equal_bits(row_exponent, matrix.row_exponent)
        codes, scale_bytes = torch.full_like(q.codes, 0x55), torch.full_like(scales, 0x55)
        pack_kernels.unpack_matrix(words, scale_words, codes, scale_bytes, order, words_for)
        assert_equal_bits(codes, back.codes)
        assert_equal_bits(scale_bytes, scales)


if __name__ == "__main__":
    for format in (hb.NVFP4, hb.MXFP4):
        for activation in (SWIGLU, RELU2):
            check(2, 160, 96, format, activation)
            check(1, 96, 288, format, activation, "fp8")
    check(1, 64, 48, hb.NVFP4, SWIGLU)
    check(1, 32, 704, hb.MXFP4, SWIGLU)
    check(3, 256, 64, hb.MXFP4, RELU2)
    print("ok")
