"""The layout of the Hopper kernels: 64 x 64 tiles whose bytes are the register fragments of a tensor-core operand.

A tile has 64 weight rows and 64 columns of k, and belongs to 128 threads (warp w = 0..3, lane 4 g + t). Thread (w, g, t) owns

    rows     16 w + g (half h = 0) and 16 w + g + 8 (h = 1)
    columns  16 t + 4 s + 2 p + e        s = 0..3, p = 0..1, e = 0..1

so its columns are one block of 16 with one scale a row, and its 64 codes are 16 contiguous bytes: word 2 h + q has the columns 8 q + 2 i + e,
i = 0..3, of row half h. The s-th m16k16 A fragment (`mma.sync.m16n8k16`, `wgmma.m64nNk16`) takes the pairs i = 2 (s % 2) + p of q = s // 2: slot
8 p + 2 t + e of k stands where column 4 s + 2 p + e of thread t stands. Who multiplies permutes the activations the same way inside each 64:
`SLOT_TO_COLUMN`.

A word is coded for the tensor cores that multiply by it; both kinds of kernel read both kinds of words. Layout "hopper" is for bf16: shifts and masks
turn a word into four pairs (`hopper_dequant.py`). In each half, e = 0 in the low one, the codes i have these bits, * in the other half:

    i           0     1     2           3
    magnitude   4-2   8-6   10, 9, 0    14-12
    sign        11    15    1*          5*

Layout "hopper_fp8" is for fp8: the codes share a table of bytes, and their magnitudes are its selectors (`hopper_dequant_fp8.py`):

    column of the word   0     1     2     3       5       7       4       6
    magnitude            2-0   10-8  6-4   14-12   18-16   22-20   26-24   30-28
    sign                 3     19    11    27      7       15      23      31

This file has the host side:

    words   int32 [E, N/64, K/64, 512]    word 2 h + q of thread i = 32 w + 4 g + t at 4 i + 2 h + q
    scales  int64 [E, N/64, ceil(K/256), 128 or 64]    8 bytes a thread: byte 2 c + h is the scale of half h in tile c of a run of four.
            NVFP4: entry i. MXFP4 has one scale for two neighbouring t: entry 16 w + 2 g + t // 2

NVFP4 scales are re-encoded, losslessly, from e4m3 to bytes without sign or subnormals: 2^((byte >> 3) - 21) * (1 + (byte & 7) / 8). One multiply-add
makes a bf16 of it. MXFP4 scales are the e8m0 bytes as they are; each expert has a shift that brings its largest one to the top of bf16's range, and
blocks more than 126 octaves below that are zero.

Rows of w13 are ordered so that a tile holds both halves of what the activation needs: of T row tiles, n < T / 2 and n + T / 2 have the intermediate
columns 64 n to 64 n + 63. Row 16 w + g is gate, row 16 w + g + 8 is up, of column `64 n + SLOT_TO_COLUMN[8 w + g]` in tile n and of column
`64 n + SLOT_TO_COLUMN[32 + 8 w + g]` in tile n + T / 2. The columns of a tile are thus consecutive in slot order, in which the second matrix product
reads them, and the two tiles are made of the rows that lie in their places in the canonical matrix, gate upon up: w13 can be packed in place, two
tiles at a time. Without a gate, row r of tile n is column 64 n + SLOT_TO_COLUMN[r].

Sizes are padded with zero codes: H and I to multiples of 64, each half of w13 on its own.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch

from halfbyte.device import Target
from halfbyte.experts import Activation, ExpertWeights
from halfbyte.formats import MXFP4, NVFP4, BlockFormat, QuantTensor
from halfbyte.weights.checks import check_scales, fp4_matrices, has_unusable_scalars, largest_valid_scale
from halfbyte.weights.layouts.hopper_bits import (
    TILE,
    TILES_PER_SCALE_WORD,
    WordsFor,
    decode_nvfp4_scale,
    encode_nvfp4_scale,
    pack_codes,
    pack_scales,
    unpack_codes,
    unpack_scales,
)
from halfbyte.weights.layouts.hopper_fp8 import row_exponents

NVFP4_SCALE_EXPONENT = 118  # the kernels' bf16 scale is s * 2^118: 448 * 2^120 would overflow
ELEMENT_EXPONENT = -126  # a code's bits at the bottom of bf16's exponent are worth e2m1 * 2^-126
MAX_SHIFTED_EXPONENT = 254  # of a bf16
BUFFER_BYTES = 32 << 20  # on a GPU, for weights from elsewhere; fits the L2 of an sm_90 GPU: what goes through it is read from there
# A piece of work of a thread on a CPU. It should fit the L2 of a core; but with less, threads wait for Python's lock between their operations: two
# need 46 ms for an expert of DeepSeek-R1 at 0.5 MiB, 35 at 1 and 33 at 2 (EPYC, torch 2.13, 2026-11-26).
PIECE_BYTES = 1 << 20

# Which row of the canonical matrix a row of a tile is: gate and up rows in turns, in slot order; rows in slot order; rows as they are.
RowOrder = Literal["gate_up", "slots", "straight"]

# The canonical tensor in whose storage each tensor of this layout fits where neither needs padding.
REUSED = {f"{side}.{ours}": f"{side}.{theirs}" for side in ("w13", "w2") for ours, theirs in (("words", "codes"), ("scales", "scales"))}


def _slot_to_column() -> tuple[int, ...]:
    """Column of each slot inside a block of 64: slot 16 s + 8 p + 2 t + e holds column 16 t + 4 s + 2 p + e."""
    return tuple(16 * (slot // 2 % 4) + 4 * (slot // 16) + 2 * (slot // 8 % 2) + slot % 2 for slot in range(TILE))


SLOT_TO_COLUMN = _slot_to_column()


@dataclass(frozen=True)
class HopperMatrix:
    """One projection of all experts: [E, N, K] in tiles.

    Attributes:
        words: int32 [E, N/64, K/64, 512] codes.
        scales: int64 [E, N/64, ceil(K/256), 128 (NVFP4) or 64 (MXFP4)].
        shift: int32 [E], MXFP4 only: exponent of bf16 = e8m0 byte + shift.
        multiplier: fp32 [E, 2] for the two halves of a tile (gate and up; equal for w2): what the accumulated product is multiplied by.
        row_exponent: int8 [E, N], for fp8 tensor cores only: `hopper_fp8.row_exponents`.
        bias: fp32 [E, N] in tile row order, or None.
    """

    words: torch.Tensor
    scales: torch.Tensor
    shift: torch.Tensor | None
    multiplier: torch.Tensor
    row_exponent: torch.Tensor
    bias: torch.Tensor | None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        fields = ("words", "scales", "shift", "multiplier", "row_exponent", "bias")
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}

    @property
    def row_tiles(self) -> int:
        return self.words.shape[1]

    @property
    def column_tiles(self) -> int:
        return self.words.shape[2]


@dataclass(frozen=True)
class HopperExperts:
    """The experts of one layer in tiles; `hidden` and `intermediate` are the sizes before padding, input scales as in `ExpertWeights`.

    `words_for`: the tensor cores that the words are coded for, "fp8" in layout "hopper_fp8".
    """

    w13: HopperMatrix
    w2: HopperMatrix
    format: BlockFormat
    activation: Activation
    hidden: int
    intermediate: int
    first_expert: int
    num_global_experts: int
    words_for: WordsFor
    w13_input_scale: torch.Tensor | None = None
    w2_input_scale: torch.Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.w13.words.shape[0]

    @property
    def device(self) -> torch.device:
        return self.w13.words.device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name: "w13.words", "w2.scales", ..., "w13_input_scale", ..."""
        tensors = {f"{side}.{name}": tensor for side, matrix in (("w13", self.w13), ("w2", self.w2)) for name, tensor in matrix.tensors.items()}
        input_scales = {"w13_input_scale": self.w13_input_scale, "w2_input_scale": self.w2_input_scale}
        return tensors | {name: scale for name, scale in input_scales.items() if scale is not None}

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> HopperExperts:
        """The same experts with other storage; names as in `tensors`."""
        sides = {side: replace(getattr(self, side), **{n: tensors[f"{side}.{n}"] for n in getattr(self, side).tensors}) for side in ("w13", "w2")}
        return replace(self, w13_input_scale=tensors.get("w13_input_scale"), w2_input_scale=tensors.get("w2_input_scale"), **sides)


