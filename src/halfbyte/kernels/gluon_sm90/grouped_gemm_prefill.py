"""Grouped GEMM for many tokens an expert: y[row] = x[row] @ w[expert of row]^T, FP4 weights, bf16 or fp8 activations, fp32 accumulation.

    x        [rows, K padded to 64] bf16 (W4A16) or e4m3 (W4A8), sorted by expert, columns in the slot order of the kind (`weights.layouts.hopper`,
             `hopper_fp8`)
    x_scale  [rows] fp32, SCALED only, as W4A8 always is: what a row of x is multiplied by
    w        `HopperMatrix` [E, N, K]; W4A8 multiplies by what `hopper_fp8.round_to_fp8` gives
    y        [rows, I padded to 64] bf16, columns in bf16 slot order = activation(x @ w^T * scales + bias) where the matrix is w13, or [rows, N] bf16

A persistent program a multiprocessor, its warps specialised: one warp copies blocks of x to shared memory by TMA, and each of CONSUMERS warpgroups
multiplies 64 weight rows of its own. The operands are swapped: dequantised weights are the register operand of wgmma (64 rows), tokens its N
dimension, so a tile has as many tokens as the expert has to give. `SIZES` lists the token counts a tile can have, each as one or two accumulators (a
wgmma's N is a power of two in Gluon): (128, 32) is 160 tokens whose weights are dequantised once.

wgmma reads its register operand asynchronously: every two products are followed by a wait that drains them before those registers are written again,
also across the loop's back edge (a group in flight there makes ptxas serialise, or overwrites live operands).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from halfbyte.kernels.gluon_sm90.compat import tma_load
from halfbyte.kernels.gluon_sm90.epilogue import RELU2, activate, split_halves
from halfbyte.weights.layouts.hopper import ELEMENT_EXPONENT, NVFP4_SCALE_EXPONENT
from halfbyte.weights.layouts.hopper_dequant import dequantize, exponent_bias, scale_offsets, split_scales, word_offsets
from halfbyte.weights.layouts.hopper_dequant_fp8 import dequantize_fp8, zero_scales

NVFP4_MULTIPLIER = gl.constexpr(2.0 ** (NVFP4_SCALE_EXPONENT + ELEMENT_EXPONENT))  # takes the bf16 kernels' exponents out of the multiplier


@gluon.constexpr_function
def _next_power_of_2(n):
    return 1 << (n - 1).bit_length()


@gluon.jit
def _produce(
    x_desc, x_stages, full, empty, items_ptr, num_tiles, GROUPS: gl.constexpr, STEPS: gl.constexpr, STEP_K: gl.constexpr, BOX: gl.constexpr,
    MAX_TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BOXES: gl.constexpr = (MAX_TOKENS + BOX - 1) // BOX
    it = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row_start = gl.load(items_ptr + tile // GROUPS * 4 + 1)
        boxes = (gl.load(items_ptr + tile // GROUPS * 4 + 2) + (BOX - 1)) // BOX
        for step in range(STEPS):
            stage = it % STAGES
            mbarrier.wait(empty.index(stage), (it // STAGES & 1) ^ 1)
            for box in gl.static_range(BOXES):
                mbarrier.expect(full.index(stage), (box + 1) * x_desc.block_type.nbytes, pred=boxes == box + 1)
            for box in gl.static_range(BOXES):
                destination = x_stages.index(stage)
                if destination.shape[0] != BOX:
                    destination = destination.slice(box * BOX, BOX, dim=0)
                tma_load(x_desc, [row_start + box * BOX, step * STEP_K], full.index(stage), destination, pred=box < boxes)
            it += 1


@gluon.jit
def _decode(words, scales, decoding, OPERAND: gl.constexpr, ODD: gl.constexpr, NVFP4: gl.constexpr, FP8: gl.constexpr):
    """One tile of weights as a register operand; `decoding` is what the tile's rows or expert need for it."""
    if FP8:
        operand = dequantize_fp8(words, scales, decoding[0], decoding[1], OPERAND, ODD, NVFP4)
    else:
        operand = dequantize(words, scales, decoding, OPERAND, ODD, NVFP4)
    return operand


