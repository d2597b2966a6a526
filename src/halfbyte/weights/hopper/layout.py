"""The layout of the Hopper kernels: 64 x 64 tiles whose bytes are the register fragments of a tensor-core operand.

A tile has 64 weight rows and 64 columns of k, and belongs to 128 threads (warp w = 0..3, lane 4 g + t). Thread (w, g, t) owns

    rows     16 w + g (half h = 0) and 16 w + g + 8 (h = 1)
    columns  16 t + 4 s + 2 p + e        s = 0..3, p = 0..1, e = 0..1

so its columns are one block of 16 with one scale per row, and its 64 codes are 16 contiguous bytes: word 2 h + q has the columns 8 q + 2 i + e,
i = 0..3, of row half h. The s-th m16k16 A fragment (`mma.sync.m16n8k16`, `wgmma.m64nNk16`) takes the pairs i = 2 (s % 2) + p of q = s // 2: position
8 p + 2 t + e of k stands where column 4 s + 2 p + e of thread t stands. Who multiplies brings the activations into the same order inside each 64:
*fragment order*, `FRAGMENT_COLUMN_BF16`. On fp8 tensor cores a thread's 16 columns are its share of two steps of m64nNk32, which is another order:
`FRAGMENT_COLUMN_FP8`. The device has both in `fragment_order.py`.

A word is coded for the tensor cores that multiply by it; both kinds of kernel read both kinds of words. Layout "hopper" is for bf16: shifts and masks
turn a word into four pairs (`dequant_bf16.py`). In each half, e = 0 in the low one, the codes i have these bits, * in the other half:

    i           0     1     2           3
    magnitude   4-2   8-6   10, 9, 0    14-12
    sign        11    15    1*          5*

Layout "hopper_fp8" is for fp8: the codes share a table of bytes, and their magnitudes are its selectors (`dequant_fp8.py`):

    column of the word   0     1     2     3       5       7       4       6
    magnitude            2-0   10-8  6-4   14-12   18-16   22-20   26-24   30-28
    sign                 3     19    11    27      7       15      23      31

The tensors of a projection (`HopperMatrix`; `pack.py` fills them):

    words   int32 [E, N/64, K/64, 512]    word 2 h + q of thread i = 32 w + 4 g + t at 4 i + 2 h + q
    scales  int64 [E, N/64, ceil(K/256), 128 or 64]    8 bytes per thread: byte 2 c + h is the scale of half h in tile c of a run of four.
            NVFP4: entry i. MXFP4 has one scale for two neighbouring t: entry 16 w + 2 g + t // 2

NVFP4 scales are re-encoded, losslessly, from e4m3 to bytes without sign or subnormals: 2^((byte >> 3) - 21) * (1 + (byte & 7) / 8). One multiply-add
makes a bf16 of it. MXFP4 scales are the e8m0 bytes as they are; each expert has a shift that brings its largest one to the top of bf16's range, and
blocks more than 126 octaves below that are zero.

Rows of w13 are ordered so that a tile holds both halves of what the activation needs: of T row tiles, n < T / 2 and n + T / 2 have the intermediate
columns 64 n to 64 n + 63. With F = `FRAGMENT_COLUMN_BF16`, row 16 w + g is gate, row 16 w + g + 8 is up, of column 64 n + F[8 w + g] in tile n and of
column 64 n + F[32 + 8 w + g] in tile n + T / 2. The columns of a tile are thus consecutive in fragment order, in which the second matrix product
reads them, and the two tiles are made of the rows that lie in their places in the canonical matrix, gate upon up: w13 can be packed in place, two
tiles at a time. Without a gate, row r of tile n is column 64 n + F[r].

Sizes are padded with zero codes: H and I to multiples of 64, each half of w13 on its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from halfbyte.experts import Activation, ExpertWeights
from halfbyte.formats import NVFP4, BlockFormat, QuantTensor
from halfbyte.weights.checks import fp4_matrices
from halfbyte.weights.hopper.bits import TILE, TILES_PER_SCALE_WORD, WordsFor

NVFP4_SCALE_EXPONENT = 118  # the kernels' bf16 scale is s * 2^118: 448 * 2^120 would overflow
ELEMENT_EXPONENT = -126  # a code's bits at the bottom of bf16's exponent are worth e2m1 * 2^-126
MAX_SHIFTED_EXPONENT = 254  # of a bf16

# Which row of the canonical matrix a row of a tile is: gate and up rows in turns, in fragment order; rows in fragment order; rows as they are.
RowOrder = Literal["gate_up", "fragment", "straight"]

# The canonical tensor in whose storage each tensor of this layout fits where neither needs padding.
REUSED = {f"{side}.{ours}": f"{side}.{theirs}" for side in ("w13", "w2") for ours, theirs in (("words", "codes"), ("scales", "scales"))}

# The column, inside a block of 64, at each position of fragment order: 16 s + 8 p + 2 t + e and 16 s + 4 t + b have column 16 t + 4 s + 2 p + e of
# thread t, where b = p + 2 (e ^ s % 2).
FRAGMENT_COLUMN_BF16 = tuple(16 * (position // 2 % 4) + 4 * (position // 16) + 2 * (position // 8 % 2) + position % 2 for position in range(TILE))
FRAGMENT_COLUMN_FP8 = tuple(
    16 * (position // 4 % 4) + 4 * (position // 16) + 2 * (position % 2) + (position // 2 + position // 16) % 2 for position in range(TILE)
)


@dataclass(frozen=True)
class HopperMatrix:
    """One projection of all experts: [E, N, K] in tiles.

    Attributes:
        words: int32 [E, N/64, K/64, 512] codes.
        scales: int64 [E, N/64, ceil(K/256), 128 (NVFP4) or 64 (MXFP4)].
        shift: int32 [E], MXFP4 only: exponent of bf16 = e8m0 byte + shift.
        multiplier: fp32 [E, 2] for the two halves of a tile (gate and up; equal for w2): what the accumulated product is multiplied by.
        row_exponent: int8 [E, N], for fp8 tensor cores only: `rounding_fp8.row_exponents`.
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