def allocate(w: ExpertWeights, device: torch.device | str, words_for: WordsFor = "bf16") -> HopperExperts:
    """Return storage for all experts of `w`, uninitialised, on `device` ("meta" too).

    Raises:
        InputError: the weights are dense, or their scales are not in layout "linear".
    """
    w13, w2 = fp4_matrices(w, "hopper_fp8" if words_for == "fp8" else "hopper")
    halves = 2 if w.activation.gated else 1
    w13_out = _allocate_matrix(w13, halves * padded_size(w.intermediate), w.w13_bias is not None, device)
    w2_out = _allocate_matrix(w2, padded_size(w.hidden), w.w2_bias is not None, device)
    num_global = w.num_experts if w.num_global_experts is None else w.num_global_experts
    input_scales = (None if scale is None else torch.empty_like(scale, device=device) for scale in (w.w13_input_scale, w.w2_input_scale))
    return HopperExperts(w13_out, w2_out, w13.format, w.activation, w.hidden, w.intermediate, w.first_expert, num_global, words_for, *input_scales)


def pack(w: ExpertWeights, out: HopperExperts, first: int = 0) -> None:
    """Arrange the experts of `w` in tiles and write them to the experts `first` and following of `out`.

    `w` may lie on another device than `out`, and `out` may lie in the storage of `w`, expert upon expert (`REUSED`). On a GPU a kernel reads and
    writes every byte once; from another device, and in place on a GPU that is not sm_90, through a buffer of 32 MiB, or of one projection of one
    expert.
    Elsewhere, and without Triton, torch does the same; in place, and from another device, one expert at a time from a copy of one projection of it.

    Exact: `unpack` gives every value back, and every byte except codes under a zero scale, which become zero.

    Raises:
        InputError: a scale is negative or not finite; nothing was written.
    """
    w13, w2 = fp4_matrices(w, "hopper")
    if w.num_experts:
        _pack_experts(w, w13, w2, out, slice(first, first + w.num_experts))
    for kept, scale in ((out.w13_input_scale, w.w13_input_scale), (out.w2_input_scale, w.w2_input_scale)):
        if kept is not None and scale is not None:
            kept.copy_(scale)


