"""The bits of the Hopper layout in torch: codes to words, scale bytes to scale words, and back, rows in tile order. `layout.py` describes them."""

from __future__ import annotations

from typing import Literal

import torch

TILE = 64
TILES_PER_SCALE_WORD = 4


# The tensor cores that a word is soon decoded for; those of the other kind read it too.
WordsFor = Literal["bf16", "fp8"]


def pack_codes(codes: torch.Tensor, words: torch.Tensor, words_for: WordsFor) -> None:
    """uint8 [N, K/2] (low nibble = even column) to int32 words [N/64, K/64, 512], in lanes of 8 bytes: two words of a thread."""
    row_tiles, column_tiles, _ = words.shape
    to_words = _fp8_words_of_codes if words_for == "fp8" else _words_of_codes
    lanes = to_words(codes.view(torch.int64)).view(row_tiles, 4, 2, 8, column_tiles, 4)  # tile, w, h, g, column tile, t
    words.view(torch.int64).view(row_tiles, column_tiles, 4, 8, 4, 2).copy_(lanes.permute(0, 4, 1, 3, 5, 2))


def _words_of_codes(codes: torch.Tensor) -> torch.Tensor:
    """int64, two times eight codes in the order of their columns, to two words."""
    n = _swap(_swap(codes, 4, 0x00F000F0), 8, 0x0000FF00)  # even columns in the low half of each 32 bits, odd ones in the high half
    words = (n << 2).bitwise_and_(_twice(0x01DC01DC))
    words |= (n << 8).bitwise_and_(_twice(0x88008800))
    words |= (n >> 8).bitwise_and_(_twice(0x00010001))
    words |= (n << 6).bitwise_and_(_twice(0x00220000))
    words |= (n >> 26).bitwise_and_(_twice(0x00000022))
    return words.bitwise_or_(n.bitwise_and_(_twice(0x76007600)))


def _codes_of_words(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `_words_of_codes`."""
    n = (words >> 2).bitwise_and_(_twice(0x00770077))
    n |= (words >> 8).bitwise_and_(_twice(0x00880088))
    n |= (words << 8).bitwise_and_(_twice(0x01000100))
    n |= (words >> 6).bitwise_and_(_twice(0x00008800))
    n |= (words << 26).bitwise_and_(_twice(0x88000000))
    n |= words & _twice(0x76007600)
    return _swap(_swap(n, 8, 0x0000FF00), 4, 0x00F000F0)


def _fp8_words_of_codes(codes: torch.Tensor) -> torch.Tensor:
    n = _swap(_swap(codes, 4, 0x00F000F0), 8, 0x00FF0000)  # columns 0, 2, 1, 3 and 5, 7, 4, 6
    return _swap(_swap(n, 8, 0x00008800), 4, 0x00800080)  # the signs of the two halves in turns


def _codes_of_fp8_words(words: torch.Tensor) -> torch.Tensor:
    n = _swap(_swap(words, 4, 0x00800080), 8, 0x00008800)
    return _swap(_swap(n, 8, 0x00FF0000), 4, 0x00F000F0)


def _swap(lanes: torch.Tensor, distance: int, low: int) -> torch.Tensor:
    """Exchange the bits `low` of each 32 with those `distance` above them."""
    difference = (lanes >> distance).bitwise_xor_(lanes).bitwise_and_(_twice(low))
    return (difference << distance).bitwise_xor_(difference).bitwise_xor_(lanes)


def _twice(bits: int) -> int:
    """32 bits repeated in an int64."""
    return int.from_bytes(bits.to_bytes(4, "little") * 2, "little", signed=True)


def unpack_codes(words: torch.Tensor, words_for: WordsFor) -> torch.Tensor:
    """The inverse of `pack_codes`."""
    row_tiles, column_tiles, _ = words.shape
    to_codes = _codes_of_fp8_words if words_for == "fp8" else _codes_of_words
    lanes = to_codes(words.contiguous().view(torch.int64)).view(row_tiles, column_tiles, 4, 8, 4, 2)  # tile, column tile, w, g, t, h
    return lanes.permute(0, 2, 5, 3, 1, 4).reshape(row_tiles * TILE, column_tiles * 4).view(torch.uint8)


def pack_scales(raw: torch.Tensor, block: int) -> torch.Tensor:
    """uint8 [N, K/block] to int64 [N/64, ceil(K/256), 2048/block]."""
    (rows, columns), per_tile = raw.shape, TILE // block
    scale_words = -(-columns // (TILES_PER_SCALE_WORD * per_tile))
    b = torch.nn.functional.pad(raw, (0, scale_words * TILES_PER_SCALE_WORD * per_tile - columns)).to(torch.int16)
    b = b.view(rows // TILE, 4, 2, 8, scale_words, TILES_PER_SCALE_WORD, per_tile)  # tile, w, h, g, word, c, t
    b = (b[:, :, 0] | b[:, :, 1] << 8).permute(0, 3, 1, 2, 5, 4)  # tile, word, w, g, t, c
    return b.contiguous().view(torch.int64).reshape(rows // TILE, scale_words, 32 * per_tile)


def unpack_scales(scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_scales`, padding included: uint8 [N, 16 or 8 per scale word]."""
    row_tiles, scale_words, entries = scales.shape
    b = scales.contiguous().view(torch.uint8).view(row_tiles, scale_words, 4, 8, entries // 32, TILES_PER_SCALE_WORD, 2)
    return b.permute(0, 2, 6, 3, 1, 5, 4).reshape(row_tiles * TILE, -1)


def encode_nvfp4_scale(e4m3: torch.Tensor) -> torch.Tensor:
    """e4m3 bytes m >= 0 to (exponent + 21) << 3 | mantissa; zero stays zero. The four lines meet where subnormals double: at 1, 4 and 8."""
    m = e4m3.to(torch.int16)
    return torch.minimum(torch.minimum(m + 112, 2 * m + 104), torch.minimum(4 * m + 96, 96 * m)).to(torch.uint8)


def decode_nvfp4_scale(encoded: torch.Tensor) -> torch.Tensor:
    c = encoded.to(torch.int16)
    return torch.maximum(torch.maximum(c - 112, (c - 104) >> 1), torch.maximum((c - 96) >> 2, (c > 0).to(torch.int16))).to(torch.uint8)
