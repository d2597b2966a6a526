"""The weights of prefill GEMMs from a ring in shared memory to registers, and from there to the register operand of wgmma (Gluon)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from halfbyte.weights.hopper.dequant_bf16 import WORD_LAYOUT, dequantize, load_scales
from halfbyte.weights.hopper.dequant_fp8 import dequantize_fp8

RUN = gl.constexpr(4)  # tiles of 64 columns that share a word of scales: the unit in which weights are copied


@gluon.constexpr_function
def accumulator_layout(tokens: int, elements: int) -> gl.NVMMADistributedLayout:
    """`elements`: how many a register of the operands holds, 2 of bf16 or 4 of fp8."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tokens, 8 * elements])


@gluon.jit
def load_tile(w, stage, ROW_TILE: gl.constexpr, COLUMN_TILE: gl.constexpr, SPEC: gl.constexpr):
    """Words and scales of one tile of the run in `stage`; ROW_TILE counts those of all consumers, COLUMN_TILE those of the run."""
    place = ROW_TILE * SPEC.w_stages + stage
    words = w.first.index(place).slice(COLUMN_TILE * 16, 16, dim=0).load(WORD_LAYOUT)
    return words, load_scales(w.second.index(place), SPEC.nvfp4)[COLUMN_TILE // 2]


@gluon.jit
def load_run(w, stage, SPEC: gl.constexpr, CONSUMER: gl.constexpr):
    """All tiles of a run that a consumer multiplies: (words, scales), row tile after row tile. The run is there."""
    ROW_TILES: gl.constexpr = SPEC.row_tiles_per_consumer
    tiles = ()
    for t in gl.static_range(ROW_TILES):
        for c in gl.static_range(RUN):
            tiles = tiles + (load_tile(w, stage, CONSUMER * ROW_TILES + t, c, SPEC),)
    return tiles


@gluon.jit
def decode_tile(tile, decoding, OPERAND: gl.constexpr, ODD: gl.constexpr, SPEC: gl.constexpr):
    """A tile, which `load_tile` returned, as a register operand; `decoding` is what its rows or its expert need for it."""
    words, scales = tile
    WORDS_FOR: gl.constexpr = SPEC.words_for
    if SPEC.fp8:
        operand = dequantize_fp8(words, scales, decoding[0], decoding[1], OPERAND, ODD, SPEC.nvfp4, WORDS_FOR)
    else:
        operand = dequantize(words, scales, decoding, OPERAND, ODD, SPEC.nvfp4, WORDS_FOR)
    return operand


@gluon.jit
def decode_tiles(tiles, decoding, OPERAND: gl.constexpr, FIRST: gl.constexpr, COUNT: gl.constexpr, SPEC: gl.constexpr):
    """COUNT tiles, from tile FIRST on, side by side as a register operand. Nothing moves between registers."""
    if COUNT == 1:
        operand = decode_tile(tiles[FIRST], decoding, OPERAND, FIRST % 2 == 1, SPEC)
    else:
        left = decode_tiles(tiles, decoding, OPERAND, FIRST, COUNT // 2, SPEC)
        right = decode_tiles(tiles, decoding, OPERAND, FIRST + COUNT // 2, COUNT // 2, SPEC)
        both = gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), (64, 64 * COUNT))
        operand = gl.convert_layout(both, OPERAND, assert_trivial=True)
    return operand