def _pack_experts(w: ExpertWeights, w13: QuantTensor, w2: QuantTensor, out: HopperExperts, here: slice) -> None:
    """Everything but the input scales, to the experts `here` of `out`."""
    refused = torch.zeros((), dtype=torch.uint8, device=w.device)
    straight: RowOrder = "straight"
    sides = (
        (w13, w.w13_bias, w13_order(w.activation), _largest_scales(w13, refused), out.w13),
        (w2, w.w2_bias, straight, _largest_scales(w2, refused), out.w2),
    )
    refused |= has_unusable_scalars(w)
    is_refused = _read_later(refused)
    has_kernels = _has_kernels(out.device)
    if has_kernels:  # they look at `refused` themselves and need not wait for the host
        refused = refused.to(out.device)
        for matrix, _, rows, _, packed in sides:
            _pack_weights_on_gpu(matrix.codes, matrix.scales.view(torch.uint8), rows, packed.words[here], packed.scales[here], out.words_for, refused)
    if is_refused():
        check_scales(w)
    for matrix, bias, rows, largest, packed in sides:
        if not has_kernels:
            _pack_weights(matrix.codes, matrix.scales.view(torch.uint8), rows, packed.words[here], packed.scales[here], out.words_for)
        _pack_vectors(matrix, bias, rows, largest, packed, here)


