"""The Hopper layout byte by byte against index arithmetic in plain Python, and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import assert_equal_bits
from random_experts import make_experts

import halfbyte as hb
from halfbyte.errors import InputError
from halfbyte.experts import RELU2, SWIGLU, Activation, ExpertWeights
from halfbyte.weights.hopper import layout
from halfbyte.weights.hopper.pack import pack, unpack


def packed_hopper(w: ExpertWeights, words_for: layout.WordsFor = "bf16") -> layout.HopperExperts:
    out = layout.allocate(w, "cpu", words_for)
    pack(w, out)
    return out


def code_of_word(word: int, i: int, e: int) -> int:
    """What the kernel's masks and shifts make of a word: the sign and magnitude bits of one bf16 of one register."""
    right = {0: 28, 1: 0, 2: 2, 3: 6}[i]
    turned = (word >> right | word << (32 - right)) & (0x81808180 if i == 2 else 0x81C081C0)
    if i == 2:
        turned |= word << 6 & 0x00400040
    half = turned >> (16 * e) & 0xFFFF
    return half >> 15 << 3 | half >> 6 & 7


def code_of_fp8_word(word: int, i: int, e: int) -> int:
    """What selects a byte of the table, and the sign beside it: column 2 i + e is byte `place` of the first or second register."""
    place = (0, 2, 1, 3, 6, 4, 7, 5)[2 * i + e]
    sign = word << 4 >> 8 * place + 7 if place < 4 else word >> 8 * (place - 4) + 7
    return (sign & 1) << 3 | word >> 4 * place & 7


