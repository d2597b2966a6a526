"""Grouped GEMM for many tokens per expert: y[row] = x[row] @ w[expert of row]^T, FP4 weights, bf16 or fp8 activations, fp32 accumulation.

    x        [rows, K padded to 64] bf16 (W4A16) or e4m3 (W4A8), sorted by expert, columns in the fragment order of the kind (`weights.hopper.layout`)
    x_scale  [rows] fp32, SCALED only, as W4A8 always is: what a row of x is multiplied by
    w        `HopperMatrix` [E, N, K]; W4A8 multiplies by what `rounding_fp8.round_to_fp8` gives
    y        [rows, I padded to 64] bf16, columns in bf16 fragment order = activation(x @ w^T * scales + bias) where the matrix is w13,
             or [rows, N] bf16

One persistent program per multiprocessor, its warps specialised: two warps copy x and the weights to shared memory by TMA, each through a ring of
its own (or both through one, where a stage of x is a run: `SPEC.one_ring`) and across the ends of tiles, so that weights keep streaming while a tile
is finished; each of CONSUMERS warpgroups multiplies row tiles of its own, of 64 weight rows each (`products`). The operands are swapped: dequantised
weights are the register operand of wgmma (64 rows), tokens its N dimension, so a tile has as many tokens as the expert has to give. `SIZES` lists the
token counts a tile can have, each as one or two accumulators per row tile (a wgmma's N is a power of two in Gluon): (128, 32) is 160 tokens whose
weights are dequantised once.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from halfbyte.gluon_compat import tma_load
from halfbyte.kernels.sm90.epilogue import activate, split_halves
from halfbyte.kernels.sm90.operands import RUN
from halfbyte.kernels.sm90.products import multiply
from halfbyte.kernels.sm90.rings import Ring, counter, make_ring
from halfbyte.kernels.sm90.tiles import Tensors, Tile, first_row
from halfbyte.weights.hopper.dequant_bf16 import exponent_bias, stored_tile
from halfbyte.weights.hopper.dequant_fp8 import load_exponents, scale_limits
from halfbyte.weights.hopper.layout import ELEMENT_EXPONENT, NVFP4_SCALE_EXPONENT

NVFP4_MULTIPLIER = gl.constexpr(2.0 ** (NVFP4_SCALE_EXPONENT + ELEMENT_EXPONENT))  # takes the bf16 kernels' exponents out of the multiplier


@gluon.jit
def _produce_x(tensors, ring, SPEC: gl.constexpr):
    x_desc = tensors.x
    low, high = ring.first, ring.second
    SIZES: gl.constexpr = SPEC.sizes
    BOX: gl.constexpr = SPEC.box
    BOXES: gl.constexpr = (SPEC.max_rows + BOX - 1) // BOX
    LOW_BOXES: gl.constexpr = low.shape[1] // BOX
    count = counter(SPEC.x_stages, SPEC.one_ring)
    for number in range(gl.program_id(0), tensors.num_tiles, gl.num_programs(0)):
        tile = tensors.tile(number, SPEC.groups)
        boxes = BOXES  # of the tile that the item gets
        for s in gl.static_range(len(SIZES) - 2, -1, -1):
            boxes = gl.where(tile.num_rows <= SIZES[s][0] + SIZES[s][1], (SIZES[s][0] + SIZES[s][1] + BOX - 1) // BOX, boxes)
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
                row = gl.where(box * BOX < tile.num_rows, tile.row_start + box * BOX, 1 << 30)
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
    count = counter(STAGES, SPEC.one_ring)
    for number in range(gl.program_id(0), tensors.num_tiles, gl.num_programs(0)):
        tile = tensors.tile(number, SPEC.groups)
        first_row_tile = tile.group * GROUP_TILES
        if SPEC.fp8:
            for t in gl.static_range(GROUP_TILES):
                _prefetch(tensors.exponents + first_row(tile.expert, first_row_tile + t, SPEC))
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
                matrix_tile = tile.expert * ROW_TILES + stored_tile(gl.minimum(first_row_tile + t, ROW_TILES - 1), ROW_TILES, SPEC.gated)
                destination = ring.first.index(t * STAGES + stage)
                for piece in gl.static_range(PIECES):
                    row = (matrix_tile * COLUMN_TILES + run * RUN + piece * BOX) * 16
                    part = destination if PIECES == 1 else destination.slice(piece * BOX * 16, BOX * 16, dim=0)
                    tma_load(words_desc, [row, 0], full, part, pred=whole | (piece < LAST_PIECES))
                tma_load(scales_desc, [(matrix_tile * RUNS + run) * SCALE_ROWS, 0], full, ring.second.index(t * STAGES + stage))
            count = count.next()


@gluon.jit
def _prefetch(pointer):
    """Bring 64 bytes from memory to the L2, by a warp."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    address = (pointer + lane * 2).to(gl.int64)
    gl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1)


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
    tile_rows = first_row(expert, row_tile, SPEC)
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
def _exponents(tensors, tile, SPEC: gl.constexpr, CONSUMER: gl.constexpr):
    """What the exponents of weights are decoded with: for each row tile of a consumer those of its rows (fp8), or that of the expert."""
    ROW_TILES: gl.constexpr = SPEC.row_tiles_per_consumer
    first_row_tile = (tile.group * SPEC.consumers + CONSUMER) * ROW_TILES
    exponents = ()
    for t in gl.static_range(ROW_TILES):
        if SPEC.fp8:
            exponents = exponents + (load_exponents(tensors.exponents + first_row(tile.expert, first_row_tile + t, SPEC)),)
        else:
            exponents = exponents + (gl.to_tensor(0) if SPEC.nvfp4 else gl.load(tensors.shift + tile.expert),)
    return exponents


