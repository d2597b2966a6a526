"""The bits of the Hopper layout in torch: codes to words, scale bytes to scale words, and back, rows in tile order. `hopper.py` describes them."""

from __future__ import annotations

import torch

TILE = 64
TILES_PER_SCALE_WORD = 4


def pack_codes(codes: torch.Tensor, words: torch.Tensor) -> None:
    """uint8 [N, K/2] (low nibble = even column) to int32 words [N/64, K/64, 512], in lanes of 8 bytes: the four words of a thread."""
    row_tiles, column_tiles, _ = words.shape
    lanes = codes.view(torch.int64).view(row_tiles, 4, 2, 8, 4 * column_tiles)  # tile, w, h, g, column tile and t
    halves = words.view(torch.int16).view(row_tiles, column_tiles, 32, 16, 2)  # tile, column tile, w and g, t and s, half of the word
    first, second = lanes[:, :, 0], lanes[:, :, 1]
    even = ((first & _LOW_NIBBLES) << 4).bitwise_or_(second & _LOW_NIBBLES)
    odd = ((first >> 4) & _LOW_NIBBLES).bitwise_left_shift_(4).bitwise_or_((second >> 4) & _LOW_NIBBLES)
    for half, (this, other) in enumerate(((even, odd), (odd, even))):
        half_words = _half_words_of_nibbles(this, other).view(torch.int16).view(row_tiles, 32, column_tiles, 16)
        halves[..., half] = half_words.transpose(1, 2)


def _half_words_of_nibbles(this: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Halves of words, 16 bits each, four in an int64: the low ones for the codes of even columns in `this` and of odd columns in `other`, the high
    ones the other way round.

    Of 16 bits, 0-7 have p = 0 and 8-15 have p = 1; in each, 0-3 are the code of row half h = 1, 4-7 that of h = 0.
    """
    half = (this << 8).bitwise_and_(_four_times(0x8800))
    half |= (this << 2).bitwise_and_(_four_times(0x01DC))
    half |= (this & _four_times(0x8000)).bitwise_or_(other & _four_times(0x0800)).bitwise_right_shift_(10).bitwise_and_(_four_times(0x0022))
    half |= (this >> 8).bitwise_and_(_four_times(0x0001))
    half |= this & _four_times(0x0600)
    half |= other & _four_times(0x7000)
    return half


def _four_times(bits: int) -> int:
    """16 bits repeated in an int64."""
    return int.from_bytes(bits.to_bytes(2, "little") * 4, "little", signed=True)


_LOW_NIBBLES = _four_times(0x0F0F)


def unpack_codes(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_codes`."""
    row_tiles, column_tiles, _ = words.shape
    nibbles = ((words >> 8) & 0x00880088) | ((words >> 2) & 0x00770077) | ((words << 10) & -0x7FFF8000) | (words & 0x06000600)
    nibbles |= ((words << 8) & 0x01000100) | ((words >> 16) & 0x00007000) | ((words << 16) & 0x70000000)
    nibbles |= ((words >> 6) & 0x00000800) | ((words << 26) & 0x08000000)
    even, odd = nibbles & 0xFFFF, (nibbles >> 16) & 0xFFFF
    first, second = ((even >> 4) & 0x0F0F) | (odd & 0xF0F0), (even & 0x0F0F) | ((odd << 4) & 0xF0F0)
    b = torch.stack((first, second), dim=-1).to(torch.int16).view(row_tiles, column_tiles, 4, 8, 16, 2)  # tile, column tile, w, g, t and s, h
    return b.permute(0, 2, 5, 3, 1, 4).reshape(row_tiles * TILE, column_tiles * 16).view(torch.uint8)


def pack_scales(raw: torch.Tensor, block: int) -> torch.Tensor:
    """uint8 [N, K/block] to int64 [N/64, ceil(K/256), 2048/block]."""
    (rows, columns), per_tile = raw.shape, TILE // block
    scale_words = -(-columns // (TILES_PER_SCALE_WORD * per_tile))
    b = torch.nn.functional.pad(raw, (0, scale_words * TILES_PER_SCALE_WORD * per_tile - columns)).to(torch.int16)
    b = b.view(rows // TILE, 4, 2, 8, scale_words, TILES_PER_SCALE_WORD, per_tile)  # tile, w, h, g, word, c, t
    b = (b[:, :, 0] | b[:, :, 1] << 8).permute(0, 3, 1, 2, 5, 4)  # tile, word, w, g, t, c
    return b.contiguous().view(torch.int64).reshape(rows // TILE, scale_words, 32 * per_tile)


def unpack_scales(scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_scales`, padding included: uint8 [N, 16 or 8 a scale word]."""
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
