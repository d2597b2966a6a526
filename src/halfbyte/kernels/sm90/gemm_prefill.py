"""Grouped GEMM for many tokens per expert: y[row] = x[row] @ w[expert of row]^T, FP4 weights, bf16 or fp8 activations, fp32 accumulation.

    x        [rows, K padded to 64] bf16 (W4A16) or e4m3 (W4A8), sorted by expert, columns in the fragment order of the kind (`weights.hopper.layout`)
    x_scale  [rows] fp32, SCALED only, as W4A8 always is: what a row of x is multiplied by
    w        `HopperMatrix` [E, N, K]; W4A8 multiplies by what `rounding_fp8.round_to_fp8` gives
    y        [rows, I padded to 64] bf16, columns in bf16 fragment order = activation(x @ w^T * scales + bias) where the matrix is w13,
             or [rows, N] bf16

One persistent program per multiprocessor, its warps specialised: two warps copy x and the weights to shared memory by TMA, each through a ring of
its own and across the ends of tiles, so that weights keep streaming while a tile is finished; each of CONSUMERS warpgroups multiplies row tiles of
its own, of 64 weight rows each. The operands are swapped: dequantised weights are the register operand of wgmma (64 rows), tokens its N dimension, so
a tile has as many tokens as the expert has to give. `SIZES` lists the token counts a tile can have, each as one or two accumulators per row tile (a
wgmma's N is a power of two in Gluon): (128, 32) is 160 tokens whose weights are dequantised once.

wgmma reads its register operand asynchronously: one product stays in flight while the next weights are dequantised into other registers, and none
across the loop's back edge (a group in flight there makes ptxas serialise, or overwrites live operands).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from halfbyte.gluon_compat import tma_load
from halfbyte.kernels.sm90.epilogue import RELU2, activate, split_halves
from halfbyte.weights.hopper.dequant_bf16 import WORD_LAYOUT, dequantize, exponent_bias, load_scales, stored_tile
from halfbyte.weights.hopper.dequant_fp8 import dequantize_fp8, scale_limits
from halfbyte.weights.hopper.layout import ELEMENT_EXPONENT, NVFP4_SCALE_EXPONENT

RUN = gl.constexpr(4)  # tiles of 64 columns that share a word of scales: the unit in which weights are copied
NVFP4_MULTIPLIER = gl.constexpr(2.0 ** (NVFP4_SCALE_EXPONENT + ELEMENT_EXPONENT))  # takes the bf16 kernels' exponents out of the multiplier


@gluon.jit
def _stage_and_phase(it, barriers):
    """Where the it-th use of a ring falls."""
    STAGES: gl.constexpr = barriers.shape[0]
    return it % STAGES, it // STAGES & 1


@gluon.jit
def _produce_x(
    x_desc, low, high, full, empty, items_ptr, num_tiles, GROUPS: gl.constexpr, STEPS: gl.constexpr, SIZES: gl.constexpr,
):  # fmt: skip
    BOX: gl.constexpr = x_desc.block_type.shape[0]
    STEP_K: gl.constexpr = x_desc.block_type.shape[1]
    MAX_TOKENS: gl.constexpr = SIZES[len(SIZES) - 1][0] + SIZES[len(SIZES) - 1][1]
    BOXES: gl.constexpr = (MAX_TOKENS + BOX - 1) // BOX
    LOW_BOXES: gl.constexpr = low.shape[1] // BOX
    it = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row_start = gl.load(items_ptr + tile // GROUPS * 4 + 1)
        num_rows = gl.load(items_ptr + tile // GROUPS * 4 + 2)
        boxes = BOXES  # of the tile that the item gets
        for s in gl.static_range(len(SIZES) - 2, -1, -1):
            boxes = gl.where(num_rows <= SIZES[s][0] + SIZES[s][1], (SIZES[s][0] + SIZES[s][1] + BOX - 1) // BOX, boxes)
        for step in range(STEPS):
            stage, phase = _stage_and_phase(it, empty)
            mbarrier.wait(empty.index(stage), phase ^ 1)
            for box in gl.static_range(BOXES):
                mbarrier.expect(full.index(stage), (box + 1) * x_desc.block_type.nbytes, pred=boxes == box + 1)
            for box in gl.static_range(BOXES):
                destination = low.index(stage) if box < LOW_BOXES else high.index(stage)
                if destination.shape[0] != BOX:
                    destination = destination.slice(box * BOX if box < LOW_BOXES else (box - LOW_BOXES) * BOX, BOX, dim=0)
                # Boxes beyond the item's rows are filled with zeros, as all that lies outside of x: what the last tile left there would cost power.
                row = gl.where(box * BOX < num_rows, row_start + box * BOX, 1 << 30)
                tma_load(x_desc, [row, step * STEP_K], full.index(stage), destination, pred=box < boxes)
            it += 1


@gluon.jit
def _produce_w(
    words_desc, scales_desc, words, scales, full, empty, items_ptr, num_tiles, GROUPS: gl.constexpr, GROUP_TILES: gl.constexpr,
    ROW_TILES: gl.constexpr, COLUMN_TILES: gl.constexpr, IS_GATED: gl.constexpr,
):  # fmt: skip
    """Copy the weights of GROUP_TILES row tiles, four tiles of columns at a time; in the last run only as many as there are."""
    RUNS: gl.constexpr = (COLUMN_TILES + RUN - 1) // RUN
    BOX: gl.constexpr = words_desc.block_type.shape[0] // 16  # tiles a copy: 16 rows of 128 bytes each
    PIECES: gl.constexpr = RUN // BOX
    LAST_PIECES: gl.constexpr = (COLUMN_TILES - (RUNS - 1) * RUN) // BOX
    SCALE_ROWS: gl.constexpr = scales_desc.block_type.shape[0]
    STAGES: gl.constexpr = full.shape[0]
    it = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        first_row_tile = tile % GROUPS * GROUP_TILES
        matrix = gl.load(items_ptr + tile // GROUPS * 4) * ROW_TILES
        for run in range(RUNS):
            stage, phase = _stage_and_phase(it, empty)
            whole = run < RUNS - 1
            mbarrier.wait(empty.index(stage), phase ^ 1)
            scales_bytes: gl.constexpr = GROUP_TILES * scales_desc.block_type.nbytes
            mbarrier.expect(full.index(stage), GROUP_TILES * PIECES * words_desc.block_type.nbytes + scales_bytes, pred=whole)
            mbarrier.expect(full.index(stage), GROUP_TILES * LAST_PIECES * words_desc.block_type.nbytes + scales_bytes, pred=run == RUNS - 1)
            for t in gl.static_range(GROUP_TILES):
                # The last group may be short: what is beyond the last row tile repeats it.
                matrix_tile = matrix + stored_tile(gl.minimum(first_row_tile + t, ROW_TILES - 1), ROW_TILES, IS_GATED)
                destination = words.index(t * STAGES + stage)
                for piece in gl.static_range(PIECES):
                    row = (matrix_tile * COLUMN_TILES + run * RUN + piece * BOX) * 16
                    part = destination if PIECES == 1 else destination.slice(piece * BOX * 16, BOX * 16, dim=0)
                    tma_load(words_desc, [row, 0], full.index(stage), part, pred=whole | (piece < LAST_PIECES))
                tma_load(scales_desc, [(matrix_tile * RUNS + run) * SCALE_ROWS, 0], full.index(stage), scales.index(t * STAGES + stage))
            it += 1


@gluon.constexpr_function
def _accumulator_layout(tokens: int, elements: int) -> gl.NVMMADistributedLayout:
    """`elements`: how many a register of the operands holds, 2 of bf16 or 4 of fp8."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tokens, 8 * elements])