@gluon.jit
def _multiply_and_store(
    tensors, x, w, x_count, w_count, tile, exponents, multipliers, next_tile, SPEC: gl.constexpr, CONSUMER: gl.constexpr, SIZE0: gl.constexpr,
    SIZE1: gl.constexpr,
):  # fmt: skip
    """The row tiles of a consumer: returns the advanced counters, and `_exponents` of the next tile, on their way while this one is stored."""
    ROW_TILES: gl.constexpr = SPEC.row_tiles_per_consumer
    PARTS: gl.constexpr = 2 if SIZE1 > 0 else 1
    decodings = ()
    for t in gl.static_range(ROW_TILES):
        decodings = decodings + (scale_limits(exponents[t], SPEC.nvfp4) if SPEC.fp8 else exponent_bias(exponents[t]),)
    accumulators, x_count, w_count = multiply(x, w, x_count, w_count, decodings, SPEC, CONSUMER, SIZE0, SIZE1)
    next_exponents = _exponents(tensors, next_tile, SPEC, CONSUMER)
    for t in gl.static_range(ROW_TILES):
        row_tile = (tile.group * SPEC.consumers + CONSUMER) * ROW_TILES + t
        for part in gl.static_range(PARTS):
            first = SIZE0 if part == 1 else 0
            stored = gl.where(row_tile < SPEC.row_tiles, tile.num_rows - first, 0)
            _store(
                accumulators[t * PARTS + part], tensors, multipliers, tile.expert, tile.row_start + first, stored, row_tile,
                SIZE1 if part == 1 else SIZE0, SPEC,
            )  # fmt: skip
    return x_count, w_count, next_exponents


@gluon.jit
def _consume(tensors, x, w, SPEC: gl.constexpr, CONSUMER: gl.constexpr):
    SIZES: gl.constexpr = SPEC.sizes
    x_count = counter(SPEC.x_stages, SPEC.one_ring)
    w_count = counter(SPEC.w_stages, SPEC.one_ring)
    # What a tile is, and its exponents, are read a tile ahead, so that no consumer waits for them.
    next_tile = Tile(gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0))
    if gl.program_id(0) < tensors.num_tiles:
        next_tile = tensors.tile(gl.program_id(0), SPEC.groups)
    exponents = _exponents(tensors, next_tile, SPEC, CONSUMER)
    for number in range(gl.program_id(0), tensors.num_tiles, gl.num_programs(0)):
        tile = next_tile
        if number + gl.num_programs(0) < tensors.num_tiles:
            next_tile = tensors.tile(number + gl.num_programs(0), SPEC.groups)
        multipliers = gl.load(tensors.multiplier + tile.expert * 2), gl.load(tensors.multiplier + tile.expert * 2 + 1)
        for s in gl.static_range(len(SIZES)):
            if (tile.num_rows > (0 if s == 0 else SIZES[s - 1][0] + SIZES[s - 1][1])) & (tile.num_rows <= SIZES[s][0] + SIZES[s][1]):
                x_count, w_count, exponents = _multiply_and_store(
                    tensors, x, w, x_count, w_count, tile, exponents, multipliers, next_tile, SPEC, CONSUMER, SIZES[s][0], SIZES[s][1]
                )


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
    gl.static_assert(not SPEC.one_ring or (SPEC.x_stages == SPEC.w_stages and SPEC.step_k == RUN * 64), "one ring has one number of stages")
    num_tiles = gl.load(num_items_ptr) * SPEC.groups
    tensors = Tensors(x_desc, words_desc, scales_desc, shift_ptr, multiplier_ptr, exponents_ptr, x_scale_ptr, bias_ptr, y_ptr, items_ptr, num_tiles)
    low = gl.allocate_shared_memory(x_desc.dtype, [SPEC.x_stages, ROWS[0], SPEC.step_k], x_desc.layout)
    high = gl.allocate_shared_memory(x_desc.dtype, [SPEC.x_stages if ROWS[0] < SPEC.max_rows else 1, ROWS[1], SPEC.step_k], x_desc.layout)
    words = gl.allocate_shared_memory(gl.int32, [W_TILES, RUN * 16, 32], words_desc.layout)
    scales = gl.allocate_shared_memory(gl.int32, [W_TILES] + scales_desc.block_type.shape, scales_desc.layout)
    x = make_ring(low, high, SPEC.x_stages, 2 if SPEC.one_ring else 1, SPEC.consumers)
    w = Ring(words, scales, x.full, x.empty) if SPEC.one_ring else make_ring(words, scales, SPEC.w_stages, 1, SPEC.consumers)
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