@gluon.jit
def _multiply(
    x_stages, full, empty, it, words_ptr, scales_ptr, decoding, TILES: gl.constexpr, STEP_K: gl.constexpr, STAGES: gl.constexpr,
    NVFP4: gl.constexpr, FP8: gl.constexpr, AHEAD: gl.constexpr, SIZE0: gl.constexpr, SIZE1: gl.constexpr,
):  # fmt: skip
    """One tile of 64 weight rows times SIZE0 + SIZE1 tokens, over all of K: the two accumulators and the advanced stage counter."""
    RUNS: gl.constexpr = (TILES + 3) // 4
    SCALES: gl.constexpr = 128 if NVFP4 else 64
    TILES_PER_STAGE: gl.constexpr = STEP_K // 64
    WIDTH: gl.constexpr = 4 if FP8 else 2  # elements in a register of the operand
    MMA0: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE0, 8 * WIDTH])
    MMA1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE1 if SIZE1 > 0 else 16, 8 * WIDTH])
    accumulator0 = gl.zeros((64, SIZE0), gl.float32, layout=MMA0)
    accumulator1 = gl.zeros((64, SIZE1 if SIZE1 > 0 else 16), gl.float32, layout=MMA1)
    queue = ()
    for c in gl.static_range(AHEAD):
        queue = queue + (gl.load(words_ptr + min(c, TILES - 1) * 512),)
    scales = gl.load(scales_ptr)
    for run in range(RUNS):
        next_scales = gl.load(scales_ptr + gl.minimum(run + 1, RUNS - 1) * SCALES)
        low, high = split_scales(scales)
        for c in gl.static_range(4):
            stage = it % STAGES
            w = _decode(queue[0], low if c < 2 else high, decoding, gl.DotOperandLayout(0, MMA0, WIDTH), c % 2 == 1, NVFP4, FP8)
            ahead = gl.minimum(run * 4 + c + AHEAD, TILES - 1)  # past the end x is zero
            queue = queue[1:] + (gl.load(words_ptr + ahead * 512),)
            if c % TILES_PER_STAGE == 0:
                mbarrier.wait(full.index(stage), it // STAGES & 1)
            x = x_stages.index(stage)
            if STEP_K > 64:
                x = x.slice(c % TILES_PER_STAGE * 64, 64, dim=1)
            x0 = x
            if x.shape[0] != SIZE0:
                x0 = x.slice(0, SIZE0, dim=0)
            accumulator0 = warpgroup_mma(w, x0.permute((1, 0)), accumulator0, is_async=True)
            if SIZE1 > 0:
                w1 = gl.convert_layout(w, gl.DotOperandLayout(0, MMA1, WIDTH), assert_trivial=True)
                accumulator1 = warpgroup_mma(w1, x.slice(SIZE0, SIZE1, dim=0).permute((1, 0)), accumulator1, is_async=True)
            if c % 2 == 1:
                if SIZE1 > 0:
                    accumulator0, accumulator1 = warpgroup_mma_wait(0, deps=(accumulator0, accumulator1))
                else:
                    accumulator0 = warpgroup_mma_wait(0, deps=(accumulator0,))
                if TILES_PER_STAGE == 1:
                    mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), count=1)
                if (c + 1) % TILES_PER_STAGE == 0:
                    mbarrier.arrive(empty.index(stage), count=1)
            if (c + 1) % TILES_PER_STAGE == 0:
                it += 1
        scales = next_scales
    return accumulator0, accumulator1, it


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
    x_stages, full, empty, it, words_ptr, scales_ptr, decoding, multiplier0, multiplier1, exponents_ptr, x_scale_ptr, bias_ptr, y_ptr, row_start,
    num_rows, row_tile, TILES: gl.constexpr, N: gl.constexpr, Y_STRIDE: gl.constexpr, NVFP4: gl.constexpr, FP8: gl.constexpr, SCALED: gl.constexpr,
    IS_W13: gl.constexpr, KIND: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr, LIMIT: gl.constexpr, HAS_BIAS: gl.constexpr,
    STEP_K: gl.constexpr, STAGES: gl.constexpr, AHEAD: gl.constexpr, SIZE0: gl.constexpr, SIZE1: gl.constexpr,
):  # fmt: skip
    first, second, it = _multiply(
        x_stages, full, empty, it, words_ptr, scales_ptr, decoding, TILES, STEP_K, STAGES, NVFP4, FP8, AHEAD, SIZE0, SIZE1
    )  # fmt: skip
    _store(
        first, multiplier0, multiplier1, exponents_ptr, x_scale_ptr, bias_ptr, y_ptr, row_start, num_rows, row_tile, SIZE0, N, Y_STRIDE, NVFP4, FP8,
        SCALED, IS_W13, KIND, ALPHA, BETA, LIMIT, HAS_BIAS,
    )  # fmt: skip
    if SIZE1 > 0:
        _store(
            second, multiplier0, multiplier1, exponents_ptr, x_scale_ptr, bias_ptr, y_ptr, row_start + SIZE0, num_rows - SIZE0, row_tile, SIZE1, N,
            Y_STRIDE, NVFP4, FP8, SCALED, IS_W13, KIND, ALPHA, BETA, LIMIT, HAS_BIAS,
        )  # fmt: skip
    return it