@dataclass(frozen=True, eq=False)
class HopperExperts:
    """The experts of one layer in tiles; `hidden` and `intermediate` are the sizes before padding, input scales as in `ExpertWeights`.

    `words_for`: the tensor cores that the words are coded for, "fp8" in layout "hopper_fp8". Only the same object is equal: kernels keep by it what
    calls of a layer share.
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
    """Return storage for all experts of `w`, uninitialised, on `device` ("meta" too); `pack` fills it.

    Raises:
        InputError: the weights are dense, or their scales are not in layout "linear".
    """
    w13, w2 = fp4_matrices(w, "hopper_fp8" if words_for == "fp8" else "hopper")
    w13_out = _allocate_matrix(w13, w.activation.halves * padded_size(w.intermediate), w.w13_bias is not None, device)
    w2_out = _allocate_matrix(w2, padded_size(w.hidden), w.w2_bias is not None, device)
    num_global = w.num_experts if w.num_global_experts is None else w.num_global_experts
    input_scales = (None if scale is None else torch.empty_like(scale, device=device) for scale in (w.w13_input_scale, w.w2_input_scale))
    return HopperExperts(w13_out, w2_out, w13.format, w.activation, w.hidden, w.intermediate, w.first_expert, num_global, words_for, *input_scales)


def w13_order(activation: Activation) -> RowOrder:
    return "gate_up" if activation.gated else "fragment"


def source_rows(order: RowOrder, rows: int) -> torch.Tensor:
    """int64: the canonical row of each tile row of a matrix with `rows` rows, -1 for padding.

    >>> source_rows("gate_up", 128)[:10].tolist()
    [0, 1, 16, 17, 32, 33, 48, 49, 64, 65]
    """
    size = rows // 2 if order == "gate_up" else rows
    row = torch.arange(padded_size(size), dtype=torch.int64)
    if order != "straight":
        row = row.view(-1, TILE)[:, list(FRAGMENT_COLUMN_BF16)].reshape(-1)
    row = torch.where(row < size, row, -1)
    if order != "gate_up":
        return row
    gate = row.view(-1, 2, 4, 8).transpose(0, 1)  # which of its two tiles, block of 64 columns, warp, g
    up = torch.where(gate >= 0, gate + size, -1)
    return torch.stack([gate, up], dim=3).reshape(-1)


def padded_size(size: int) -> int:
    """Round up to whole tiles."""
    return -(-size // TILE) * TILE


def nvfp4_factor() -> float:
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
