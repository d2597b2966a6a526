"""Whole matrices to the Hopper layout and back with torch, on any device; on a CPU in threads. `bits.py` defines the bits.

`pack_kernels.py` has the same four functions for a GPU: `pack_matrix`, `unpack_matrix`, `largest_of_rows`, `write_row_exponents`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch

from halfbyte.formats import MXFP4, NVFP4
from halfbyte.weights.hopper.bits import (
    TILE,
    WordsFor,
    decode_nvfp4_scale,
    encode_nvfp4_scale,
    pack_codes,
    pack_scales,
    unpack_codes,
    unpack_scales,
)
from halfbyte.weights.hopper.layout import RowOrder, source_rows
from halfbyte.weights.hopper.rounding_fp8 import row_exponents

# A piece of work of a thread on a CPU. It should fit the L2 of a core; but with less, threads wait for Python's lock between their operations: two
# need 46 ms for an expert of DeepSeek-R1 at 0.5 MiB, 35 at 1 and 33 at 2 (EPYC, torch 2.13, 2026-11-26).
PIECE_BYTES = 1 << 20


def pack_matrix(
    codes: torch.Tensor, scales: torch.Tensor, words: torch.Tensor, scale_words: torch.Tensor, order: RowOrder, words_for: WordsFor,
    refused: torch.Tensor,
) -> None:  # fmt: skip
    """Write the tiles of codes uint8 [E, N, K/2] and scale bytes [E, N, K/block], which may lie on another device, to `words` and `scale_words`.

    These may be the storage of the two, expert upon expert. `refused`, uint8 []: where it is not 0 nothing is written.
    """
    if refused:
        return
    num_experts, row_tiles, column_tiles, _ = words.shape
    device, inference = words.device, torch.is_inference_mode_enabled()
    rows = source_rows(order, codes.shape[1]).to(device)
    is_cpu = device.type == "cpu"
    step = max(1, PIECE_BYTES // (column_tiles * TILE * TILE // 2)) if is_cpu else row_tiles
    as_they_are = is_cpu and all(in_lanes(tensor, device) for tensor in (codes, scales)) and not share_storage((codes, scales), (words, scale_words))

    def pieces(expert: int) -> list[tuple[int, int, torch.Tensor, torch.Tensor]]:
        sources = (codes[expert], scales[expert])
        ready, raw = sources if as_they_are else (tensor.to(device, copy=True, memory_format=torch.contiguous_format) for tensor in sources)
        return [(expert, first, ready, raw) for first in range(0, row_tiles, step)]

    def pack_piece(piece: tuple[int, int, torch.Tensor, torch.Tensor]) -> None:
        expert, first, ready, raw = piece
        tiles, tile_rows = slice(first, first + step), slice(first * TILE, (first + step) * TILE)
        with torch.inference_mode(inference):  # which every thread has its own of
            _pack_row_tiles(ready, raw, rows[tile_rows], words[expert, tiles], scale_words[expert, tiles], words_for)

    with _pool_of_single_threads() if is_cpu else nullcontext() as pool:
        run = pool.map if pool else map
        for experts in [range(num_experts)] if as_they_are else [range(expert, expert + 1) for expert in range(num_experts)]:
            list(run(pack_piece, [piece for expert in experts for piece in pieces(expert)]))


def unpack_matrix(
    words: torch.Tensor, scale_words: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, order: RowOrder, words_for: WordsFor
) -> None:
    """The inverse of `pack_matrix`, on one device."""
    source = source_rows(order, codes.shape[1]).to(codes.device)
    kept = source >= 0
    target = source[kept]
    is_nvfp4 = 2 * codes.shape[2] == NVFP4.block * scales.shape[2]
    for expert in range(len(codes)):
        raw = unpack_scales(scale_words[expert])[:, : scales.shape[2]][kept]
        codes[expert, target] = unpack_codes(words[expert], words_for)[kept, : codes.shape[2]]
        scales[expert, target] = decode_nvfp4_scale(raw) if is_nvfp4 else raw


def largest_of_rows(raw: torch.Tensor, limit: int, refused: torch.Tensor) -> torch.Tensor:
    """uint8 [E, N]: the largest byte of each row of raw, uint8 [E, N, C]. Where one is above `limit`, `refused`, uint8 [], becomes 1."""
    largest = raw.amax(2)
    refused |= largest.amax() > limit
    return largest


def write_row_exponents(largest: torch.Tensor, row_exponent: torch.Tensor, order: RowOrder, *, nvfp4: bool) -> None:
    """From the largest scale bytes of rows, uint8 [E, N]; `row_exponent` int8 [E, N padded], its rows in the order of the tiles."""
    rows = source_rows(order, largest.shape[1]).to(largest.device)
    stored = encode_nvfp4_scale(largest) if nvfp4 else largest
    row_exponent.copy_(row_exponents(in_order(stored.T, rows, len(stored)).T, NVFP4 if nvfp4 else MXFP4))


def in_order(matrix: torch.Tensor, source: torch.Tensor, columns: int) -> torch.Tensor:
    """The rows of `matrix` [rows, c] that `source` names, zeros where it says -1, and zeros up to `columns`."""
    ordered = matrix.index_select(0, source.clamp(min=0))
    missing = source < 0
    if missing.any():
        ordered[missing] = 0
    return ordered if matrix.shape[1] == columns else torch.nn.functional.pad(ordered, (0, columns - matrix.shape[1]))


def in_lanes(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether `tensor`, on `device`, can be viewed in lanes of 8 bytes where it is."""
    return tensor.device == device and tensor.is_contiguous() and tensor.storage_offset() % 8 == 0 and tensor.data_ptr() % 8 == 0


def share_storage(sources: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> bool:
    storages = {tensor.untyped_storage().data_ptr() for tensor in written}
    return any(tensor.untyped_storage().data_ptr() in storages for tensor in sources)


@contextmanager
def _pool_of_single_threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch uses, in each of which it uses one.

    Torch's own threads would wait for one another after each of some forty short operations; left to itself, torch would have them also under these,
    for operations on more than 32768 elements: 84 ms of CPU per expert instead of 57 (DeepSeek-R1, EPYC, torch 2.13, 2026-11-26).
    """
    num_threads = torch.get_num_threads()
    started = threading.Barrier(num_threads + 1)

    def start() -> None:
        torch.get_num_threads()  # or the first operation would set the number again
        torch.set_num_threads(1)  # of this thread, and of those that use torch for the first time from now on
        started.wait()

    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for _ in range(num_threads):
                pool.submit(start)
            started.wait()
        finally:
            started.abort()  # where a thread could not be started, the others do not wait for it
            torch.set_num_threads(num_threads)
        yield pool


def _pack_row_tiles(
    codes: torch.Tensor, scales: torch.Tensor, rows: torch.Tensor, words: torch.Tensor, scale_words: torch.Tensor, words_for: WordsFor
) -> None:
    """Write these rows of one expert."""
    block = 2 * codes.shape[1] // scales.shape[1]
    columns = words.shape[1] * TILE
    lanes = in_order(codes.view(torch.int64), rows, columns // 16)
    raw = in_order(scales, rows, columns // block)
    if block == NVFP4.block:
        lanes &= -(raw != 0).long()  # 16 codes have one scale
        raw = encode_nvfp4_scale(raw)
    pack_codes(lanes.view(torch.uint8), words, words_for)
    scale_words.copy_(pack_scales(raw, block))