@gluon.jit
def _step(w, accumulators, low, high, stage, FIRST: gl.constexpr, COLUMN: gl.constexpr, SIZE0: gl.constexpr, SIZE1: gl.constexpr):
    """Add w [64, 64] times columns COLUMN .. COLUMN + 63 of the stage's SIZE0 + SIZE1 rows of x to the accumulators from FIRST on."""
    PARTS: gl.constexpr = 2 if SIZE1 > 0 else 1
    x0 = _columns(low.index(stage), 0, SIZE0, COLUMN)
    new = (warpgroup_mma(w, x0.permute((1, 0)), accumulators[FIRST], is_async=True),)
    if SIZE1 > 0:
        x1 = _columns(low.index(stage), SIZE0, SIZE1, COLUMN) if low.shape[1] > SIZE0 else _columns(high.index(stage), 0, SIZE1, COLUMN)
        ELEMENTS: gl.constexpr = 32 // w.dtype.primitive_bitwidth
        w1 = gl.convert_layout(w, gl.DotOperandLayout(0, _accumulator_layout(SIZE1, ELEMENTS), ELEMENTS), assert_trivial=True)
        new = new + (warpgroup_mma(w1, x1.permute((1, 0)), accumulators[FIRST + 1], is_async=True),)
    return accumulators[:FIRST] + new + accumulators[FIRST + PARTS :]


