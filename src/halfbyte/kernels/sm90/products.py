"""Row tiles times tokens, over all of K, out of the rings of a prefill GEMM (Gluon).

wgmma reads its register operand asynchronously: one product stays in flight while the next weights are dequantised into other registers, and none
across the loop's back edge (a group in flight there makes ptxas serialise, or overwrites live operands). What can be carried over it are the words of
the next run (`SPEC.words_ahead`), so that none but the first run of a tile waits for shared memory.

Tiles of few tokens (`SPEC.warp_rows`) are multiplied by mma.sync instead, whose four warps wait for one another only where a stage goes back.

A stage goes back to its producer behind the products of its last tile, because then what was loaded from it has been used. To have started loading is
not enough: TMA writes shared memory through another proxy, and no barrier lets it wait for a load that is on its way. Only `fence_async_shared`
would, and costs more (docs/kernels.md).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from halfbyte.kernels.sm90.operands import RUN, accumulator_layout, decode_tile, decode_tiles, load_run, load_tile

WARP_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))  # of accumulators of mma.sync


@gluon.jit
def multiply(x, w, x_count, w_count, decodings, SPEC: gl.constexpr, CONSUMER: gl.constexpr, SIZE0: gl.constexpr, SIZE1: gl.constexpr):
    """The row tiles of a consumer, 64 weight rows each, times SIZE0 + SIZE1 tokens, over all of K: the accumulators of the first tile, then those of
    the second, and the advanced counters."""
    ELEMENTS: gl.constexpr = 4 if SPEC.fp8 else 2
    ROW_TILES: gl.constexpr = SPEC.row_tiles_per_consumer
    accumulators = ()
    BY_WARPS: gl.constexpr = SPEC.warp_rows >= SIZE0 + SIZE1
    LAYOUT: gl.constexpr = WARP_LAYOUT if BY_WARPS else accumulator_layout(SIZE0, ELEMENTS)
    for _ in gl.static_range(ROW_TILES):
        accumulators = accumulators + (gl.zeros((64, SIZE0), gl.float32, layout=LAYOUT),)
        if SIZE1 > 0:
            accumulators = accumulators + (gl.zeros((64, SIZE1), gl.float32, layout=accumulator_layout(SIZE1, ELEMENTS)),)
    RUNS: gl.constexpr = SPEC.column_tiles // RUN
    LAST: gl.constexpr = SPEC.column_tiles % RUN
    FOLLOWED: gl.constexpr = RUNS if LAST != 0 else RUNS - 1
    tiles = ()
    if SPEC.words_ahead or BY_WARPS:
        w.wait(w_count)
        tiles = load_run(w, w_count.stage(), SPEC, CONSUMER)
    for run in range(RUNS):
        accumulators, tiles, x_count, w_count = _multiply_run(
            accumulators, tiles, x, w, x_count, w_count, decodings, run < FOLLOWED, SPEC, CONSUMER, RUN, SIZE0, SIZE1
        )
    if LAST != 0:
        accumulators, tiles, x_count, w_count = _multiply_run(
            accumulators, tiles, x, w, x_count, w_count, decodings, False, SPEC, CONSUMER, LAST, SIZE0, SIZE1
        )
    return accumulators, x_count, w_count


@gluon.jit
def _multiply_run(
    accumulators, tiles, x, w, x_count, w_count, decodings, is_followed, SPEC: gl.constexpr, CONSUMER: gl.constexpr, COUNT: gl.constexpr,
    SIZE0: gl.constexpr, SIZE1: gl.constexpr,
):  # fmt: skip
    """The first COUNT tiles of a run. WORDS_AHEAD: `tiles` are theirs, and what returns is that of the next run, loaded behind the last product."""
    if SPEC.warp_rows >= SIZE0 + SIZE1:
        return _multiply_run_by_warps(accumulators, tiles, x, w, x_count, w_count, decodings, is_followed, SPEC, CONSUMER, COUNT, SIZE0)
    else:  # noqa: RET505
        return _multiply_run_by_warpgroups(accumulators, tiles, x, w, x_count, w_count, decodings, is_followed, SPEC, CONSUMER, COUNT, SIZE0, SIZE1)


@gluon.jit
def _multiply_run_by_warps(
    accumulators, tiles, x, w, x_count, w_count, decodings, is_followed, SPEC: gl.constexpr, CONSUMER: gl.constexpr, COUNT: gl.constexpr,
    SIZE: gl.constexpr,
):  # fmt: skip
    """One ring; `tiles` as if WORDS_AHEAD. ptxas keeps the products between the loads of a stage and its way back where a branch follows them. At the
    end of K none does, and a fence waits for the loads."""
    ROW_TILES: gl.constexpr = SPEC.row_tiles_per_consumer
    W_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, WARP_LAYOUT, 2)
    X_LAYOUT: gl.constexpr = gl.DotOperandLayout(1, WARP_LAYOUT, 2)
    stage = w_count.stage()
    for c in gl.static_range(COUNT):
        columns = _columns(x.first.index(stage), 0, SIZE, c * 64, 64).permute((1, 0)).load(X_LAYOUT)
        new = ()
        for t in gl.static_range(ROW_TILES):
            operand = decode_tile(tiles[t * RUN + c], decodings[t], W_LAYOUT, c % 2 == 1, SPEC)
            new = new + (mma_v2(operand, columns, accumulators[t]),)
        accumulators = new
    following = w_count.next()
    if is_followed:
        w.wait(following)
    if COUNT < RUN:
        fence_async_shared()
    w.give_back(stage)
    if is_followed:
        tiles = load_run(w, following.stage(), SPEC, CONSUMER)
    return accumulators, tiles, following, following


@gluon.jit
def _multiply_run_by_warpgroups(
    accumulators, tiles, x, w, x_count, w_count, decodings, is_followed, SPEC: gl.constexpr, CONSUMER: gl.constexpr, COUNT: gl.constexpr,
    SIZE0: gl.constexpr, SIZE1: gl.constexpr,
):  # fmt: skip
    ROW_TILES: gl.constexpr = SPEC.row_tiles_per_consumer
    STEP_K: gl.constexpr = SPEC.step_k
    PARTS: gl.constexpr = 2 if SIZE1 > 0 else 1
    TILES: gl.constexpr = SPEC.product_tiles if COUNT == RUN else 1
    ELEMENTS: gl.constexpr = 4 if SPEC.fp8 else 2
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, accumulator_layout(SIZE0, ELEMENTS), ELEMENTS)
    WORDS_AHEAD: gl.constexpr = SPEC.words_ahead
    ONE_RING: gl.constexpr = SPEC.one_ring
    if ONE_RING:
        x_count = w_count
    w_stage = w_count.stage()
    if not WORDS_AHEAD:
        w.wait(w_count)
    for c in gl.static_range(0, COUNT, TILES):
        x_stage = x_count.stage()
        for t in gl.static_range(ROW_TILES):
            if WORDS_AHEAD:
                operand = decode_tiles(tiles, decodings[t], OPERAND, t * RUN + c, TILES, SPEC)
            else:
                tile = load_tile(w, w_stage, CONSUMER * ROW_TILES + t, c, SPEC)
                operand = decode_tile(tile, decodings[t], OPERAND, c % 2 == 1, SPEC)
            if c * 64 % STEP_K == 0 and t == 0 and not ONE_RING:
                x.wait(x_count)
            accumulators = _step(operand, accumulators, x, x_stage, t * PARTS, c * 64 % STEP_K, SIZE0, SIZE1)
            # One step stays in flight while the next is dequantised, but none across the loop's back edge.
            if c + TILES == COUNT and t == ROW_TILES - 1:
                if not ONE_RING:
                    w.give_back(w_stage)
                if WORDS_AHEAD:  # noqa: SIM102 (decided when compiling)
                    if is_followed:
                        w.wait(w_count.next())
                        tiles = load_run(w, w_count.next().stage(), SPEC, CONSUMER)
                accumulators = _wait(accumulators, 0)
            elif c + t > 0:
                accumulators = _wait(accumulators, PARTS)
            if c > 0 and t == 0 and c * 64 % STEP_K == 0:
                x.give_back(x_count.last_stage())
        if (c + TILES) * 64 % STEP_K == 0 or c + TILES == COUNT:
            x_count = x_count.next()
    x.give_back(x_count.last_stage())
    return accumulators, tiles, x_count, w_count.next()


@gluon.jit
def _step(w, accumulators, x, stage, FIRST: gl.constexpr, COLUMN: gl.constexpr, SIZE0: gl.constexpr, SIZE1: gl.constexpr):
    """Add w [64, K] times columns COLUMN .. COLUMN + K - 1 of the stage's SIZE0 + SIZE1 rows of x to the accumulators from FIRST on."""
    PARTS: gl.constexpr = 2 if SIZE1 > 0 else 1
    K: gl.constexpr = w.shape[1]
    low, high = x.first, x.second
    x0 = _columns(low.index(stage), 0, SIZE0, COLUMN, K)
    new = (warpgroup_mma(w, x0.permute((1, 0)), accumulators[FIRST], is_async=True),)
    if SIZE1 > 0:
        x1 = _columns(low.index(stage), SIZE0, SIZE1, COLUMN, K) if low.shape[1] > SIZE0 else _columns(high.index(stage), 0, SIZE1, COLUMN, K)
        ELEMENTS: gl.constexpr = 32 // w.dtype.primitive_bitwidth
        w1 = gl.convert_layout(w, gl.DotOperandLayout(0, accumulator_layout(SIZE1, ELEMENTS), ELEMENTS), assert_trivial=True)
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
def _columns(x, FIRST: gl.constexpr, ROWS: gl.constexpr, COLUMN: gl.constexpr, COLUMNS: gl.constexpr):
    if x.shape[1] != COLUMNS:
        x = x.slice(COLUMN, COLUMNS, dim=1)
    if x.shape[0] != ROWS:
        x = x.slice(FIRST, ROWS, dim=0)
    return x