@gluon.jit
def _consume(
    memory, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, ROW_TILES: gl.constexpr, TILES: gl.constexpr, N: gl.constexpr,
    Y_STRIDE: gl.constexpr, NVFP4: gl.constexpr, FP8: gl.constexpr, SCALED: gl.constexpr, IS_W13: gl.constexpr, KIND: gl.constexpr,
    ALPHA: gl.constexpr, BETA: gl.constexpr, LIMIT: gl.constexpr, HAS_BIAS: gl.constexpr, SIZES: gl.constexpr, STEP_K: gl.constexpr,
    STAGES: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    x_stages, full, empty, words_ptr, scales_ptr, shift_ptr, multiplier_ptr, exponents_ptr, x_scale_ptr, bias_ptr, y_ptr, items_ptr, num_tiles = (
        memory
    )
    GROUPS: gl.constexpr = (ROW_TILES + CONSUMERS - 1) // CONSUMERS
    RUNS: gl.constexpr = (TILES + 3) // 4
    words = word_offsets()
    scale_entries = scale_offsets(NVFP4)
    it = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert = gl.load(items_ptr + tile // GROUPS * 4)
        row_start = gl.load(items_ptr + tile // GROUPS * 4 + 1)
        num_rows = gl.load(items_ptr + tile // GROUPS * 4 + 2)
        row_tile = tile % GROUPS * CONSUMERS + CONSUMER
        is_real = row_tile < ROW_TILES  # the last group may be short: its spare consumers repeat the last tile and store nothing
        matrix_tile = (expert * ROW_TILES + gl.minimum(row_tile, ROW_TILES - 1)).to(gl.int64)
        tile_words = words_ptr + matrix_tile * (TILES * 512) + words
        tile_scales = scales_ptr + matrix_tile * (RUNS * (128 if NVFP4 else 64)) + scale_entries
        tile_bias = bias_ptr + matrix_tile * 64
        multiplier0 = gl.load(multiplier_ptr + expert * 2)
        multiplier1 = gl.load(multiplier_ptr + expert * 2 + 1)
        tile_exponents = exponents_ptr + matrix_tile * 64
        decoding = zero_scales(tile_exponents, NVFP4) if FP8 else exponent_bias(0 if NVFP4 else gl.load(shift_ptr + expert))
        stored_rows = gl.where(is_real, num_rows, 0)
        for s in gl.static_range(len(SIZES)):
            if (num_rows > (0 if s == 0 else SIZES[s - 1][0] + SIZES[s - 1][1])) & (num_rows <= SIZES[s][0] + SIZES[s][1]):
                it = _multiply_and_store(
                    x_stages, full, empty, it, tile_words, tile_scales, decoding, multiplier0, multiplier1, tile_exponents, x_scale_ptr, tile_bias,
                    y_ptr, row_start, stored_rows, row_tile, TILES, N, Y_STRIDE, NVFP4, FP8, SCALED, IS_W13, KIND, ALPHA, BETA, LIMIT, HAS_BIAS,
                    STEP_K, STAGES, AHEAD, SIZES[s][0], SIZES[s][1],
                )  # fmt: skip


@gluon.jit
def grouped_gemm_prefill(
    x_desc, words_ptr, scales_ptr, shift_ptr, multiplier_ptr, exponents_ptr, x_scale_ptr, bias_ptr, y_ptr, items_ptr, num_items_ptr,
    ROW_TILES: gl.constexpr, TILES: gl.constexpr, N: gl.constexpr, Y_STRIDE: gl.constexpr,
    NVFP4: gl.constexpr, FP8: gl.constexpr, SCALED: gl.constexpr, IS_W13: gl.constexpr, KIND: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr,
    LIMIT: gl.constexpr, HAS_BIAS: gl.constexpr, SIZES: gl.constexpr, CONSUMERS: gl.constexpr, STEP_K: gl.constexpr, STAGES: gl.constexpr,
    AHEAD: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    GROUPS: gl.constexpr = (ROW_TILES + CONSUMERS - 1) // CONSUMERS
    MAX_TOKENS: gl.constexpr = SIZES[len(SIZES) - 1][0] + SIZES[len(SIZES) - 1][1]
    STEPS: gl.constexpr = (TILES + 3) // 4 * (256 // STEP_K)
    BOX: gl.constexpr = x_desc.block_shape[0]
    num_tiles = gl.load(num_items_ptr) * GROUPS
    # Shared memory comes in powers of two.
    STAGE_ROWS: gl.constexpr = _next_power_of_2(MAX_TOKENS)
    x_stages = gl.allocate_shared_memory(gl.float8e4nv if FP8 else gl.bfloat16, [STAGES, STAGE_ROWS, STEP_K], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    memory = (
        x_stages, full, empty, words_ptr, scales_ptr, shift_ptr, multiplier_ptr, exponents_ptr, x_scale_ptr, bias_ptr, y_ptr, items_ptr, num_tiles,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consume, (memory, 0, 2, ROW_TILES, TILES, N, Y_STRIDE, NVFP4, FP8, SCALED, IS_W13, KIND, ALPHA, BETA, LIMIT, HAS_BIAS, SIZES, STEP_K,
                        STAGES, AHEAD)),
            (_consume, (memory, 1, 2, ROW_TILES, TILES, N, Y_STRIDE, NVFP4, FP8, SCALED, IS_W13, KIND, ALPHA, BETA, LIMIT, HAS_BIAS, SIZES, STEP_K,
                        STAGES, AHEAD)),
            (_produce, (x_desc, x_stages, full, empty, items_ptr, num_tiles, GROUPS, STEPS, STEP_K, BOX, MAX_TOKENS, STAGES)),
        ], [4, 1], [CONSUMER_REGISTERS, 24])  # fmt: skip
    elif CONSUMERS == 3:
        gl.warp_specialize([
            (_consume, (memory, 0, 3, ROW_TILES, TILES, N, Y_STRIDE, NVFP4, FP8, SCALED, IS_W13, KIND, ALPHA, BETA, LIMIT, HAS_BIAS, SIZES, STEP_K,
                        STAGES, AHEAD)),
            (_consume, (memory, 1, 3, ROW_TILES, TILES, N, Y_STRIDE, NVFP4, FP8, SCALED, IS_W13, KIND, ALPHA, BETA, LIMIT, HAS_BIAS, SIZES, STEP_K,
                        STAGES, AHEAD)),
            (_consume, (memory, 2, 3, ROW_TILES, TILES, N, Y_STRIDE, NVFP4, FP8, SCALED, IS_W13, KIND, ALPHA, BETA, LIMIT, HAS_BIAS, SIZES, STEP_K,
                        STAGES, AHEAD)),
            (_produce, (x_desc, x_stages, full, empty, items_ptr, num_tiles, GROUPS, STEPS, STEP_K, BOX, MAX_TOKENS, STAGES)),
        ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (memory, 0, 4, ROW_TILES, TILES, N, Y_STRIDE, NVFP4, FP8, SCALED, IS_W13, KIND, ALPHA, BETA, LIMIT, HAS_BIAS, SIZES, STEP_K,
                        STAGES, AHEAD)),
            (_consume, (memory, 1, 4, ROW_TILES, TILES, N, Y_STRIDE, NVFP4, FP8, SCALED, IS_W13, KIND, ALPHA, BETA, LIMIT, HAS_BIAS, SIZES, STEP_K,
                        STAGES, AHEAD)),
            (_consume, (memory, 2, 4, ROW_TILES, TILES, N, Y_STRIDE, NVFP4, FP8, SCALED, IS_W13, KIND, ALPHA, BETA, LIMIT, HAS_BIAS, SIZES, STEP_K,
                        STAGES, AHEAD)),
            (_consume, (memory, 3, 4, ROW_TILES, TILES, N, Y_STRIDE, NVFP4, FP8, SCALED, IS_W13, KIND, ALPHA, BETA, LIMIT, HAS_BIAS, SIZES, STEP_K,
                        STAGES, AHEAD)),
            (_produce, (x_desc, x_stages, full, empty, items_ptr, num_tiles, GROUPS, STEPS, STEP_K, BOX, MAX_TOKENS, STAGES)),
        ], [4, 4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS, 24])  # fmt: skip