def unpack(experts: HopperExperts) -> ExpertWeights:
    """Give the canonical experts back: the inverse of `pack`."""
    order, halves = w13_order(experts.activation), 2 if experts.activation.gated else 1
    w13, w13_bias = _unpack_matrix(experts.w13, experts, order, halves * experts.intermediate, experts.hidden)
    w2, w2_bias = _unpack_matrix(experts.w2, experts, "straight", experts.hidden, experts.intermediate)
    return ExpertWeights(
        w13,
        w2,
        experts.activation,
        w13_bias,
        w2_bias,
        experts.w13_input_scale,
        experts.w2_input_scale,
        experts.first_expert,
        experts.num_global_experts,
    )


def w13_order(activation: Activation) -> RowOrder:
    return "gate_up" if activation.gated else "slots"


def source_rows(order: RowOrder, rows: int) -> torch.Tensor:
    """int64: the canonical row of each tile row of a matrix with `rows` rows, -1 for padding.

    >>> source_rows("gate_up", 128)[:10].tolist()
    [0, 1, 16, 17, 32, 33, 48, 49, 64, 65]
    """
    size = rows // 2 if order == "gate_up" else rows
    row = torch.arange(padded_size(size))
    if order != "straight":
        row = row.view(-1, TILE)[:, list(SLOT_TO_COLUMN)].reshape(-1)
    row = torch.where(row < size, row, -1)
    if order != "gate_up":
        return row
    gate = row.view(-1, 2, 4, 8).transpose(0, 1)  # which of its two tiles, block of 64 columns, warp, g
    up = torch.where(gate >= 0, gate + size, -1)
    return torch.stack([gate, up], dim=3).reshape(-1)