@gluon.jit
def _wait(accumulators, LEAVE: gl.constexpr):
    """Wait until at most LEAVE of the latest products are in flight."""
    if len(accumulators) > 1:
        return warpgroup_mma_wait(LEAVE, deps=accumulators)
    else:  # noqa: RET505 (Triton compiles both branches of what returns early)
        return (warpgroup_mma_wait(LEAVE, deps=accumulators),)


@gluon.jit
def _columns(x, FIRST: gl.constexpr, ROWS: gl.constexpr, COLUMN: gl.constexpr):
    if x.shape[1] != 64:
        x = x.slice(COLUMN, 64, dim=1)
    if x.shape[0] != ROWS:
        x = x.slice(FIRST, ROWS, dim=0)
    return x


@gluon.jit
def _decode(
    words, scales, decoding, OPERAND: gl.constexpr, ODD: gl.constexpr, NVFP4: gl.constexpr, WORDS_FOR: gl.constexpr, FP8: gl.constexpr
):  # fmt: skip
    """One tile of weights as a register operand; `decoding` is what the tile's rows or expert need for it."""
    if FP8:
        operand = dequantize_fp8(words, scales, decoding[0], decoding[1], OPERAND, ODD, NVFP4, WORDS_FOR)
    else:
        operand = dequantize(words, scales, decoding, OPERAND, ODD, NVFP4, WORDS_FOR)
    return operand


