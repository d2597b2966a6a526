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
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from halfbyte.gluon_compat import aggregate, tma_load
from halfbyte.kernels.sm90.epilogue import activate, split_halves
from halfbyte.kernels.sm90.rings import Counter, make_ring
from halfbyte.weights.hopper.dequant_bf16 import WORD_LAYOUT, dequantize, exponent_bias, load_scales, stored_tile
from halfbyte.weights.hopper.dequant_fp8 import dequantize_fp8, scale_limits
from halfbyte.weights.hopper.layout import ELEMENT_EXPONENT, NVFP4_SCALE_EXPONENT

RUN = gl.constexpr(4)  # tiles of 64 columns that share a word of scales: the unit in which weights are copied
NVFP4_MULTIPLIER = gl.constexpr(2.0 ** (NVFP4_SCALE_EXPONENT + ELEMENT_EXPONENT))  # takes the bf16 kernels' exponents out of the multiplier


@aggregate
class Tensors:
    """What is in global memory, and how many tiles there are. Rows of exponents and biases are those of the matrix, in its order."""

    x: tma.tensor_descriptor
    words: tma.tensor_descriptor
    scales: tma.tensor_descriptor
    shift: gl.tensor
    multiplier: gl.tensor
    exponents: gl.tensor
    x_scale: gl.tensor
    bias: gl.tensor
    y: gl.tensor
    items: gl.tensor
    num_tiles: gl.tensor

    @gluon.constexpr_function
    def __init__(self, x, words, scales, shift, multiplier, exponents, x_scale, bias, y, items, num_tiles):
        self.x = x
        self.words = words
        self.scales = scales
        self.shift = shift
        self.multiplier = multiplier
        self.exponents = exponents
        self.x_scale = x_scale
        self.bias = bias
        self.y = y
        self.items = items
        self.num_tiles = num_tiles

    @gluon.jit
    def item(self, tile, GROUPS: gl.constexpr):
        """Expert, first row and number of rows of what a tile belongs to."""
        entry = self.items + tile // GROUPS * 4
        return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2)


