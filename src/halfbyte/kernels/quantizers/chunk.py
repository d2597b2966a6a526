"""What a program of the quantisers does with a chunk of rows: load blocks, apply what is fused in front, encode, store codes and scales (Triton).

A thread owns whole blocks: its 16 columns (32 for MXFP4) are eight words, or twice eight, of two elements. The arithmetic is in `blocks.py`.
"""

import triton
import triton.language as tl

from halfbyte.kernels.quantizers.blocks import (
    amax8,
    amax8_and_nan,
    codes4,
    divided_codes,
    e2m1_value,
    e4m3_of,
    e8m0_of,
    half,
    normed,
    quotient,
    range_factor,
    reciprocal,
    swiglu,
)


@triton.jit
def _split4(quad):
    """The four words that a thread holds along the last dimension."""
    even, odd = tl.split(tl.reshape(quad, (quad.shape[0], quad.shape[1], 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def load_words(pointers, mask, STEP: tl.constexpr = 1):
    """Eight words, STEP apart, at pointers [rows, columns]: sixteen elements per thread, in two loads of 16 bytes where STEP is 1."""
    quads = pointers[:, :, None] + STEP * tl.arange(0, 4)[None, None, :]
    w0, w1, w2, w3 = _split4(tl.load(quads, mask=mask[:, :, None], other=0))
    w4, w5, w6, w7 = _split4(tl.load(quads + 4 * STEP, mask=mask[:, :, None], other=0))
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _load(pointers, mask, up_words, SOURCE: tl.constexpr):
    """Eight words of x, and for "swiglu" those that lie `up_words` words behind them."""
    w = load_words(pointers, mask)
    if SOURCE == "swiglu":
        w = w + load_words(pointers + up_words, mask)
    return w


@triton.jit
def _finished(
    w, weights, weight_mask, factor,
    SOURCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Eight words to quantise: x ("x"), the activation ("swiglu"), or x * factor * weights ("norm")."""
    finished = ()
    if SOURCE == "swiglu":
        for i in tl.static_range(8):
            finished = finished + (swiglu(w[i], w[8 + i], ALPHA, BETA, LIMIT, BF16, ASM),)
    elif SOURCE == "norm":
        v = load_words(weights, weight_mask)
        for i in tl.static_range(8):
            finished = finished + (normed(w[i], v[i], factor, BF16, ASM),)
    else:
        finished = w
    return finished


@triton.jit
def prepare_global(global_scale, largest: tl.constexpr, ASM: tl.constexpr):
    """What all blocks under a global scale share when their maximum is to become `largest`: the scale, the power of two that brings it near 1, and
    for the division by largest * global that of the divisor, the divisor times it, and the reciprocal of that."""
    divisor = largest * global_scale
    factor = range_factor(divisor)
    return global_scale, range_factor(global_scale), factor, divisor * factor, reciprocal(divisor * factor, ASM)


@triton.jit
def _nvfp4_scale(amax, prepared, NATIVE: tl.constexpr, ASM: tl.constexpr):
    """e4m3(amax / (largest * global)): byte and value."""
    _, _, factor, divisor, inverse = prepared
    return e4m3_of(tl.minimum(quotient(amax * factor, divisor, inverse, ASM), 448.0), NATIVE)  # min takes the number beside a NaN


@triton.jit
def _nvfp4_codes(w, scale, prepared, has_nan, BF16: tl.constexpr, ASM: tl.constexpr):
    """Codes of eight words, two words of them; 0 where scale * global is 0, and where it overflows all but NaN and infinity give 0."""
    global_scale, factor, _, _, _ = prepared
    divisor = scale * global_scale
    factor = tl.where(divisor == float("inf"), 0.0, factor)
    divisor = tl.where(factor == 0.0, 1.0, divisor * factor)
    low, high = divided_codes(w, factor, divisor, reciprocal(divisor, ASM), has_nan, BF16, ASM)
    return tl.where(divisor == 0.0, 0, low), tl.where(divisor == 0.0, 0, high)


@triton.jit
def _squared(word, HALF: tl.constexpr, code, scale, global_scale, BF16: tl.constexpr):
    difference = e2m1_value(code) * scale * global_scale - half(word, HALF, BF16)
    return difference * difference


@triton.jit
def _pair_error(word, codes, scale, global_scale, BF16: tl.constexpr):
    return _squared(word, 0, codes, scale, global_scale, BF16) + _squared(word, 1, codes >> 4, scale, global_scale, BF16)


@triton.jit
def _error4(w0, w1, w2, w3, codes, scale, global_scale, BF16: tl.constexpr):
    first = _pair_error(w0, codes, scale, global_scale, BF16) + _pair_error(w1, codes >> 8, scale, global_scale, BF16)
    return first + (_pair_error(w2, codes >> 16, scale, global_scale, BF16) + _pair_error(w3, codes >> 24, scale, global_scale, BF16))


@triton.jit
def _error(w, low, high, scale, global_scale, BF16: tl.constexpr):
    """The squared error of a block, added up in the codec's order."""
    first = _error4(w[0], w[1], w[2], w[3], low, scale, global_scale, BF16)
    return first + _error4(w[4], w[5], w[6], w[7], high, scale, global_scale, BF16)


@triton.jit
def nvfp4_block(w, prepared, BF16: tl.constexpr, FOUR_OVER_SIX: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr):
    """Scale byte and two words of codes of the block in eight words; `prepared` by `prepare_global` for 6."""
    amax, has_nan = amax8_and_nan(w, BF16, ASM)
    byte, scale = _nvfp4_scale(amax, prepared, NATIVE, ASM)
    low, high = _nvfp4_codes(w, scale, prepared, has_nan, BF16, ASM)
    if FOUR_OVER_SIX:
        global_scale, _, _, _, _ = prepared
        prepared4 = prepare_global(global_scale, 4.0, ASM)
        byte4, scale4 = _nvfp4_scale(amax, prepared4, NATIVE, ASM)
        low4, high4 = _nvfp4_codes(w, scale4, prepared4, has_nan, BF16, ASM)
        keep4 = _error(w, low4, high4, scale4, global_scale, BF16) < _error(w, low, high, scale, global_scale, BF16)
        byte, low, high = tl.where(keep4, byte4, byte), tl.where(keep4, low4, low), tl.where(keep4, high4, high)
    return byte, low, high


@triton.jit
def _scale_offset(row, column, scale_columns, LAYOUT: tl.constexpr):
    """Bytes from the start of its tile row to the scale of (row, column); `scale_columns` is padded to 4 except for "linear", a tile of one row.

    `& 3` and not `% 4`, which Triton knows to make neighbours: it would take the scales through shared memory to store those together.
    """
    if LAYOUT == "linear":
        return row * scale_columns + column
    if LAYOUT == "8x4":
        return row * 4 + column // 4 * 32 + (column & 3)
    return row % 32 * 16 + row // 32 * 4 + column // 4 * 512 + (column & 3)


@triton.jit
def load_rows(
    x_ptr, x_row, present, first_column, row_blocks, num_columns,
    NVFP4: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """The words of the blocks of up to BLOCK_ROWS `present` rows from `x_row` on, an int64, eight at a time."""
    GROUPS: tl.constexpr = 1 if NVFP4 else 2
    column = first_column + tl.arange(0, BLOCK_COLUMNS)[None, :]
    row = tl.arange(0, BLOCK_ROWS)[:, None]
    words = x_ptr + x_row * row_blocks * (8 * GROUPS) + (row * row_blocks + column) * (8 * GROUPS)
    mask, up_words = (row < present) & (column < num_columns), num_columns * (8 * GROUPS)
    first = _load(words, mask, up_words, SOURCE)
    return (first,) if NVFP4 else (first, _load(words + 8, mask, up_words, SOURCE))


@triton.jit
def quantize_chunk(
    words, x_ptr, weight_ptr, factor_ptr, codes_ptr, scales_ptr, global_ptr, x_row, scale_row, present, written, next_x_row, next_present,
    first_column, row_blocks, num_columns, scale_columns, rows_per_global,
    NVFP4: tl.constexpr, BF16: tl.constexpr, RULE: tl.constexpr, FOUR_OVER_SIX: tl.constexpr, LAYOUT: tl.constexpr, GLOBAL_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr,
    SOURCE: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Quantise `present` rows from `x_row` on, and write zero scales for those up to `written`, in the same tile. Columns are blocks;
    `x_row`, `next_x_row` and `scale_row` are int64.

    `words` are what `load_rows` gives of the first rows. Returns those of the next chunk, loaded while the last rows of this one were computed.
    What depends on the chunk is in 64-bit base pointers; offsets inside it are 32-bit.
    """
    GROUPS: tl.constexpr = 1 if NVFP4 else 2  # of sixteen elements in a block
    TILE: tl.constexpr = 1 if LAYOUT == "linear" else (8 if LAYOUT == "8x4" else 128)
    codes_base = codes_ptr + x_row * num_columns * (2 * GROUPS)
    scales_base = scales_ptr + scale_row // TILE * TILE * scale_columns
    tile_row = (scale_row % TILE).to(tl.int32)
    if NVFP4 and not GLOBAL_ROWS:
        prepared = prepare_global(tl.load(global_ptr), 6.0, ASM)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)[None, :]
    weights = weight_ptr + column * (8 * GROUPS)
    first_row = tl.arange(0, BLOCK_ROWS)[:, None]
    for start in range(0, tl.maximum(present, 1), BLOCK_ROWS):  # once for no rows too, to load those of the next chunk
        row = start + first_row
        mask = (row < present) & (column < num_columns)
        is_last = start + BLOCK_ROWS >= present
        next_words = load_rows(
            x_ptr, tl.where(is_last, next_x_row, x_row + (start + BLOCK_ROWS)), tl.where(is_last, next_present, present - start - BLOCK_ROWS),
            first_column, row_blocks, num_columns, NVFP4, BLOCK_ROWS, BLOCK_COLUMNS, SOURCE,
        )  # fmt: skip
        codes = codes_base + ((row * num_columns + column) * (2 * GROUPS))[:, :, None]
        factor_of_row = 1.0
        if SOURCE == "norm":
            factor_of_row = tl.load(factor_ptr + x_row + row, mask=row < present, other=0.0)
        w = _finished(words[0], weights, column < num_columns, factor_of_row, SOURCE, ALPHA, BETA, LIMIT, BF16, ASM)
        if NVFP4:
            if GLOBAL_ROWS:
                row_scale = tl.load(global_ptr + (x_row + row) // rows_per_global, mask=row < present, other=1.0)
                byte, low, high = nvfp4_block(w, prepare_global(row_scale, 6.0, ASM), BF16, FOUR_OVER_SIX, NATIVE, ASM)
            else:
                byte, low, high = nvfp4_block(w, prepared, BF16, FOUR_OVER_SIX, NATIVE, ASM)
            tl.store(codes + tl.arange(0, 2)[None, None, :], tl.join(low, high), mask=mask[:, :, None])
        else:
            v = _finished(words[1], weights + 8, column < num_columns, factor_of_row, SOURCE, ALPHA, BETA, LIMIT, BF16, ASM)
            byte, factor = e8m0_of(tl.maximum(amax8(w, BF16, ASM), amax8(v, BF16, ASM)), RULE)
            c0 = codes4(w[0], w[1], w[2], w[3], factor, BF16, ASM)
            c1 = codes4(w[4], w[5], w[6], w[7], factor, BF16, ASM)
            c2 = codes4(v[0], v[1], v[2], v[3], factor, BF16, ASM)
            c3 = codes4(v[4], v[5], v[6], v[7], factor, BF16, ASM)
            quad = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (BLOCK_ROWS, BLOCK_COLUMNS, 4))
            tl.store(codes + tl.arange(0, 4)[None, None, :], quad, mask=mask[:, :, None])
        scales = scales_base + _scale_offset(tile_row + row, column, scale_columns, LAYOUT)
        tl.store(scales, byte.to(tl.uint8), mask=(row < present) & (column < scale_columns))
        words = next_words
    if LAYOUT != "linear":  # noqa: SIM102 - decided when compiling
        if present < written:
            _zero_scales(scales_base, tile_row + present, tile_row + written, first_column, scale_columns, LAYOUT, TILE, BLOCK_COLUMNS)
    return words


@triton.jit
def _zero_scales(scales_base, first_row, end_row, first_column, scale_columns, LAYOUT: tl.constexpr, TILE: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Zero the scales of rows `first_row` to `end_row` of a tile, four columns at a time, of "128x4" 32 rows whose bytes are neighbours."""
    AT_ONCE: tl.constexpr = 32 if LAYOUT == "128x4" else TILE
    i = tl.arange(0, AT_ONCE)[:, None]
    column = first_column + 4 * tl.arange(0, BLOCK_COLUMNS // 4)[None, :]
    zero = tl.zeros((AT_ONCE, BLOCK_COLUMNS // 4), tl.int32)
    first = first_row // 8
    for eight in range(first, tl.minimum((end_row + 7) // 8, first + AT_ONCE // 8)):
        row = i // 8 * 32 + eight % 4 * 8 + i % 8 if LAYOUT == "128x4" else i
        words = scales_base.to(tl.pointer_type(tl.int32)) + _scale_offset(row, column, scale_columns, LAYOUT) // 4
        tl.store(words, zero, mask=(row >= first_row) & (row < end_row) & (column < scale_columns))