@pytest.mark.parametrize("words_for", ["bf16", "fp8"])
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
@pytest.mark.parametrize("activation", [SWIGLU, RELU2], ids=["gated", "plain"])
def test_every_code_and_scale_is_where_the_kernel_looks(format: hb.BlockFormat, activation: Activation, words_for: layout.WordsFor) -> None:
    w = make_experts(1, 160, 96, format, activation)
    packed = packed_hopper(w, words_for).w13
    decode = code_of_fp8_word if words_for == "fp8" else code_of_word
    slot_to_column = [16 * (slot // 2 % 4) + 4 * (slot // 16) + 2 * (slot // 8 % 2) + slot % 2 for slot in range(64)]
    words, scale_bytes = packed.words[0].tolist(), packed.scales[0].contiguous().view(torch.uint8).tolist()
    codes, scales = w.w13.codes[0].tolist(), w.w13.scales[0].view(torch.uint8).tolist()
    for tile in range(packed.row_tiles):
        for row in range(64):
            warp, h, g = row // 16, row % 16 // 8, row % 8
            if activation.gated:
                column = 64 * (tile % 2) + slot_to_column[32 * (tile // 2) + 8 * warp + g]  # 96 columns are two blocks of 64
                source = column + h * 96 if column < 96 else None
            else:
                column = 64 * tile + slot_to_column[row]
                source = column if column < 96 else None
            for k in range(192):
                t, q, i, e = k % 64 // 16, k % 16 // 8, k % 8 // 2, k % 2
                word = words[tile][k // 64][4 * (32 * warp + 4 * g + t) + 2 * h + q] & 0xFFFFFFFF
                given = 0 if source is None or k >= 160 else codes[source][k // 2] >> 4 * (k % 2) & 0xF
                assert decode(word, i, e) == given
                if source is not None and k < 160:
                    entry = 32 * warp + 4 * g + t if format is hb.NVFP4 else 16 * warp + 2 * g + t // 2
                    stored, original = scale_bytes[tile][0][8 * entry + 2 * (k // 64) + h], scales[source][k // format.block]
                    if format is hb.NVFP4:
                        value = torch.tensor(original, dtype=torch.uint8).view(torch.float8_e4m3fn).item()
                        assert 2.0 ** ((stored >> 3) - 21) * (1 + (stored & 7) / 8) == value
                    else:
                        assert stored == original


@pytest.mark.parametrize("words_for", ["bf16", "fp8"])
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
@pytest.mark.parametrize("activation", [SWIGLU, RELU2], ids=["gated", "plain"])
@pytest.mark.parametrize(("num_experts", "hidden", "intermediate"), [(1, 64, 64), (3, 160, 96), (2, 288, 1408), (7, 32, 32)])
def test_unpack_gives_everything_back(
    num_experts: int, hidden: int, intermediate: int, format: hb.BlockFormat, activation: Activation, words_for: layout.WordsFor
) -> None:
    w = make_experts(num_experts, hidden, intermediate, format, activation)
    back = unpack(packed_hopper(w, words_for))
    for name in ("w13", "w2"):
        ours, theirs = getattr(back, name), getattr(w, name)
        assert_equal_bits(ours.codes, theirs.codes)
        assert_equal_bits(ours.scales, theirs.scales)
        if format is hb.NVFP4:
            assert_equal_bits(ours.global_scale, theirs.global_scale)
        assert_equal_bits(getattr(back, f"{name}_bias"), getattr(w, f"{name}_bias"))


def test_experts_packed_in_slices_are_those_packed_at_once() -> None:
    w = make_experts(5, 96, 64, hb.MXFP4)
    out = layout.allocate(w, "cpu")
    for first, last in ((0, 2), (2, 5)):
        slice_ = {name: tensor[first:last] for name, tensor in w.tensors.items()}
        pack(w.with_tensors(slice_), out, first)
    for name, tensor in packed_hopper(w).tensors.items():
        assert_equal_bits(out.tensors[name], tensor)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("activation", [SWIGLU, RELU2], ids=["gated", "plain"])
def test_input_scales_of_all_experts_of_the_layer_are_kept(activation: Activation, in_place: bool) -> None:
    shapes = ((9, 2) if activation.gated else (9,), (9,))
    scales = dict(zip(("w13_input_scale", "w2_input_scale"), map(torch.rand, shapes), strict=True))
    w = replace(make_experts(3, 64, 64, hb.NVFP4, activation), first_expert=4, num_global_experts=9, **scales)
    kept = {name: scale.clone() for name, scale in scales.items()}
    back = hb.prepare(w, "hopper", in_place=in_place).unprepare()
    for name, scale in kept.items():
        assert_equal_bits(getattr(back, name), scale)
    assert (back.first_expert, back.num_global_experts) == (4, 9)
    packed = layout.allocate(replace(w, **kept), "cpu")
    pack(replace(make_experts(3, 64, 64, hb.NVFP4, activation), num_global_experts=9, **kept)[1:3], packed, 1)
    assert_equal_bits(packed.w13_input_scale, kept["w13_input_scale"])


def test_codes_under_a_zero_scale_become_zero() -> None:
    w = make_experts(1, 64, 64, hb.NVFP4)
    w.w2.scales.view(torch.uint8)[0, 3, 1] = 0
    back = unpack(packed_hopper(w)).w2
    assert not back.codes[0, 3, 8:16].any()
    assert torch.equal(back.dequantize(), w.w2.dequantize() + 0.0)  # + 0.0: codes of -0 become +0


def test_the_shift_of_mxfp4_brings_the_largest_scale_to_the_top() -> None:
    packed = packed_hopper(make_experts(2, 64, 64, hb.MXFP4))
    largest = packed.w13.scales.view(torch.uint8).flatten(1).amax(1).int()
    assert (largest + packed.w13.shift == 254).all()
    assert torch.equal(packed.w13.multiplier[:, 0], torch.exp2(126.0 - packed.w13.shift))


def test_a_format_that_was_copied_is_still_that_format() -> None:
    w = make_experts(1, 64, 64, hb.NVFP4)
    copied = replace(w, **{name: replace(getattr(w, name), format=replace(hb.NVFP4)) for name in ("w13", "w2")})
    assert_equal_bits(packed_hopper(copied).w13.scales, packed_hopper(w).w13.scales)


def test_bad_weights_are_refused() -> None:
    with pytest.raises(InputError, match="dense experts"):
        packed_hopper(ExpertWeights(torch.randn(2, 64, 64), torch.randn(2, 64, 32)))
    w = make_experts(1, 64, 64, hb.NVFP4)
    w.w13.scales.view(torch.uint8)[0, 0, 0] = 0x7F
    with pytest.raises(InputError, match="w13 has block scales that are negative or NaN"):
        packed_hopper(w)


@pytest.mark.parametrize("layout", ["hopper", "cutlass"])
def test_prepare_and_update_say_the_same_of_bad_scales(layout: str) -> None:
    good, bad = make_experts(2, 64, 64, hb.NVFP4), make_experts(2, 64, 64, hb.NVFP4)
    prepared = hb.prepare(good, layout)
    for spoil in (lambda: bad.w2.global_scale.fill_(torch.inf), lambda: bad.w13.scales.view(torch.uint8).fill_(0x80)):
        spoil()
        with pytest.raises(InputError) as of_prepare:
            hb.prepare(bad, layout)
        with pytest.raises(InputError) as of_update:
            prepared.update_(bad)
        assert str(of_prepare.value) == str(of_update.value) and "nothing was written" in str(of_update.value)


@pytest.mark.parametrize("offset", [4, 8])
def test_codes_at_any_address_are_packed(offset: int) -> None:
    w = make_experts(2, 64, 64, hb.NVFP4)
    buffer = torch.zeros(w.w13.codes.numel() + offset, dtype=torch.uint8)
    codes = buffer[offset:].view(w.w13.codes.shape).copy_(w.w13.codes)
    moved = hb.prepare(w.with_tensors({**w.tensors, "w13.codes": codes}), "hopper").storage
    assert_equal_bits(moved.w13.words, hb.prepare(w, "hopper").storage.w13.words)
    assert_equal_bits(codes, w.w13.codes)