@gluon.jit
def _produce_x(tensors, ring, SPEC: gl.constexpr):
    x_desc = tensors.x
    low, high = ring.first, ring.second
    SIZES: gl.constexpr = SPEC.sizes
    BOX: gl.constexpr = SPEC.box
    BOXES: gl.constexpr = (SPEC.max_rows + BOX - 1) // BOX
    LOW_BOXES: gl.constexpr = low.shape[1] // BOX
    count = Counter(gl.to_tensor(0), SPEC.x_stages)
    for tile in range(gl.program_id(0), tensors.num_tiles, gl.num_programs(0)):
        _, row_start, num_rows = tensors.item(tile, SPEC.groups)
        boxes = BOXES  # of the tile that the item gets
        for s in gl.static_range(len(SIZES) - 2, -1, -1):
            boxes = gl.where(num_rows <= SIZES[s][0] + SIZES[s][1], (SIZES[s][0] + SIZES[s][1] + BOX - 1) // BOX, boxes)
        for step in range(SPEC.steps):
            stage = count.stage()
            full = ring.full.index(stage)
            mbarrier.wait(ring.empty.index(stage), count.phase() ^ 1)
            for box in gl.static_range(BOXES):
                mbarrier.expect(full, (box + 1) * x_desc.block_type.nbytes, pred=boxes == box + 1)
            for box in gl.static_range(BOXES):
                destination = low.index(stage) if box < LOW_BOXES else high.index(stage)
                if destination.shape[0] != BOX:
                    destination = destination.slice(box * BOX if box < LOW_BOXES else (box - LOW_BOXES) * BOX, BOX, dim=0)
                # Boxes beyond the item's rows are filled with zeros, as all that lies outside of x: what the last tile left there would cost power.
                row = gl.where(box * BOX < num_rows, row_start + box * BOX, 1 << 30)
                tma_load(x_desc, [row, step * SPEC.step_k], full, destination, pred=box < boxes)
            count = count.next()


@gluon.jit
def _produce_w(tensors, ring, SPEC: gl.constexpr):
    """Copy the weights of a group of row tiles, four tiles of columns at a time; in the last run only as many as there are."""
    words_desc, scales_desc = tensors.words, tensors.scales
    ROW_TILES: gl.constexpr = SPEC.row_tiles
    COLUMN_TILES: gl.constexpr = SPEC.column_tiles
    GROUP_TILES: gl.constexpr = SPEC.group_tiles
    STAGES: gl.constexpr = SPEC.w_stages
    RUNS: gl.constexpr = (COLUMN_TILES + RUN - 1) // RUN
    BOX: gl.constexpr = words_desc.block_type.shape[0] // 16  # tiles a copy: 16 rows of 128 bytes each
    PIECES: gl.constexpr = RUN // BOX
    LAST_PIECES: gl.constexpr = (COLUMN_TILES - (RUNS - 1) * RUN) // BOX
    SCALE_ROWS: gl.constexpr = scales_desc.block_type.shape[0]
    count = Counter(gl.to_tensor(0), STAGES)
    for tile in range(gl.program_id(0), tensors.num_tiles, gl.num_programs(0)):
        first_row_tile = tile % SPEC.groups * GROUP_TILES
        expert, _, _ = tensors.item(tile, SPEC.groups)
        for run in range(RUNS):
            stage = count.stage()
            full = ring.full.index(stage)
            whole = run < RUNS - 1
            mbarrier.wait(ring.empty.index(stage), count.phase() ^ 1)
            scales_bytes: gl.constexpr = GROUP_TILES * scales_desc.block_type.nbytes
            mbarrier.expect(full, GROUP_TILES * PIECES * words_desc.block_type.nbytes + scales_bytes, pred=whole)
            mbarrier.expect(full, GROUP_TILES * LAST_PIECES * words_desc.block_type.nbytes + scales_bytes, pred=run == RUNS - 1)
            for t in gl.static_range(GROUP_TILES):
                # The last group may be short: what is beyond the last row tile repeats it.
                matrix_tile = expert * ROW_TILES + stored_tile(gl.minimum(first_row_tile + t, ROW_TILES - 1), ROW_TILES, SPEC.gated)
                destination = ring.first.index(t * STAGES + stage)
                for piece in gl.static_range(PIECES):
                    row = (matrix_tile * COLUMN_TILES + run * RUN + piece * BOX) * 16
                    part = destination if PIECES == 1 else destination.slice(piece * BOX * 16, BOX * 16, dim=0)
                    tma_load(words_desc, [row, 0], full, part, pred=whole | (piece < LAST_PIECES))
                tma_load(scales_desc, [(matrix_tile * RUNS + run) * SCALE_ROWS, 0], full, ring.second.index(t * STAGES + stage))
            count = count.next()


@gluon.constexpr_function
def _accumulator_layout(tokens: int, elements: int) -> gl.NVMMADistributedLayout:
    """`elements`: how many a register of the operands holds, 2 of bf16 or 4 of fp8."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tokens, 8 * elements])


@gluon.jit
def _step(w, accumulators, x, stage, FIRST: gl.constexpr, COLUMN: gl.constexpr, SIZE0: gl.constexpr, SIZE1: gl.constexpr):
    """Add w [64, 64] times columns COLUMN .. COLUMN + 63 of the stage's SIZE0 + SIZE1 rows of x to the accumulators from FIRST on."""
    PARTS: gl.constexpr = 2 if SIZE1 > 0 else 1
    low, high = x.first, x.second
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
def _decode(words, scales, decoding, OPERAND: gl.constexpr, ODD: gl.constexpr, SPEC: gl.constexpr):
    """One tile of weights as a register operand; `decoding` is what the tile's rows or expert need for it."""
    WORDS_FOR: gl.constexpr = SPEC.words_for
    if SPEC.fp8:
        operand = dequantize_fp8(words, scales, decoding[0], decoding[1], OPERAND, ODD, SPEC.nvfp4, WORDS_FOR)
    else:
        operand = dequantize(words, scales, decoding, OPERAND, ODD, SPEC.nvfp4, WORDS_FOR)
    return operand


@gluon.jit
def _multiply(x, w, x_count, w_count, decodings, SPEC: gl.constexpr, CONSUMER: gl.constexpr, SIZE0: gl.constexpr, SIZE1: gl.constexpr):
    """The row tiles of a consumer, 64 weight rows each, times SIZE0 + SIZE1 tokens, over all of K: the accumulators of the first tile, then those of
    the second, and the advanced counters."""
    ELEMENTS: gl.constexpr = 4 if SPEC.fp8 else 2
    ROW_TILES: gl.constexpr = SPEC.row_tiles_per_consumer
    accumulators = ()
    for _ in gl.static_range(ROW_TILES):
        accumulators = accumulators + (gl.zeros((64, SIZE0), gl.float32, layout=_accumulator_layout(SIZE0, ELEMENTS)),)
        if SIZE1 > 0:
            accumulators = accumulators + (gl.zeros((64, SIZE1), gl.float32, layout=_accumulator_layout(SIZE1, ELEMENTS)),)
    for _ in range(SPEC.column_tiles // RUN):
        accumulators, x_count, w_count = _multiply_run(accumulators, x, w, x_count, w_count, decodings, SPEC, CONSUMER, RUN, SIZE0, SIZE1)
    LAST: gl.constexpr = SPEC.column_tiles % RUN
    if LAST != 0:
        accumulators, x_count, w_count = _multiply_run(accumulators, x, w, x_count, w_count, decodings, SPEC, CONSUMER, LAST, SIZE0, SIZE1)
    return accumulators, x_count, w_count


@gluon.jit
def _multiply_run(
    accumulators, x, w, x_count, w_count, decodings, SPEC: gl.constexpr, CONSUMER: gl.constexpr, COUNT: gl.constexpr, SIZE0: gl.constexpr,
    SIZE1: gl.constexpr,
):  # fmt: skip
    """The first COUNT tiles of a run."""
    ROW_TILES: gl.constexpr = SPEC.row_tiles_per_consumer
    STEP_K: gl.constexpr = SPEC.step_k
    PARTS: gl.constexpr = 2 if SIZE1 > 0 else 1
    ELEMENTS: gl.constexpr = 4 if SPEC.fp8 else 2
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, _accumulator_layout(SIZE0, ELEMENTS), ELEMENTS)
    w_stage = w_count.stage()
    mbarrier.wait(w.full.index(w_stage), w_count.phase())
    for c in gl.static_range(COUNT):
        x_stage = x_count.stage()
        x_phase = x_count.phase()
        for t in gl.static_range(ROW_TILES):
            place = (CONSUMER * ROW_TILES + t) * SPEC.w_stages + w_stage
            tile_words = w.first.index(place).slice(c * 16, 16, dim=0).load(WORD_LAYOUT)
            tile_scales = load_scales(w.second.index(place), SPEC.nvfp4)[c // 2]
            if c * ROW_TILES + t == COUNT * ROW_TILES - 1:
                mbarrier.arrive(w.empty.index(w_stage), count=1)
            operand = _decode(tile_words, tile_scales, decodings[t], OPERAND, c % 2 == 1, SPEC)
            if c * 64 % STEP_K == 0 and t == 0:
                mbarrier.wait(x.full.index(x_stage), x_phase)
            accumulators = _step(operand, accumulators, x, x_stage, t * PARTS, c * 64 % STEP_K, SIZE0, SIZE1)
            # One step stays in flight while the next is dequantised, but none across the loop's back edge.
            if c * ROW_TILES + t == COUNT * ROW_TILES - 1:
                accumulators = _wait(accumulators, 0)
            elif c * ROW_TILES + t > 0:
                accumulators = _wait(accumulators, PARTS)
            if c > 0 and t == 0 and c * 64 % STEP_K == 0:
                mbarrier.arrive(x.empty.index(x_count.last_stage()), count=1)
        if (c + 1) * 64 % STEP_K == 0 or c == COUNT - 1:
            x_count = x_count.next()
    mbarrier.arrive(x.empty.index(x_count.last_stage()), count=1)
    return accumulators, x_count, w_count.next()


@gluon.jit
def _row_factors(exponents_ptr, rows, multiplier, NVFP4: gl.constexpr):
    """W4A8: what the products of `rows` of a tile are multiplied by, 2^j and in NVFP4 the global scale."""
    factor = ((gl.load(exponents_ptr + rows).to(gl.int32) + 127) << 23).to(gl.float32, bitcast=True)
    if NVFP4:
        factor = factor * (multiplier * NVFP4_MULTIPLIER)
    return factor[:, None]


@gluon.jit
def _store(accumulator, tensors, multipliers, expert, row_start, num_rows, row_tile, TOKENS: gl.constexpr, SPEC: gl.constexpr):
    """Scale, add the bias, activate, and write [tokens, 64 or 32] of y, of the matrix' tile `row_tile`."""
    WIDTH: gl.constexpr = 32 if SPEC.gated else 64
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (WIDTH // 8), WIDTH // 8], [4, 1], [1, 0])
    tile_rows = _first_row(expert, row_tile, SPEC)
    exponents = tensors.exponents + tile_rows
    bias = tensors.bias + tile_rows
    if SPEC.scaled:
        row = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, accumulator.type.layout))
        accumulator = accumulator * gl.load(tensors.x_scale + row_start + row, mask=row < num_rows, other=0.0)[None, :]
    if SPEC.gated:
        gate, up = split_halves(accumulator, TOKENS)
        i = gl.arange(0, 32, layout=gl.SliceLayout(1, gate.type.layout))
        entry = i // 8 * 16 + i % 8
        if SPEC.fp8:
            gate = gate * _row_factors(exponents, entry, multipliers[0], SPEC.nvfp4)
            up = up * _row_factors(exponents, entry + 8, multipliers[1], SPEC.nvfp4)
        else:
            gate = gate * multipliers[0]
            up = up * multipliers[1]
        if SPEC.has_bias:
            gate = gate + gl.load(bias + entry)[:, None]
            up = up + gl.load(bias + entry + 8)[:, None]
        value = activate(gate, up, SPEC.kind, SPEC.alpha, SPEC.beta, SPEC.limit)
    else:
        entry = gl.arange(0, 64, layout=gl.SliceLayout(1, accumulator.type.layout))
        value = accumulator * (_row_factors(exponents, entry, multipliers[0], SPEC.nvfp4) if SPEC.fp8 else multipliers[0])
        if SPEC.has_bias:
            value = value + gl.load(bias + entry)[:, None]
        if SPEC.is_w13:
            value = activate(value, value, SPEC.kind, SPEC.alpha, SPEC.beta, SPEC.limit)
    value = gl.convert_layout(gl.permute(value.to(tensors.y.dtype.element_ty), (1, 0)), OUT)
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, OUT))
    n = row_tile * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, OUT))
    pointers = tensors.y + (row_start + token).to(gl.int64)[:, None] * SPEC.y_columns + n[None, :]
    gl.store(pointers, value, mask=(token < num_rows)[:, None] & (n < SPEC.y_columns)[None, :])