@gluon.jit
def _multiply(
    rings, x_it, w_it, decodings, CONSUMER: gl.constexpr, COLUMN_TILES: gl.constexpr, NVFP4: gl.constexpr, WORDS_FOR: gl.constexpr, FP8: gl.constexpr,
    SIZE0: gl.constexpr, SIZE1: gl.constexpr,
):  # fmt: skip
    """The row tiles of a consumer, 64 weight rows each, times SIZE0 + SIZE1 tokens, over all of K: the accumulators of the first tile, then those of
    the second, and the advanced stage counters."""
    ROW_TILES_PER_CONSUMER: gl.constexpr = len(decodings)
    ELEMENTS: gl.constexpr = 4 if FP8 else 2
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, _accumulator_layout(SIZE0, ELEMENTS), ELEMENTS)
    accumulators = ()
    for _ in gl.static_range(ROW_TILES_PER_CONSUMER):
        accumulators = accumulators + (gl.zeros((64, SIZE0), gl.float32, layout=_accumulator_layout(SIZE0, ELEMENTS)),)
        if SIZE1 > 0:
            accumulators = accumulators + (gl.zeros((64, SIZE1), gl.float32, layout=_accumulator_layout(SIZE1, ELEMENTS)),)
    for _ in range(COLUMN_TILES // RUN):
        accumulators, x_it, w_it = _multiply_run(
            rings, accumulators, x_it, w_it, decodings, CONSUMER, RUN, NVFP4, WORDS_FOR, FP8, OPERAND, SIZE0, SIZE1
        )
    if COLUMN_TILES % RUN != 0:
        accumulators, x_it, w_it = _multiply_run(
            rings, accumulators, x_it, w_it, decodings, CONSUMER, COLUMN_TILES % RUN, NVFP4, WORDS_FOR, FP8, OPERAND, SIZE0, SIZE1
        )
    return accumulators, x_it, w_it


@gluon.jit
def _multiply_run(
    rings, accumulators, x_it, w_it, decodings, CONSUMER: gl.constexpr, COUNT: gl.constexpr, NVFP4: gl.constexpr, WORDS_FOR: gl.constexpr,
    FP8: gl.constexpr, OPERAND: gl.constexpr, SIZE0: gl.constexpr, SIZE1: gl.constexpr,
):  # fmt: skip
    """The first COUNT tiles of a run."""
    low, high, x_full, x_empty, words, scales, w_full, w_empty = rings
    ROW_TILES_PER_CONSUMER: gl.constexpr = len(decodings)
    STEP_K: gl.constexpr = low.shape[2]
    W_STAGES: gl.constexpr = w_full.shape[0]
    PARTS: gl.constexpr = 2 if SIZE1 > 0 else 1
    w_stage, w_phase = _stage_and_phase(w_it, w_full)
    mbarrier.wait(w_full.index(w_stage), w_phase)
    for c in gl.static_range(COUNT):
        x_stage, x_phase = _stage_and_phase(x_it, x_full)
        for t in gl.static_range(ROW_TILES_PER_CONSUMER):
            place = (CONSUMER * ROW_TILES_PER_CONSUMER + t) * W_STAGES + w_stage
            tile_words = words.index(place).slice(c * 16, 16, dim=0).load(WORD_LAYOUT)
            tile_scales = load_scales(scales.index(place), NVFP4)[c // 2]
            if c * ROW_TILES_PER_CONSUMER + t == COUNT * ROW_TILES_PER_CONSUMER - 1:
                mbarrier.arrive(w_empty.index(w_stage), count=1)
            w = _decode(tile_words, tile_scales, decodings[t], OPERAND, c % 2 == 1, NVFP4, WORDS_FOR, FP8)
            if c * 64 % STEP_K == 0 and t == 0:
                mbarrier.wait(x_full.index(x_stage), x_phase)
            accumulators = _step(w, accumulators, low, high, x_stage, t * PARTS, c * 64 % STEP_K, SIZE0, SIZE1)
            # One step stays in flight while the next is dequantised, but none across the loop's back edge.
            if c * ROW_TILES_PER_CONSUMER + t == COUNT * ROW_TILES_PER_CONSUMER - 1:
                accumulators = _wait(accumulators, 0)
            elif c * ROW_TILES_PER_CONSUMER + t > 0:
                accumulators = _wait(accumulators, PARTS)
            if c > 0 and t == 0 and c * 64 % STEP_K == 0:
                mbarrier.arrive(x_empty.index(_stage_and_phase(x_it - 1, x_empty)[0]), count=1)
        if (c + 1) * 64 % STEP_K == 0 or c == COUNT - 1:
            x_it += 1
    mbarrier.arrive(x_empty.index(_stage_and_phase(x_it - 1, x_empty)[0]), count=1)
    return accumulators, x_it, w_it + 1


@gluon.jit
def _row_factors(exponents_ptr, rows, multiplier, NVFP4: gl.constexpr):
    """W4A8: what the products of `rows` of a tile are multiplied by, 2^j and in NVFP4 the global scale."""
    factor = ((gl.load(exponents_ptr + rows).to(gl.int32) + 127) << 23).to(gl.float32, bitcast=True)
    if NVFP4:
        factor = factor * (multiplier * NVFP4_MULTIPLIER)
    return factor[:, None]


@gluon.jit
def _store(
    accumulator, multiplier0, multiplier1, exponents_ptr, x_scale_ptr, bias_ptr, y_ptr, row_start, num_rows, n_start, TOKENS: gl.constexpr,
    N: gl.constexpr, Y_STRIDE: gl.constexpr, NVFP4: gl.constexpr, FP8: gl.constexpr, SCALED: gl.constexpr, IS_W13: gl.constexpr, KIND: gl.constexpr,
    ALPHA: gl.constexpr, BETA: gl.constexpr, LIMIT: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Scale, add the bias, activate, and write [tokens, 64 or 32] of y from column `n_start` (in units of one tile) on."""
    WIDTH: gl.constexpr = 32 if IS_W13 and KIND != RELU2 else 64
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (WIDTH // 8), WIDTH // 8], [4, 1], [1, 0])
    if SCALED:
        row = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, accumulator.type.layout))
        accumulator = accumulator * gl.load(x_scale_ptr + row_start + row, mask=row < num_rows, other=0.0)[None, :]
    if WIDTH == 32:
        gate, up = split_halves(accumulator, TOKENS)
        i = gl.arange(0, 32, layout=gl.SliceLayout(1, gate.type.layout))
        entry = i // 8 * 16 + i % 8
        if FP8:
            gate = gate * _row_factors(exponents_ptr, entry, multiplier0, NVFP4)
            up = up * _row_factors(exponents_ptr, entry + 8, multiplier1, NVFP4)
        else:
            gate = gate * multiplier0
            up = up * multiplier1
        if HAS_BIAS:
            gate = gate + gl.load(bias_ptr + entry)[:, None]
            up = up + gl.load(bias_ptr + entry + 8)[:, None]
        value = activate(gate, up, KIND, ALPHA, BETA, LIMIT)
    else:
        entry = gl.arange(0, 64, layout=gl.SliceLayout(1, accumulator.type.layout))
        value = accumulator * (_row_factors(exponents_ptr, entry, multiplier0, NVFP4) if FP8 else multiplier0)
        if HAS_BIAS:
            value = value + gl.load(bias_ptr + entry)[:, None]
        if IS_W13:
            value = activate(value, value, KIND, ALPHA, BETA, LIMIT)
    value = gl.convert_layout(gl.permute(value.to(y_ptr.dtype.element_ty), (1, 0)), OUT)
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, OUT))
    n = n_start * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, OUT))
    pointers = y_ptr + (row_start + token).to(gl.int64)[:, None] * Y_STRIDE + n[None, :]
    gl.store(pointers, value, mask=(token < num_rows)[:, None] & (n < N)[None, :])


@gluon.jit
def _multiply_and_store(
    rings, x_it, w_it, decodings, multiplier0, multiplier1, exponents_ptr, x_scale_ptr, bias_ptr, y_ptr, expert, row_start, num_rows, first_row_tile,
    CONSUMER: gl.constexpr, ROW_TILES: gl.constexpr, COLUMN_TILES: gl.constexpr, N: gl.constexpr, Y_STRIDE: gl.constexpr, NVFP4: gl.constexpr,
    WORDS_FOR: gl.constexpr, FP8: gl.constexpr, SCALED: gl.constexpr, IS_W13: gl.constexpr, KIND: gl.constexpr, ALPHA: gl.constexpr,
    BETA: gl.constexpr, LIMIT: gl.constexpr, HAS_BIAS: gl.constexpr, SIZE0: gl.constexpr, SIZE1: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = 2 if SIZE1 > 0 else 1
    accumulators, x_it, w_it = _multiply(rings, x_it, w_it, decodings, CONSUMER, COLUMN_TILES, NVFP4, WORDS_FOR, FP8, SIZE0, SIZE1)
    for t in gl.static_range(len(decodings)):
        row_tile = first_row_tile + t
        tile_rows = _first_row(expert, row_tile, ROW_TILES, IS_W13 and KIND != RELU2)
        for part in gl.static_range(PARTS):
            first = SIZE0 if part == 1 else 0
            _store(
                accumulators[t * PARTS + part], multiplier0, multiplier1, exponents_ptr + tile_rows, x_scale_ptr, bias_ptr + tile_rows, y_ptr,
                row_start + first, gl.where(row_tile < ROW_TILES, num_rows - first, 0), row_tile, SIZE1 if part == 1 else SIZE0, N, Y_STRIDE, NVFP4,
                FP8, SCALED, IS_W13, KIND, ALPHA, BETA, LIMIT, HAS_BIAS,
            )  # fmt: skip
    return x_it, w_it


@gluon.jit
def _first_row(expert, row_tile, ROW_TILES: gl.constexpr, IS_GATED: gl.constexpr):
    """Where the rows of a tile begin among those of all experts; beyond the last tile, that of the last: nothing of it is stored."""
    return (expert * ROW_TILES + stored_tile(gl.minimum(row_tile, ROW_TILES - 1), ROW_TILES, IS_GATED)) * 64


@gluon.jit
def _consume(
    tensors, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, ROW_TILES_PER_CONSUMER: gl.constexpr, ROW_TILES: gl.constexpr,
    COLUMN_TILES: gl.constexpr, N: gl.constexpr,
    Y_STRIDE: gl.constexpr, NVFP4: gl.constexpr, WORDS_FOR: gl.constexpr, SCALED: gl.constexpr, IS_W13: gl.constexpr, KIND: gl.constexpr,
    ALPHA: gl.constexpr, BETA: gl.constexpr, LIMIT: gl.constexpr, HAS_BIAS: gl.constexpr, SIZES: gl.constexpr,
):  # fmt: skip
    rings, shift_ptr, multiplier_ptr, exponents_ptr, x_scale_ptr, bias_ptr, y_ptr, items_ptr, num_tiles = tensors
    FP8: gl.constexpr = rings[0].dtype == gl.float8e4nv
    GROUPS: gl.constexpr = (ROW_TILES + CONSUMERS * ROW_TILES_PER_CONSUMER - 1) // (CONSUMERS * ROW_TILES_PER_CONSUMER)
    x_it = 0
    w_it = 0
    item = items_ptr + gl.program_id(0) // GROUPS * 4
    next_expert, next_row_start, next_num_rows = 0, 0, 0
    if gl.program_id(0) < num_tiles:
        next_expert, next_row_start, next_num_rows = gl.load(item), gl.load(item + 1), gl.load(item + 2)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, row_start, num_rows = next_expert, next_row_start, next_num_rows
        if tile + gl.num_programs(0) < num_tiles:  # read a tile ahead, so that no consumer waits for it
            item = items_ptr + (tile + gl.num_programs(0)) // GROUPS * 4
            next_expert, next_row_start, next_num_rows = gl.load(item), gl.load(item + 1), gl.load(item + 2)
        first_row_tile = (tile % GROUPS * CONSUMERS + CONSUMER) * ROW_TILES_PER_CONSUMER
        multiplier0 = gl.load(multiplier_ptr + expert * 2)
        multiplier1 = gl.load(multiplier_ptr + expert * 2 + 1)
        decodings = ()
        for t in gl.static_range(ROW_TILES_PER_CONSUMER):
            if FP8:
                tile_rows = _first_row(expert, first_row_tile + t, ROW_TILES, IS_W13 and KIND != RELU2)
                decodings = decodings + (scale_limits(exponents_ptr + tile_rows, NVFP4),)
            else:
                decodings = decodings + (exponent_bias(0 if NVFP4 else gl.load(shift_ptr + expert)),)
        for s in gl.static_range(len(SIZES)):
            if (num_rows > (0 if s == 0 else SIZES[s - 1][0] + SIZES[s - 1][1])) & (num_rows <= SIZES[s][0] + SIZES[s][1]):
                x_it, w_it = _multiply_and_store(
                    rings, x_it, w_it, decodings, multiplier0, multiplier1, exponents_ptr, x_scale_ptr, bias_ptr, y_ptr, expert, row_start, num_rows,
                    first_row_tile, CONSUMER, ROW_TILES, COLUMN_TILES, N, Y_STRIDE, NVFP4, WORDS_FOR, FP8, SCALED, IS_W13, KIND, ALPHA, BETA,
                    LIMIT, HAS_BIAS, SIZES[s][0], SIZES[s][1],
                )  # fmt: skip


@gluon.constexpr_function
def _rows_of_stages(max_tokens: int) -> tuple[int, int]:
    """Shared memory comes in powers of two: a stage of 192 rows is one of 128 and one of 64."""
    low = 1 << (max_tokens.bit_length() - 1)
    return low, 16 if max_tokens == low else max_tokens - low


@gluon.jit
def grouped_gemm_prefill(
    x_desc, words_desc, scales_desc, shift_ptr, multiplier_ptr, exponents_ptr, x_scale_ptr, bias_ptr, y_ptr, items_ptr, num_items_ptr,
    ROW_TILES: gl.constexpr, COLUMN_TILES: gl.constexpr, N: gl.constexpr, Y_STRIDE: gl.constexpr,
    NVFP4: gl.constexpr, WORDS_FOR: gl.constexpr, SCALED: gl.constexpr, IS_W13: gl.constexpr, KIND: gl.constexpr, ALPHA: gl.constexpr,
    BETA: gl.constexpr, LIMIT: gl.constexpr, HAS_BIAS: gl.constexpr, SIZES: gl.constexpr, CONSUMERS: gl.constexpr,
    ROW_TILES_PER_CONSUMER: gl.constexpr,
    X_STAGES: gl.constexpr, W_STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    GROUP_TILES: gl.constexpr = CONSUMERS * ROW_TILES_PER_CONSUMER
    GROUPS: gl.constexpr = (ROW_TILES + GROUP_TILES - 1) // GROUP_TILES
    MAX_TOKENS: gl.constexpr = SIZES[len(SIZES) - 1][0] + SIZES[len(SIZES) - 1][1]
    ROWS: gl.constexpr = _rows_of_stages(MAX_TOKENS)
    STEP_K: gl.constexpr = x_desc.block_type.shape[1]
    STEPS: gl.constexpr = COLUMN_TILES // RUN * (RUN * 64 // STEP_K) + (COLUMN_TILES % RUN * 64 + STEP_K - 1) // STEP_K
    num_tiles = gl.load(num_items_ptr) * GROUPS
    low = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES, ROWS[0], STEP_K], x_desc.layout)
    high = gl.allocate_shared_memory(x_desc.dtype, [X_STAGES if ROWS[0] < MAX_TOKENS else 1, ROWS[1], STEP_K], x_desc.layout)
    words = gl.allocate_shared_memory(gl.int32, [W_STAGES * GROUP_TILES, RUN * 16, 32], words_desc.layout)
    scales = gl.allocate_shared_memory(gl.int32, [W_STAGES * GROUP_TILES] + scales_desc.block_type.shape, scales_desc.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(i), count=1)
        mbarrier.init(x_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(W_STAGES):
        mbarrier.init(w_full.index(i), count=1)
        mbarrier.init(w_empty.index(i), count=CONSUMERS)
    rings = (low, high, x_full, x_empty, words, scales, w_full, w_empty)
    tensors = (rings, shift_ptr, multiplier_ptr, exponents_ptr, x_scale_ptr, bias_ptr, y_ptr, items_ptr, num_tiles)
    partitions: gl.constexpr = 4 - CONSUMERS  # how many of the following are left out
    gl.warp_specialize([
        (_consume, (tensors, 3, CONSUMERS, ROW_TILES_PER_CONSUMER, ROW_TILES, COLUMN_TILES, N, Y_STRIDE, NVFP4, WORDS_FOR, SCALED, IS_W13, KIND,
                    ALPHA, BETA, LIMIT, HAS_BIAS, SIZES)),
        (_consume, (tensors, 2, CONSUMERS, ROW_TILES_PER_CONSUMER, ROW_TILES, COLUMN_TILES, N, Y_STRIDE, NVFP4, WORDS_FOR, SCALED, IS_W13, KIND,
                    ALPHA, BETA, LIMIT, HAS_BIAS, SIZES)),
        (_consume, (tensors, 1, CONSUMERS, ROW_TILES_PER_CONSUMER, ROW_TILES, COLUMN_TILES, N, Y_STRIDE, NVFP4, WORDS_FOR, SCALED, IS_W13, KIND,
                    ALPHA, BETA, LIMIT, HAS_BIAS, SIZES)),
        (_consume, (tensors, 0, CONSUMERS, ROW_TILES_PER_CONSUMER, ROW_TILES, COLUMN_TILES, N, Y_STRIDE, NVFP4, WORDS_FOR, SCALED, IS_W13, KIND,
                    ALPHA, BETA, LIMIT, HAS_BIAS, SIZES)),
        (_produce_x, (x_desc, low, high, x_full, x_empty, items_ptr, num_tiles, GROUPS, STEPS, SIZES)),
        (_produce_w, (words_desc, scales_desc, words, scales, w_full, w_empty, items_ptr, num_tiles, GROUPS, GROUP_TILES, ROW_TILES, COLUMN_TILES,
                      IS_W13 and KIND != RELU2)),
    ][partitions:], _worker_warps(CONSUMERS), _worker_registers(CONSUMERS, CONSUMER_REGISTERS))  # fmt: skip


@gluon.constexpr_function
def _worker_warps(consumers: int) -> list[int]:
    """Warps of every partition but the first."""
    return [4] * (consumers - 1) + [1, 1]


@gluon.constexpr_function
def _worker_registers(consumers: int, consumer_registers: int) -> list[int]:
    return [consumer_registers] * (consumers - 1) + [24, 24]
