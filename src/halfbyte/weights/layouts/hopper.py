"""The layout of the Hopper kernels: 64 x 64 tiles whose bytes are the register fragments of a tensor-core operand.

A tile has 64 weight rows and 64 columns of k, and belongs to 128 threads (warp w = 0..3, lane 4 g + t). Thread (w, g, t) owns

    rows     16 w + g (half h = 0) and 16 w + g + 8 (h = 1)
    columns  16 t + 4 s + 2 p + e        s = 0..3, p = 0..1, e = 0..1

so its columns are one block of 16 with one scale a row, and its 64 codes are 16 contiguous bytes: word s is the A fragment of the s-th m16k16
step (`mma.sync.m16n8k16`, `wgmma.m64nNk16`), in which step slot 8 p + 2 t + e of k stands where column 4 s + 2 p + e of thread t stands. Who
multiplies permutes the activations the same way inside each 64: `SLOT_TO_COLUMN`.

A word is coded so that three shifts and masks turn it into four pairs of bf16 (`hopper_dequant.py`); this file has the host side:

    words   int32 [E, N/64, K/64, 512]    word s of thread i = 32 w + 4 g + t at 4 i + s
    scales  int64 [E, N/64, ceil(K/256), 128 or 64]    8 bytes a thread: byte 2 c + h is the scale of half h in tile c of a run of four.
            NVFP4: entry i. MXFP4 has one scale for two neighbouring t: entry 16 w + 2 g + t // 2

NVFP4 scales are re-encoded, losslessly, from e4m3 to bytes without sign or subnormals: 2^((byte >> 3) - 21) * (1 + (byte & 7) / 8). One multiply-add
makes a bf16 of it. MXFP4 scales are the e8m0 bytes as they are; each expert has a shift that brings its largest one to the top of bf16's range, and
blocks more than 126 octaves below that are zero.

Rows of w13 are ordered so that a tile holds both halves of what the activation needs: row 16 w + g is gate, row 16 w + g + 8 is up, of the
intermediate column `64 (n // 2) + SLOT_TO_COLUMN[32 (n % 2) + 8 w + g]` (tile n). The columns of a tile are thus consecutive in slot order, in which
the second matrix product reads them. Without a gate, row r of tile n is column 64 n + SLOT_TO_COLUMN[r].

Sizes are padded with zero codes: H and I to multiples of 64, each half of w13 on its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from halfbyte.checkpoint.experts import Activation, ExpertWeights
from halfbyte.errors import InputError
from halfbyte.formats import MXFP4, NVFP4, BlockFormat, QuantTensor
from halfbyte.weights.layouts.hopper_fp8 import row_exponents

TILE = 64
TILES_PER_SCALE_WORD = 4
NVFP4_SCALE_EXPONENT = 118  # the kernels' bf16 scale is s * 2^118: 448 * 2^120 would overflow
ELEMENT_EXPONENT = -126  # a code's bits at the bottom of bf16's exponent are worth e2m1 * 2^-126
MAX_SHIFTED_EXPONENT = 254  # of a bf16


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
    """The experts of one layer in tiles; `hidden` and `intermediate` are the sizes before padding."""

    w13: HopperMatrix
    w2: HopperMatrix
    format: BlockFormat
    activation: Activation
    hidden: int
    intermediate: int
    first_expert: int
    num_global_experts: int

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
        """Every tensor by name: "w13.words", "w2.scales", ..."""
        return {f"{side}.{name}": tensor for side, matrix in (("w13", self.w13), ("w2", self.w2)) for name, tensor in matrix.tensors.items()}

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> HopperExperts:
        """The same experts with other storage; names as in `tensors`."""
        sides = {side: replace(getattr(self, side), **{n: tensors[f"{side}.{n}"] for n in getattr(self, side).tensors}) for side in ("w13", "w2")}
        return replace(self, **sides)


def allocate(w: ExpertWeights, device: torch.device | str) -> HopperExperts:
    """Return storage for all experts of `w`, uninitialised, on `device` ("meta" too).

    Raises:
        InputError: the weights are dense.
    """
    if not isinstance(w.w13, QuantTensor) or not isinstance(w.w2, QuantTensor):
        raise InputError("the Hopper layout holds FP4 weights", where="prepare", given="dense experts", needed="NVFP4 or MXFP4 experts")
    halves = 2 if w.activation.gated else 1
    w13 = _allocate_matrix(w.w13, halves * padded_size(w.intermediate), w.w13_bias is not None, device)
    w2 = _allocate_matrix(w.w2, padded_size(w.hidden), w.w2_bias is not None, device)
    num_global = w.num_experts if w.num_global_experts is None else w.num_global_experts
    return HopperExperts(w13, w2, w.w13.format, w.activation, w.hidden, w.intermediate, w.first_expert, num_global)


def pack(w: ExpertWeights, out: HopperExperts, first: int = 0) -> None:
    """Arrange the experts of `w` in tiles, one at a time, and write them to the experts `first` and following of `out`.

    `w` may lie on another device than `out`: an expert is copied to the device of `out` and arranged there. Beside `out` this needs about 12 bytes
    for each weight of one expert's larger projection. Exact: `unpack` gives every value back, and every byte except codes under a zero scale, which
    become zero.

    Raises:
        InputError: a scale is negative or NaN; nothing was written.
    """
    assert isinstance(w.w13, QuantTensor) and isinstance(w.w2, QuantTensor)
    halves = 2 if w.activation.gated else 1
    _check_scales("w13", w.w13)
    _check_scales("w2", w.w2)
    _pack_matrix(w.w13, w13_row_order(w.intermediate, halves), w.w13_bias, out.w13, first)
    _pack_matrix(w.w2, w2_row_order(w.hidden), w.w2_bias, out.w2, first)


def unpack(experts: HopperExperts) -> ExpertWeights:
    """Give the canonical experts back: the inverse of `pack`, without input scales."""
    halves = 2 if experts.activation.gated else 1
    order = w13_row_order(experts.intermediate, halves)
    w13, w13_bias = _unpack_matrix(experts.w13, experts.format, halves, halves * experts.intermediate, experts.hidden, order)
    w2, w2_bias = _unpack_matrix(experts.w2, experts.format, 1, experts.hidden, experts.intermediate, w2_row_order(experts.hidden))
    return ExpertWeights(
        w13, w2, experts.activation, w13_bias, w2_bias, first_expert=experts.first_expert, num_global_experts=experts.num_global_experts
    )


def w13_row_order(intermediate: int, halves: int) -> torch.Tensor:
    """int64 [N]: canonical w13 row of each tile row, -1 for padding; N = halves * intermediate padded to 64.

    >>> w13_row_order(64, 2)[:10].tolist()
    [0, 1, 16, 17, 32, 33, 48, 49, 64, 65]
    """
    padded = padded_size(intermediate)
    column = torch.arange(padded).view(-1, TILE)[:, list(SLOT_TO_COLUMN)].reshape(-1)
    column = torch.where(column < intermediate, column, -1)
    if halves == 1:
        return column
    gate = column.view(-1, 4, 1, 8)  # tile, warp, half, g
    up = torch.where(gate >= 0, gate + intermediate, -1)
    return torch.cat([gate, up], dim=2).reshape(-1)


def w2_row_order(hidden: int) -> torch.Tensor:
    """int64 [N]: canonical w2 row of each tile row, -1 for padding: rows stay in order."""
    rows = torch.arange(padded_size(hidden))
    return torch.where(rows < hidden, rows, -1)


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


def _pack_matrix(w: QuantTensor, row_order: torch.Tensor, bias: torch.Tensor | None, out: HopperMatrix, first: int) -> None:
    num_experts, device, nvfp4 = w.codes.shape[0], out.words.device, w.format == NVFP4
    columns = out.column_tiles * TILE
    row_order = row_order.to(device)
    raw_scales = w.scales.view(torch.uint8)
    for expert in range(num_experts):
        codes = _ordered(w.codes[expert].to(device), row_order, columns // 2)
        raw = _ordered(raw_scales[expert].to(device), row_order, columns // w.format.block)
        if nvfp4:
            codes = torch.where((raw == 0).repeat_interleave(w.format.block // 2, dim=-1), 0, codes)
            raw = _encode_nvfp4_scale(raw)
        out.words[first + expert] = pack_codes(codes)
        out.scales[first + expert] = pack_scales(raw, w.format.block)
    here = slice(first, first + num_experts)
    out.row_exponent[here] = row_exponents(_largest_scales(out.scales[here]), w.format)
    if nvfp4:
        assert w.global_scale is not None
        out.multiplier[here] = (w.global_scale.view(num_experts, -1).expand(num_experts, 2) * _nvfp4_factor()).to(device)
    else:
        assert out.shift is not None
        shift = (MAX_SHIFTED_EXPONENT - raw_scales.flatten(1).amax(1).int()).clamp(max=MAX_SHIFTED_EXPONENT - 4)
        out.shift[here] = shift.to(device)
        out.multiplier[here] = torch.exp2((-ELEMENT_EXPONENT - shift).float()).unsqueeze(1).to(device)
    if bias is not None:
        assert out.bias is not None
        out.bias[here] = _ordered(bias.to(device).float().T, row_order, num_experts).T


def _check_scales(name: str, w: QuantTensor) -> None:
    raw = w.scales.view(torch.uint8)
    bad = int((raw > 0x7E).sum() if w.format == NVFP4 else (raw == 0xFF).sum())
    if bad:
        raise InputError(
            f"{name} has block scales that are negative or NaN",
            where="prepare",
            given=f"{bad} of {raw.numel()}",
            needed="finite scales >= 0",
            next_step="run `halfbyte inspect` on the checkpoint",
        )


def _ordered(matrix: torch.Tensor, row_order: torch.Tensor, columns: int) -> torch.Tensor:
    """Rows of `matrix` [rows, c] in tile order, zero where the order says -1, padded with zeros to `columns`."""
    result = matrix.new_zeros((len(row_order), columns))
    kept = row_order >= 0
    result[kept, : matrix.shape[1]] = matrix[row_order[kept]]
    return result


def _unpack_matrix(
    matrix: HopperMatrix, fmt: BlockFormat, halves: int, rows: int, columns: int, row_order: torch.Tensor
) -> tuple[QuantTensor, torch.Tensor | None]:
    num_experts, device = matrix.words.shape[0], matrix.words.device
    kept = (row_order >= 0).to(device)
    target = row_order.to(device)[kept]
    codes = torch.empty((num_experts, rows, columns // 2), dtype=torch.uint8, device=device)
    scales = torch.empty((num_experts, rows, columns // fmt.block), dtype=torch.uint8, device=device)
    for expert in range(num_experts):
        raw = unpack_scales(matrix.scales[expert])[:, : scales.shape[2]]
        codes[expert, target] = unpack_codes(matrix.words[expert])[kept, : columns // 2]
        scales[expert, target] = _decode_nvfp4_scale(raw[kept]) if fmt == NVFP4 else raw[kept]
    bias = None
    if matrix.bias is not None:
        bias = matrix.bias.new_empty((num_experts, rows))
        bias[:, target] = matrix.bias[:, kept]
    if fmt == MXFP4:
        return QuantTensor(codes, scales, None, fmt), bias
    global_scale = (matrix.multiplier if halves == 2 else matrix.multiplier[:, 0]) / _nvfp4_factor()
    return QuantTensor(codes, scales.view(torch.float8_e4m3fn), global_scale, fmt), bias


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K/2] (low nibble = even column) to int32 words [N/64, K/64, 512]."""
    rows, half_columns = codes.shape
    b = codes.view(rows // TILE, 4, 2, 8, half_columns // 32, 4, 4, 2)  # tile, w, h, g, column tile, t, s, p
    b = b.permute(0, 4, 1, 3, 5, 6, 7, 2).int()  # tile, column tile, w, g, t, s, p, h
    v = (b & 0xF) | ((b >> 4) << 16)  # element e = 0 in the low half of the word, e = 1 in the high half
    sign, magnitude = v & 0x00080008, v & 0x00070007
    word = (sign[..., 0, 0] << 12) | (magnitude[..., 0, 0] << 6) | (sign[..., 0, 1] << 8) | (magnitude[..., 0, 1] << 2)
    word |= (sign[..., 1, 0] << 2) | (_swap_halves(magnitude[..., 1, 0]) << 12)
    last = magnitude[..., 1, 1]
    word |= _swap_halves(sign[..., 1, 1] >> 2) | ((last & 0x00060006) << 8) | (last & 0x00010001)
    return word.reshape(rows // TILE, half_columns // 32, 512)


def unpack_codes(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_codes`."""
    row_tiles, column_tiles, _ = words.shape
    swapped = _swap_halves(words)
    fragments = (
        ((words >> 12) & 0x00080008) | ((words >> 6) & 0x00070007),  # p = 0, h = 0
        ((words >> 8) & 0x00080008) | ((words >> 2) & 0x00070007),  # p = 0, h = 1
        ((words >> 2) & 0x00080008) | ((swapped >> 12) & 0x00070007),  # p = 1, h = 0
        ((swapped << 2) & 0x00080008) | ((words >> 8) & 0x00060006) | (words & 0x00010001),  # p = 1, h = 1
    )
    v = torch.stack(fragments, dim=-1).view(row_tiles, column_tiles, 4, 8, 4, 4, 2, 2)  # tile, column tile, w, g, t, s, p, h
    b = ((v & 0xF) | (v >> 12)).to(torch.uint8)
    return b.permute(0, 2, 7, 3, 1, 4, 5, 6).reshape(row_tiles * TILE, column_tiles * 32)


def _swap_halves(words: torch.Tensor) -> torch.Tensor:
    return (words << 16) | ((words >> 16) & 0xFFFF)


def pack_scales(raw: torch.Tensor, block: int) -> torch.Tensor:
    """uint8 [N, K/block] to int64 [N/64, ceil(K/256), 2048/block]."""
    (rows, columns), per_tile = raw.shape, TILE // block
    scale_words = -(-columns // (TILES_PER_SCALE_WORD * per_tile))
    padded = raw.new_zeros((rows, scale_words * TILES_PER_SCALE_WORD * per_tile))
    padded[:, :columns] = raw
    b = padded.view(rows // TILE, 4, 2, 8, scale_words, TILES_PER_SCALE_WORD, per_tile)  # tile, w, h, g, word, c, t
    b = b.permute(0, 4, 1, 3, 6, 5, 2).contiguous()  # tile, word, w, g, t, c, h
    return b.view(rows // TILE, scale_words, 32 * per_tile, 8).view(torch.int64).squeeze(-1)


def unpack_scales(scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_scales`, padding included: uint8 [N, 16 or 8 a scale word]."""
    row_tiles, scale_words, entries = scales.shape
    b = scales.contiguous().view(torch.uint8).view(row_tiles, scale_words, 4, 8, entries // 32, TILES_PER_SCALE_WORD, 2)
    return b.permute(0, 2, 6, 3, 1, 5, 4).reshape(row_tiles * TILE, -1)


def _largest_scales(scales: torch.Tensor) -> torch.Tensor:
    """The largest scale byte of every row, as stored: int64 [E, N/64, ceil(K/256), entries] to uint8 [E, N]."""
    num_experts, row_tiles, scale_words, entries = scales.shape
    b = scales.view(torch.uint8).view(num_experts, row_tiles, scale_words, 4, 8, entries // 32, TILES_PER_SCALE_WORD, 2)  # .., w, g, t, c, h
    return b.amax(dim=(2, 5, 6)).transpose(-1, -2).reshape(num_experts, row_tiles * TILE)


def _encode_nvfp4_scale(e4m3: torch.Tensor) -> torch.Tensor:
    """e4m3 bytes >= 0 to (exponent + 21) << 3 | mantissa; zero stays zero."""
    return _NVFP4_SCALE_CODE.to(e4m3.device)[e4m3.int()]


def _decode_nvfp4_scale(encoded: torch.Tensor) -> torch.Tensor:
    return _NVFP4_SCALE_BYTE.to(encoded.device)[encoded.int()]


def _scale_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Both directions of the scale encoding, 256 entries each."""
    e4m3 = torch.arange(0x7F, dtype=torch.uint8)
    mantissa, exponent = torch.frexp(e4m3.view(torch.float8_e4m3fn).float())  # value = mantissa * 2^exponent, mantissa in [0.5, 1)
    code = torch.where(e4m3 == 0, 0, ((exponent - 1 + 21) << 3) | ((mantissa * 2 - 1) * 8).int())
    encode, decode = torch.zeros(256, dtype=torch.uint8), torch.zeros(256, dtype=torch.uint8)
    encode[: len(code)] = code.to(torch.uint8)
    decode[code.long()] = e4m3
    return encode, decode


_NVFP4_SCALE_CODE, _NVFP4_SCALE_BYTE = _scale_tables()