def padded_size(size: int) -> int:
    """Round up to whole tiles."""
    return -(-size // TILE) * TILE


def _nvfp4_factor() -> float:
    """What a product of kernel values has to be multiplied by beside the global scale."""
    return 2.0 ** -(NVFP4_SCALE_EXPONENT + ELEMENT_EXPONENT)


def _allocate_matrix(w: QuantTensor, rows: int, has_bias: bool, device: torch.device | str) -> HopperMatrix:
    num_experts, row_tiles, columns = w.codes.shape[0], rows // TILE, padded_size(w.shape[-1])

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((num_experts, *shape), dtype=dtype, device=device)

    return HopperMatrix(
        words=empty(row_tiles, columns // TILE, 512, dtype=torch.int32),
        scales=empty(row_tiles, -(-columns // (TILE * TILES_PER_SCALE_WORD)), 128 if w.format == NVFP4 else 64, dtype=torch.int64),
        shift=None if w.format == NVFP4 else empty(dtype=torch.int32),
        multiplier=empty(2, dtype=torch.float32),
        row_exponent=empty(rows, dtype=torch.int8),
        bias=empty(rows, dtype=torch.float32) if has_bias else None,
    )


def _read_later(flag: torch.Tensor) -> Callable[[], bool]:
    """What gives the value of a flag, uint8 [], for which the host waits when it is called, but not for what has been queued on the device since."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    copy, copied = torch.empty((), dtype=torch.uint8, pin_memory=True), torch.cuda.Event()
    copy.copy_(flag, non_blocking=True)
    copied.record(torch.cuda.current_stream(flag.device))

    def read() -> bool:
        copied.synchronize()
        return bool(copy)

    return read


def _pack_vectors(w: QuantTensor, bias: torch.Tensor | None, order: RowOrder, largest: torch.Tensor, out: HopperMatrix, here: slice) -> None:
    """What a row or an expert has one of. `largest`: uint8 [E, N], the largest scale byte of each row; `here`: the experts in `out`."""
    num_experts, device = w.codes.shape[0], out.words.device
    _write_row_exponents(largest.to(device), order, w.format, out.row_exponent[here])
    if w.format == NVFP4:
        assert w.global_scale is not None
        out.multiplier[here] = (w.global_scale.view(num_experts, -1).expand(num_experts, 2) * _nvfp4_factor()).to(device)
    else:
        assert out.shift is not None
        shift = (MAX_SHIFTED_EXPONENT - largest.amax(1).int().to(device)).clamp(max=MAX_SHIFTED_EXPONENT - 4)
        out.shift[here] = shift
        power_of_two = (127 - ELEMENT_EXPONENT - shift) << 23  # its bits in fp32
        out.multiplier[here] = power_of_two.view(torch.float32).unsqueeze(1)
    if bias is not None:
        assert out.bias is not None
        rows = source_rows(order, w.codes.shape[1]).to(device)
        out.bias[here] = _ordered(bias.to(device).float().T, rows, num_experts).T


def _write_row_exponents(largest: torch.Tensor, order: RowOrder, format: BlockFormat, row_exponent: torch.Tensor) -> None:
    if _has_kernels(largest.device):
        from halfbyte.weights.layouts.hopper_pack import write_row_exponents

        write_row_exponents(largest, row_exponent, order, nvfp4=format == NVFP4)
        return
    rows = source_rows(order, largest.shape[1]).to(largest.device)
    stored = encode_nvfp4_scale(largest) if format == NVFP4 else largest
    row_exponent.copy_(row_exponents(_ordered(stored.T, rows, len(stored)).T, format))


def _pack_weights(
    codes: torch.Tensor, scales: torch.Tensor, order: RowOrder, words: torch.Tensor, scale_words: torch.Tensor, words_for: WordsFor
) -> None:
    """Codes uint8 [E, N, K/2] and scale bytes [E, N, K/block] to tiles, with torch. `words` and `scale_words` may be the storage of the two."""
    num_experts, row_tiles, column_tiles, _ = words.shape
    device, inference = words.device, torch.is_inference_mode_enabled()
    rows = source_rows(order, codes.shape[1]).to(device)
    is_cpu = device.type == "cpu"
    step = max(1, PIECE_BYTES // (column_tiles * TILE * TILE // 2)) if is_cpu else row_tiles
    in_lanes = all(_in_lanes(tensor, device) for tensor in (codes, scales))
    as_they_are = is_cpu and in_lanes and not _share_storage((codes, scales), (words, scale_words))

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


def _in_lanes(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether `tensor`, on `device`, can be viewed in lanes of 8 bytes where it is."""
    return tensor.device == device and tensor.is_contiguous() and tensor.storage_offset() % 8 == 0 and tensor.data_ptr() % 8 == 0


def _share_storage(sources: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> bool:
    storages = {tensor.untyped_storage().data_ptr() for tensor in written}
    return any(tensor.untyped_storage().data_ptr() in storages for tensor in sources)


@contextmanager
def _pool_of_single_threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch uses, in each of which it uses one.

    Torch's own threads would wait for one another after each of some forty short operations; left to itself, torch would have them also under these,
    for operations on more than 32768 elements: 84 ms of CPU an expert instead of 57 (DeepSeek-R1, EPYC, torch 2.13, 2026-11-26).
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
    lanes = _ordered(codes.view(torch.int64), rows, columns // 16)
    raw = _ordered(scales, rows, columns // block)
    if block == NVFP4.block:
        lanes &= -(raw != 0).long()  # 16 codes have one scale
        raw = encode_nvfp4_scale(raw)
    pack_codes(lanes.view(torch.uint8), words, words_for)
    scale_words.copy_(pack_scales(raw, block))


def _pack_weights_on_gpu(
    codes: torch.Tensor, scales: torch.Tensor, order: RowOrder, words: torch.Tensor, scale_words: torch.Tensor, words_for: WordsFor,
    refused: torch.Tensor,
) -> None:  # fmt: skip
    """The same with kernels, on the device of `words`, unless `refused`, uint8 [] there, is not 0."""
    from halfbyte.weights.layouts.hopper_pack import pack_matrix

    sources = (codes, scales)
    if all(_in_lanes(tensor, words.device) for tensor in sources):
        if not _share_storage(sources, (words, scale_words)):
            pack_matrix(codes, scales, words, scale_words, order, words_for, refused)
            return
        target = Target.of(words.device)
        if target.arch == "sm_90":
            from halfbyte.weights.layouts.hopper_pack_in_place import pack_matrix_in_place

            pack_matrix_in_place(codes, scales, words, scale_words, order, words_for, refused, target.num_sms)
            return
    step = max(1, BUFFER_BYTES // (codes[0].nbytes + scales[0].nbytes))
    buffers = [torch.empty((min(step, len(codes)), *tensor.shape[1:]), dtype=torch.uint8, device=words.device) for tensor in sources]
    for expert in range(0, len(codes), step):
        batch = slice(expert, expert + step)
        staged_codes, staged_scales = (
            buffer[: len(tensor[batch])].copy_(tensor[batch], non_blocking=True) for buffer, tensor in zip(buffers, sources, strict=True)
        )
        pack_matrix(staged_codes, staged_scales, words[batch], scale_words[batch], order, words_for, refused)
    if codes.device.type == "cpu":
        torch.cuda.current_stream(words.device).synchronize()  # pinned memory may still be read, and is the caller's to change


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and _has_triton()


def _largest_scales(w: QuantTensor, refused: torch.Tensor) -> torch.Tensor:
    """uint8 [E, N]: the largest scale byte of each row. Negative scales and NaN have the largest bytes, and make `refused`, uint8 [], 1."""
    raw, limit = w.scales.view(torch.uint8), largest_valid_scale(w.format)
    if _has_kernels(raw.device):
        from halfbyte.weights.layouts.hopper_pack import largest_of_rows

        return largest_of_rows(raw.contiguous(), limit, refused)
    largest = raw.amax(2)
    refused |= largest.amax() > limit
    return largest


def _ordered(matrix: torch.Tensor, source: torch.Tensor, columns: int) -> torch.Tensor:
    """The rows of `matrix` [rows, c] that `source` names, zeros where it says -1, and zeros up to `columns`."""
    ordered = matrix.index_select(0, source.clamp(min=0))
    missing = source < 0
    if missing.any():
        ordered[missing] = 0
    return ordered if matrix.shape[1] == columns else torch.nn.functional.pad(ordered, (0, columns - matrix.shape[1]))


def _unpack_matrix(matrix: HopperMatrix, experts: HopperExperts, order: RowOrder, rows: int, columns: int) -> tuple[QuantTensor, torch.Tensor | None]:
    num_experts, device, format = experts.num_experts, experts.device, experts.format
    source = source_rows(order, rows).to(device)
    kept = source >= 0
    target = source[kept]
    codes = torch.empty((num_experts, rows, columns // 2), dtype=torch.uint8, device=device)
    scales = torch.empty((num_experts, rows, columns // format.block), dtype=torch.uint8, device=device)
    if _has_kernels(device):
        from halfbyte.weights.layouts.hopper_pack import unpack_matrix

        unpack_matrix(matrix.words, matrix.scales, codes, scales, order, experts.words_for)
    else:
        for expert in range(num_experts):
            raw = unpack_scales(matrix.scales[expert])[:, : scales.shape[2]]
            codes[expert, target] = unpack_codes(matrix.words[expert], experts.words_for)[kept, : columns // 2]
            scales[expert, target] = decode_nvfp4_scale(raw[kept]) if format == NVFP4 else raw[kept]
    bias = None
    if matrix.bias is not None:
        bias = matrix.bias.new_empty((num_experts, rows))
        bias[:, target] = matrix.bias[:, kept]
    if format == MXFP4:
        return QuantTensor(codes, scales, None, format), bias
    global_scale = (matrix.multiplier if order == "gate_up" else matrix.multiplier[:, 0]) / _nvfp4_factor()
    return QuantTensor(codes, scales.view(torch.float8_e4m3fn), global_scale, format), bias