@gluon.jit
def _multiply_and_store(
    tensors, x, w, x_count, w_count, decodings, multipliers, expert, row_start, num_rows, first_row_tile, SPEC: gl.constexpr, CONSUMER: gl.constexpr,
    SIZE0: gl.constexpr, SIZE1: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = 2 if SIZE1 > 0 else 1
    accumulators, x_count, w_count = _multiply(x, w, x_count, w_count, decodings, SPEC, CONSUMER, SIZE0, SIZE1)
    for t in gl.static_range(len(decodings)):
        row_tile = first_row_tile + t
        for part in gl.static_range(PARTS):
            first = SIZE0 if part == 1 else 0
            stored = gl.where(row_tile < SPEC.row_tiles, num_rows - first, 0)
            _store(
                accumulators[t * PARTS + part], tensors, multipliers, expert, row_start + first, stored, row_tile, SIZE1 if part == 1 else SIZE0, SPEC
            )
    return x_count, w_count


@gluon.jit
def _first_row(expert, row_tile, SPEC: gl.constexpr):
    """Where the rows of a tile begin among those of all experts; beyond the last tile, that of the last: nothing of it is stored."""
    return (expert * SPEC.row_tiles + stored_tile(gl.minimum(row_tile, SPEC.row_tiles - 1), SPEC.row_tiles, SPEC.gated)) * 64


@gluon.jit
def _consume(tensors, x, w, SPEC: gl.constexpr, CONSUMER: gl.constexpr):
    SIZES: gl.constexpr = SPEC.sizes
    ROW_TILES: gl.constexpr = SPEC.row_tiles_per_consumer
    x_count = Counter(gl.to_tensor(0), SPEC.x_stages)
    w_count = Counter(gl.to_tensor(0), SPEC.w_stages)
    next_expert, next_row_start, next_num_rows = 0, 0, 0
    if gl.program_id(0) < tensors.num_tiles:
        next_expert, next_row_start, next_num_rows = tensors.item(gl.program_id(0), SPEC.groups)
    for tile in range(gl.program_id(0), tensors.num_tiles, gl.num_programs(0)):
        expert, row_start, num_rows = next_expert, next_row_start, next_num_rows
        if tile + gl.num_programs(0) < tensors.num_tiles:  # read a tile ahead, so that no consumer waits for it
            next_expert, next_row_start, next_num_rows = tensors.item(tile + gl.num_programs(0), SPEC.groups)
        first_row_tile = (tile % SPEC.groups * SPEC.consumers + CONSUMER) * ROW_TILES
        multipliers = gl.load(tensors.multiplier + expert * 2), gl.load(tensors.multiplier + expert * 2 + 1)
        decodings = ()
        for t in gl.static_range(ROW_TILES):
            if SPEC.fp8:
                decodings = decodings + (scale_limits(tensors.exponents + _first_row(expert, first_row_tile + t, SPEC), SPEC.nvfp4),)
            else:
                decodings = decodings + (exponent_bias(0 if SPEC.nvfp4 else gl.load(tensors.shift + expert)),)
        for s in gl.static_range(len(SIZES)):
            if (num_rows > (0 if s == 0 else SIZES[s - 1][0] + SIZES[s - 1][1])) & (num_rows <= SIZES[s][0] + SIZES[s][1]):
                x_count, w_count = _multiply_and_store(
                    tensors, x, w, x_count, w_count, decodings, multipliers, expert, row_start, num_rows, first_row_tile, SPEC, CONSUMER,
                    SIZES[s][0], SIZES[s][1],
                )  # fmt: skip


@gluon.constexpr_function
def _rows_of_stages(max_tokens: int) -> tuple[int, int]:
    """Shared memory comes in powers of two: a stage of 192 rows is one of 128 and one of 64."""
    low = 1 << (max_tokens.bit_length() - 1)
    return low, 16 if max_tokens == low else max_tokens - low


@gluon.jit
def grouped_gemm_prefill(
    x_desc, words_desc, scales_desc, shift_ptr, multiplier_ptr, exponents_ptr, x_scale_ptr, bias_ptr, y_ptr, items_ptr, num_items_ptr,
    SPEC: gl.constexpr,
):  # fmt: skip
    """SPEC: a `PrefillSpec`."""
    ROWS: gl.constexpr = _rows_of_stages(SPEC.max_rows)
    W_TILES: gl.constexpr = SPEC.w_stages * SPEC.group_tiles
    num_tiles = gl.load(num_items_ptr) * SPEC.groups
    tensors = Tensors(x_desc, words_desc, scales_desc, shift_ptr, multiplier_ptr, exponents_ptr, x_scale_ptr, bias_ptr, y_ptr, items_ptr, num_tiles)
    low = gl.allocate_shared_memory(x_desc.dtype, [SPEC.x_stages, ROWS[0], SPEC.step_k], x_desc.layout)
    high = gl.allocate_shared_memory(x_desc.dtype, [SPEC.x_stages if ROWS[0] < SPEC.max_rows else 1, ROWS[1], SPEC.step_k], x_desc.layout)
    words = gl.allocate_shared_memory(gl.int32, [W_TILES, RUN * 16, 32], words_desc.layout)
    scales = gl.allocate_shared_memory(gl.int32, [W_TILES] + scales_desc.block_type.shape, scales_desc.layout)
    x = make_ring(low, high, SPEC.x_stages, SPEC.consumers)
    w = make_ring(words, scales, SPEC.w_stages, SPEC.consumers)
    partitions: gl.constexpr = 4 - SPEC.consumers  # how many of the following are left out
    gl.warp_specialize([
        (_consume, (tensors, x, w, SPEC, 3)),
        (_consume, (tensors, x, w, SPEC, 2)),
        (_consume, (tensors, x, w, SPEC, 1)),
        (_consume, (tensors, x, w, SPEC, 0)),
        (_produce_x, (tensors, x, SPEC)),
        (_produce_w, (tensors, w, SPEC)),
    ][partitions:], _worker_warps(SPEC.consumers), _worker_registers(SPEC.consumers, SPEC.consumer_registers))  # fmt: skip


@gluon.constexpr_function
def _worker_warps(consumers: int) -> list[int]:
    """Warps of every partition but the first."""
    return [4] * (consumers - 1) + [1, 1]


@gluon.constexpr_function
def _worker_registers(consumers: int, consumer_registers: int) -> list[int]:
    return [consumer_registers] * (consumers - 1) + [24, 24]
