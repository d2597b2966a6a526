"""The Hopper layout packed in the two ways that `prepare` is measured against. Written from the layout's description, not from its code.

naive   what the first public packers for FP4 engines did: for every tensor of every expert the row permutation anew, in a Python loop; the results in
        lists, stacked at the end
torch   the same arithmetic with the permutation computed once, into storage allocated before
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from halfbyte.experts import ExpertWeights
from halfbyte.formats import NVFP4, QuantTensor
from halfbyte.weights.hopper.layout import HopperExperts, HopperMatrix, allocate

_TILE = 64


def naive_hopper(w: ExpertWeights) -> HopperExperts:
    """Pack, the slow way."""
    described = allocate(w, "meta")
    return described.with_tensors({f"{side}.{name}": tensor for side in ("w13", "w2") for name, tensor in _naive_matrix(w, side, described).items()})


def torch_hopper(w: ExpertWeights) -> HopperExperts:
    """Pack with vectorised torch, one expert at a time."""
    out = allocate(w, w.device)
    for side, q, matrix in _sides(w, out):
        rows = torch.tensor([_source_row(w, side, row) for row in range(matrix.row_tiles * _TILE)], dtype=torch.int64, device=w.device)
        for expert in range(w.num_experts):
            matrix.words[expert] = _words(q, _padded(q.codes[expert], rows), _padded(_raw(q)[expert], rows))
            matrix.scales[expert] = _scale_words(q, _padded(_raw(q)[expert], rows))
        for name, tensor in _factors(w, side, rows).items():
            matrix.tensors[name].copy_(tensor)
    return out


def _naive_matrix(w: ExpertWeights, side: str, described: HopperExperts) -> dict[str, torch.Tensor]:
    q, row_tiles = getattr(w, side), getattr(described, side).row_tiles

    def permutation() -> torch.Tensor:
        rows = torch.empty(row_tiles * _TILE, dtype=torch.long)
        for row in range(len(rows)):
            rows[row] = _source_row(w, side, row)
        return rows.to(w.device)

    words, scales = [], []
    for expert in range(w.num_experts):
        codes = _padded(q.codes[expert], permutation())
        raw = _padded(_raw(q)[expert], permutation())
        words.append(_words(q, codes, raw))
        scales.append(_scale_words(q, raw))
    return {"words": torch.stack(words), "scales": torch.stack(scales), **_factors(w, side, permutation())}


def _sides(w: ExpertWeights, out: HopperExperts) -> Iterator[tuple[str, QuantTensor, HopperMatrix]]:
    for side in ("w13", "w2"):
        yield side, getattr(w, side), getattr(out, side)


def _raw(q: QuantTensor) -> torch.Tensor:
    return q.scales.view(torch.uint8)


def _source_row(w: ExpertWeights, side: str, row: int) -> int:
    """The row of the canonical matrix that a row of a tile is, -1 for padding."""
    tile, inside = divmod(row, _TILE)
    if side == "w2":
        return row if row < w.hidden else -1
    warp, half, g = inside // 16, inside % 16 // 8, inside % 8
    column_blocks = -(-w.intermediate // _TILE)  # of gated experts each has a tile in the first half of the tiles and one in the second
    slot = 32 * (tile // column_blocks) + 8 * warp + g if w.activation.gated else inside
    column = 16 * (slot // 2 % 4) + 4 * (slot // 16) + 2 * (slot // 8 % 2) + slot % 2
    column += _TILE * (tile % column_blocks)
    if column >= w.intermediate:
        return -1
    return column + half * w.intermediate if w.activation.gated else column


def _padded(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of a matrix in the order of the tiles."""
    return torch.where((rows < 0)[:, None], 0, matrix[rows.clamp(min=0)])


def _words(q: QuantTensor, codes: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    """Codes [N, K/2] and scale bytes [N, K/block], rows in order, to words [N/64, K/64, 512]."""
    if q.format == NVFP4:
        codes = torch.where((raw == 0).repeat_interleave(8, dim=1), 0, codes)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 32))
    row_tiles, column_tiles = codes.shape[0] // _TILE, codes.shape[1] // 32
    b = codes.view(row_tiles, 4, 2, 8, column_tiles, 4, 2, 4).permute(0, 4, 1, 3, 5, 2, 6, 7).int()  # ..., w, g, t, h, q, i
    nibbles = torch.stack((b & 15, b >> 4), dim=-1)  # ..., e
    word = torch.zeros_like(nibbles[..., 0, 0])
    for i, e, pieces in _PLACES:
        for first_bit, mask, shift in pieces:
            word |= ((nibbles[..., i, e] >> first_bit) & mask) << shift
    return word.reshape(row_tiles, column_tiles, 512)


def _pieces(i: int, e: int) -> list[tuple[int, int, int]]:
    """(first bit, mask, where it goes) of each piece of code (i, e): what the kernel's rotations bring to bits 6-8 and 15 of half e."""
    if i == 2:
        return [(0, 1, 16 * e), (1, 3, 16 * e + 9), (3, 1, (16 * e + 17) % 32)]
    right = {0: -4, 1: 0, 3: 6}[i]
    return [(0, 7, (16 * e + 6 + right) % 32), (3, 1, (16 * e + 15 + right) % 32)]


_PLACES = [(i, e, _pieces(i, e)) for i in range(4) for e in range(2)]


def _scale_words(q: QuantTensor, raw: torch.Tensor) -> torch.Tensor:
    """Scale bytes [N, K/block], rows in order, to scale words [N/64, ceil(K/256), 2048/block]."""
    per_tile = _TILE // q.format.block
    if q.format == NVFP4:
        mantissa, exponent = torch.frexp(raw.view(torch.float8_e4m3fn).float())
        raw = torch.where(raw == 0, 0, (exponent + 20) * 8 + (mantissa * 16 - 8).int()).to(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -raw.shape[1] % (4 * per_tile)))
    b = raw.view(-1, 4, 2, 8, raw.shape[1] // (4 * per_tile), 4, per_tile).permute(0, 4, 1, 3, 6, 5, 2)  # tile, word, w, g, t, c, h
    return b.contiguous().flatten(-2).view(torch.int64).reshape(b.shape[0], b.shape[1], -1)


def _factors(w: ExpertWeights, side: str, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The small tensors of a matrix."""
    q, bias = getattr(w, side), getattr(w, f"{side}_bias")
    result = {}
    if q.format == NVFP4:
        result["multiplier"] = (q.global_scale.view(len(q.codes), -1) * 256.0).expand(-1, 2)
    else:
        result["shift"] = (254 - _raw(q).flatten(1).amax(1).int()).clamp(max=250)
        result["multiplier"] = torch.ldexp(torch.ones_like(result["shift"], dtype=torch.float32), 126 - result["shift"])[:, None].expand(-1, 2)
    largest = torch.where(rows < 0, 0, _raw(q).amax(2)[:, rows.clamp(min=0)])
    if q.format == NVFP4:
        exponent = torch.frexp(largest.view(torch.float8_e4m3fn).float()).exponent - 6
        result["row_exponent"] = torch.where(largest == 0, -26, exponent).to(torch.int8)
    else:
        result["row_exponent"] = (largest.int() - 133).clamp(min=-126).to(torch.int8)
    if bias is not None:
        result["bias"] = torch.where(rows < 0, 0, bias.float()[:, rows.clamp(min=0)])
    return {name: tensor.contiguous() for name, tensor in result.items()}
