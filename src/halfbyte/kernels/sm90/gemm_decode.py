"""Grouped GEMM for few tokens per expert: y[row] = x[row] @ w[expert of row]^T, FP4 weights, bf16 activations, fp32 accumulation.

    x        [rows, K] bf16, columns in natural order; SCALED: multiplied by one fp32 a row, `x_scale` (fp8 codes, which are exact in bf16);
             IS_ROUNDED: rounded to fp8 here
    w        `HopperMatrix` [E, N, K]
    y        [rows, I] bf16 = activation(x @ w^T * multiplier + bias) where the matrix is w13, or [rows, N] bf16 or fp32

One program owns 64 weight rows and up to 8 rows of x of one expert, and streams the weights once: 16 bytes a thread straight from global memory
into registers, four tiles ahead, dequantised there and multiplied by mma.sync m16n8k16. No barriers in the loop: the warps of a program run freely,
and what limits the kernel is the memory or the instruction issue.

x comes as B fragments, 32 bytes a thread, from L1 and L2; or (direct) from shared memory, where a program first puts the rows it needs, rounded to
fp8 on the way if activations are (`rows_in_shared`). Loads from there need neither masks nor 64-bit addresses: 280 to 300 instructions a warp for
four tiles instead of 330 to 360, and with fp8 no launches that round. The same bits either way.

Where programs are so few that a warp is alone on its scheduler, its latency limits: a program has SLICES times four warps then, each four with a
slice of the columns, whose sums meet in shared memory at the end.

Two ways to find the rows of an expert:
    direct   up to 8 tokens: a program belongs to one slot of `ids`, returns unless it is the first slot with this expert, and its rows are the tokens
             that chose the expert. No sorting pass. y has one row a slot; a token that names an expert twice has its row at the first of the two.
             A few slots make few programs: for w2 each may do one of PARTS parts of K, and y [PARTS, rows, N] fp32 is added up in `combine`.
    items    the work list of `kernels.shared.sort`: rows sorted by expert.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc

from halfbyte.gluon_compat import aggregate
from halfbyte.kernels.sm90.configs import DECODE_ROWS
from halfbyte.kernels.sm90.epilogue import activate, split_halves
from halfbyte.kernels.sm90.rows_in_shared import allocate_rows, load_block, put_row
from halfbyte.weights.hopper.dequant_bf16 import (
    dequantize,
    exponent_bias,
    scale_layout,
    scale_offsets,
    split_scales,
    stored_tile,
    word_layout,
    word_offsets,
)
from halfbyte.weights.hopper.fragment_order import column_at

NUM_WARPS = 4  # of a slice
ROWS = gl.constexpr(DECODE_ROWS)  # of x per program


@aggregate
class Item:
    """Rows of one expert: of the work list `num_rows` from `row_start` on, or (direct) those of the tokens that name `expert_id`."""

    expert: gl.tensor
    expert_id: gl.tensor
    row_start: gl.tensor
    num_rows: gl.tensor

    @gluon.constexpr_function
    def __init__(self, expert, expert_id, row_start, num_rows):
        self.expert = expert
        self.expert_id = expert_id
        self.row_start = row_start
        self.num_rows = num_rows


@gluon.constexpr_function
def _x_layout(warps: int) -> gl.DistributedLinearLayout:
    """[warps, ROWS, 64]: each warp has its own block, a thread 16 columns of a row."""
    in_warp = [[0, 0, 16], [0, 0, 32], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8]], in_warp, [[1 << bit, 0, 0] for bit in range(warps.bit_length() - 1)], [], [warps, 8, 64]
    )


@gluon.constexpr_function
def _sum_layout(slices: int) -> gl.DistributedLinearLayout:
    """[slices, 64, ROWS]: a thread has every slice of two rows that lie 8 apart; all slices have the same."""
    registers = [[1 << bit, 0, 0] for bit in range(slices.bit_length() - 1)] + [[0, 8, 0]]
    warps = [[0, 4, 0], [0, 16, 0], [0, 32, 0]] + [[0, 0, 0]] * (slices.bit_length() - 2)
    return gl.DistributedLinearLayout(registers, [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0]], warps, [], [slices, 64, 8])


@gluon.jit
def _load_x(source, step, STEPS: gl.constexpr, K_MASK: gl.constexpr, MMA: gl.constexpr, SPEC: gl.constexpr):
    """Block `step` of 64 columns of each slice as B operands [warps, 64, 8], in fragment order like the weights: no data moves between threads.

    source: the rows in shared memory; or [warps, ROWS, 64] pointers of block 0, masks and columns.
    """
    WARPS: gl.constexpr = 4 * SPEC.slices
    if SPEC.rows_in_shared or not K_MASK:
        step = gl.minimum(step, STEPS - 1)
    if SPEC.rows_in_shared:
        x = load_block(source, step)
    else:
        pointers, mask, column = source
        if K_MASK:
            mask = mask & (column + step * 64 < SPEC.columns)
        x = gl.load(pointers + step * 64, mask=mask, other=0.0)
    x = gl.permute(gl.reshape(x, (WARPS, ROWS, 4, 4, 2, 2)), (0, 3, 4, 2, 5, 1))  # token, t, s, p, e to s, p, t, e, token
    return gl.convert_layout(gl.reshape(x, (WARPS, 64, ROWS)), gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)


@gluon.jit
def _sum_of_slices(accumulator, SLICES: gl.constexpr):
    """[warps, 16, ROWS] to [64, ROWS], the slices added up in order."""
    if SLICES == 1:
        total = gl.convert_layout(gl.reshape(accumulator, (64, ROWS)), gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]), assert_trivial=True)
    else:
        sums = gl.allocate_shared_memory(gl.float32, [SLICES, 64, ROWS], gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0]))
        sums.store(gl.reshape(accumulator, (SLICES, 64, ROWS)))
        total = gl.sum(sums.load(_sum_layout(SLICES)), 0)
    return total


@gluon.jit
def _first_slot_of(ids_ptr, token, expert, num_tokens, TOP_K: gl.constexpr):
    """For each token the slot at which it names `expert`, or -1: int32 like `token`."""
    slot = gl.full(token.shape, -1, gl.int32, layout=token.type.layout)
    for j in gl.static_range(TOP_K - 1, -1, -1):
        named = gl.load(ids_ptr + token * TOP_K + j, mask=token < num_tokens, other=-1) == expert
        slot = gl.where(named & (token < num_tokens), token * TOP_K + j, slot)
    return slot


@gluon.jit
def _slice_of_rows(LAYOUT: gl.constexpr, SLICES: gl.constexpr):
    """Which slice of the columns the warp of each row of words, or of scale words, has: int32 [16 SLICES, 1], or 0."""
    return 0 if SLICES == 1 else (gl.arange(0, 16 * SLICES, layout=gl.SliceLayout(1, LAYOUT)) // 16)[:, None]


@gluon.jit
def _load_tile(pointers, tile, COLUMN_TILES: gl.constexpr, CLAMP: gl.constexpr):
    """The words of a tile, or of the last one."""
    if CLAMP:
        tile = gl.minimum(tile, COLUMN_TILES - 1)
    return gl.load(pointers + tile * 512, eviction_policy="evict_first")


@gluon.jit
def _load_run(pointers, run, RUNS: gl.constexpr, SCALES: gl.constexpr, CLAMP: gl.constexpr):
    """The scales of a run of four tiles, or of the last one."""
    if CLAMP:
        run = gl.minimum(run, RUNS - 1)
    return gl.load(pointers + run * SCALES, eviction_policy="evict_first")


@gluon.jit
def _put_rows(x, x_row, is_row, token, first_column, STEPS: gl.constexpr, SPEC: gl.constexpr):
    """The rows of x that are there, in shared memory, and their scales [ROWS]."""
    TOKENS: gl.constexpr = SPEC.rows_in_shared
    rows = allocate_rows(STEPS, SPEC.slices, TOKENS)
    scales = gl.zeros_like(x_row).to(gl.float32)
    for t in gl.static_range(TOKENS):
        row = gl.max(gl.where((token == t) & is_row, x_row, -1), 0)
        if row >= 0:
            scale = put_row(
                x + row.to(gl.int64) * SPEC.x_stride, rows, t, first_column, STEPS, SPEC.columns, SPEC.is_rounded, SPEC.words_for == "fp8"
            )
            scales = gl.where(token == t, scale, scales)
    return rows, scales


@gluon.jit(do_not_specialize=["num_tokens", "expert_offset", "num_experts"])
def grouped_gemm_w4a16_decode(tensors, num_tokens, expert_offset, num_experts, SPEC: gl.constexpr):
    """tensors: `DecodeTensors`. SPEC: a `DecodeSpec`."""
    FLAT: gl.constexpr = gl.BlockedLayout([2], [32], [4 * SPEC.slices], [0])
    index = gl.program_id(0) // SPEC.row_tiles
    row_tile = gl.program_id(0) % SPEC.row_tiles
    if SPEC.is_w13:
        gdc.gdc_wait()  # ids or the work list may still be in the making; the second GEMM starts after the first one has seen them
        gdc.gdc_launch_dependents()
    if SPEC.direct:
        slots = gl.arange(0, 64, layout=FLAT)
        expert_id = gl.load(tensors.rows + index)
        ids = gl.load(tensors.rows + slots, mask=slots < index, other=-1)
        expert = expert_id - expert_offset
        seen = gl.max((ids == expert_id).to(gl.int32), 0)
        is_active = (expert >= 0) & (expert < num_experts) & (seen == 0)
        row_start = gl.to_tensor(0)
        num_rows = gl.to_tensor(0)
    else:
        is_active = index < gl.load(tensors.num_items)
        expert = 0
        row_start = 0
        num_rows = 0
        expert_id = gl.to_tensor(0)
        if is_active:
            expert = gl.load(tensors.rows + index * 4)
            row_start = gl.load(tensors.rows + index * 4 + 1)
            num_rows = gl.load(tensors.rows + index * 4 + 2)
    if is_active:
        _tile(tensors, Item(expert, expert_id, row_start, num_rows), row_tile, num_tokens, SPEC)


@gluon.jit
def _tile(tensors, item, row_tile, num_tokens, SPEC: gl.constexpr):
    ROW_TILES: gl.constexpr = SPEC.row_tiles
    PARTS: gl.constexpr = SPEC.parts
    SLICES: gl.constexpr = SPEC.slices
    K: gl.constexpr = SPEC.columns
    NVFP4: gl.constexpr = SPEC.nvfp4
    WORDS_FOR: gl.constexpr = SPEC.words_for
    EXCHANGED: gl.constexpr = SPEC.rows_in_shared > 0 and WORDS_FOR == "fp8"
    WARPS: gl.constexpr = 4 * SLICES
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])  # a product a warp
    TOTAL: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]) if SLICES == 1 else gl.SliceLayout(0, _sum_layout(SLICES))
    X_LAYOUT: gl.constexpr = _x_layout(WARPS)
    COLUMN_TILES: gl.constexpr = (K + 63) // 64
    RUNS: gl.constexpr = (COLUMN_TILES + 3) // 4
    SLICE_RUNS: gl.constexpr = (RUNS + PARTS * SLICES - 1) // (PARTS * SLICES)
    STEPS: gl.constexpr = SLICE_RUNS * 4
    K_MASK: gl.constexpr = SLICE_RUNS * SLICES * PARTS * 256 != K
    CLAMP: gl.constexpr = SLICE_RUNS * SLICES * PARTS * 4 != COLUMN_TILES  # a slice may end before its last tile: then x is masked to zero
    SCALES: gl.constexpr = 128 if NVFP4 else 64

    expert = item.expert
    bias = exponent_bias(0 if NVFP4 else gl.load(tensors.shift + expert), WARPS)
    matrix_tile = expert * ROW_TILES + stored_tile(row_tile, ROW_TILES, SPEC.gated)
    word_pointers = tensors.words + matrix_tile.to(gl.int64) * (COLUMN_TILES * 512) + word_offsets(WARPS)
    scale_pointers = tensors.scales + matrix_tile.to(gl.int64) * (RUNS * SCALES) + scale_offsets(NVFP4, WARPS)
    part = 0 if PARTS == 1 else gl.program_id(1)
    word_run = part * (SLICES * SLICE_RUNS) + _slice_of_rows(word_layout(WARPS), SLICES) * SLICE_RUNS
    scale_run = part * (SLICES * SLICE_RUNS) + _slice_of_rows(scale_layout(WARPS), SLICES) * SLICE_RUNS
    if not CLAMP:
        word_pointers += word_run * 2048
        scale_pointers += scale_run * SCALES
        word_run = 0
        scale_run = 0
    # Four tiles of words and one run of scales are always on their way.
    queue = ()
    for c in gl.static_range(4):
        queue = queue + (_load_tile(word_pointers, word_run * 4 + c, COLUMN_TILES, CLAMP),)
    next_scales = _load_run(scale_pointers, scale_run, RUNS, SCALES, CLAMP)

    # What the sums will be multiplied by and where they go is read here, so that nothing waits for it after the last product.
    i = gl.arange(0, 64, layout=gl.SliceLayout(1, TOTAL))
    multiplier = gl.load(tensors.multiplier + expert * 2 + i // 8 % 2)
    if SPEC.has_bias:
        tile_bias = gl.load(tensors.bias + matrix_tile * 64 + i)
        if part > 0:
            tile_bias = gl.zeros_like(tile_bias)  # once: the parts are added up
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, X_LAYOUT)))
    if SPEC.direct:
        slot = _first_slot_of(tensors.rows, row, item.expert_id, num_tokens, SPEC.top_k)
        is_row = slot >= 0
        x_row = slot // SPEC.top_k if SPEC.is_w13 else slot
    else:
        is_row = row < item.num_rows
        x_row = item.row_start + row
        if SPEC.is_w13:
            x_row = gl.load(tensors.token_of_row + x_row, mask=is_row, other=0)
    if not SPEC.is_w13:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    if SPEC.scaled:
        row_scale = gl.load(tensors.x_scale + x_row, mask=is_row, other=0.0)
    if SPEC.rows_in_shared:
        x, x_scales = _put_rows(tensors.x, x_row, is_row, row, part * (SLICES * STEPS * 64), STEPS, SPEC)
        if SPEC.is_rounded:
            row_scale = x_scales
    else:
        warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, X_LAYOUT)))[:, None, None]
        column = gl.arange(0, 64, layout=gl.SliceLayout(0, gl.SliceLayout(1, X_LAYOUT)))[None, None, :]
        column += (part * SLICES + warp // 4) * (STEPS * 64)
        x = tensors.x + gl.where(is_row, x_row, 0).to(gl.int64)[None, :, None] * SPEC.x_stride + column, is_row[None, :, None] & (column >= 0), column
    X_AHEAD: gl.constexpr = 1 if SPEC.rows_in_shared else 2  # blocks of x on their way
    x_queue = ()
    for c in gl.static_range(X_AHEAD):
        x_queue = x_queue + (_load_x(x, c, STEPS, K_MASK, MMA, SPEC),)

    accumulator = gl.zeros((WARPS, 16, ROWS), gl.float32, layout=MMA)
    # 0, which the compiler cannot always know: it would unroll two runs, and keep some of their values in memory.
    first = 0 if SLICES == 1 and SLICE_RUNS > 2 else gl.minimum(num_tokens, 0)
    for run in range(first, first + SLICE_RUNS):
        upcoming = gl.minimum(run + 1, SLICE_RUNS - 1)
        scales_low, scales_high = split_scales(next_scales)
        next_scales = _load_run(scale_pointers, scale_run + upcoming, RUNS, SCALES, CLAMP)
        for c in gl.static_range(4):
            operand = x_queue[0]
            x_queue = x_queue[1:] + (_load_x(x, run * 4 + c + X_AHEAD, STEPS, K_MASK, MMA, SPEC),)
            scales = scales_low if c < 2 else scales_high
            w = dequantize(queue[0], scales, bias, gl.DotOperandLayout(0, MMA, 2), c % 2 == 1, NVFP4, WORDS_FOR, EXCHANGED)
            queue = queue[1:] + (_load_tile(word_pointers, (word_run + upcoming) * 4 + c, COLUMN_TILES, CLAMP),)
            accumulator = mma_v2(w, operand, accumulator)

    value = _sum_of_slices(accumulator, SLICES)
    if SPEC.scaled or SPEC.is_rounded:
        value = value * gl.convert_layout(row_scale, gl.SliceLayout(0, TOTAL))[None, :]
    value = value * multiplier[:, None]
    if SPEC.has_bias:
        value = value + tile_bias[:, None]
    n = row_tile * 64 + i
    if SPEC.gated:
        gate, up = split_halves(value, ROWS)
        value = activate(gate, up, SPEC.kind, SPEC.alpha, SPEC.beta, SPEC.limit)
        n = row_tile // 2 * 64 + column_at(row_tile % 2 * 32 + gl.arange(0, 32, layout=gl.SliceLayout(1, value.type.layout)))
    elif SPEC.is_w13:
        value = activate(value, value, SPEC.kind, SPEC.alpha, SPEC.beta, SPEC.limit)
        n = row_tile * 64 + column_at(i)
    if SPEC.direct:
        y_row = gl.convert_layout(slot, gl.SliceLayout(0, value.type.layout))
        is_y_row = y_row >= 0
        y_row += part * num_tokens * SPEC.top_k
    else:
        token = gl.arange(0, ROWS, layout=gl.SliceLayout(0, value.type.layout))
        y_row = item.row_start + token
        is_y_row = token < item.num_rows
    pointers = tensors.y + (gl.where(is_y_row, y_row, 0).to(gl.int64) * SPEC.y_columns)[None, :] + n[:, None]
    gl.store(pointers, value.to(tensors.y.dtype.element_ty), mask=is_y_row[None, :] & (n < SPEC.y_columns)[:, None])
