"""Grouped GEMM for few tokens an expert: y[row] = x[row] @ w[expert of row]^T, FP4 weights, bf16 activations, fp32 accumulation.

    x        [rows, K] bf16, columns in natural order; SCALED: multiplied by one fp32 a row, `x_scale` (fp8 codes, which are exact in bf16)
    w        `HopperMatrix` [E, N, K]
    y        [rows, I] bf16 = activation(x @ w^T * multiplier + bias) where the matrix is w13, or [rows, N] bf16 or fp32

One program owns NB tiles of 64 weight rows and up to TB rows of x of one expert, and streams the weights once: 16 bytes a thread straight from global
memory into registers, four tiles ahead, dequantised there and multiplied by mma.sync m16n8k16. x comes from L1 and L2 as B fragments, 32 bytes a
thread. No shared memory and no barriers: the warps of a program run freely, and what limits the kernel is the memory or the instruction issue.

Two ways to find the rows of an expert:
    direct   up to 8 tokens: a program belongs to one slot of `ids`, returns unless it is the first slot with this expert, and its rows are the tokens
             that chose the expert. No sorting pass. y has one row a slot; a token that names an expert twice has its row at the first of the two.
    items    the work list of `kernels.triton.permute`: rows sorted by expert.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc

from halfbyte.kernels.gluon_sm90.epilogue import RELU2, activate, slot_to_column, split_halves
from halfbyte.weights.layouts.hopper_dequant import dequantize, exponent_bias, scale_offsets, split_scales, word_offsets

NUM_WARPS = 4


@gluon.jit
def _load_x(pointers, mask, column, MMA: gl.constexpr, TB: gl.constexpr, K: gl.constexpr, K_MASK: gl.constexpr):
    """One [TB, 64] block of x as a B operand [64, TB], its columns in slot order like the weights': no data moves between threads."""
    if K_MASK:
        mask = mask & (column < K)
    x = gl.load(pointers, mask=mask, other=0.0)
    x = gl.permute(gl.reshape(x, (TB, 4, 4, 2, 2)), (2, 3, 1, 4, 0))  # token, t, s, p, e to s, p, t, e, token
    return gl.convert_layout(gl.reshape(x, (64, TB)), gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)


@gluon.jit
def _first_slot_of(ids_ptr, token, expert, num_tokens, TOP_K: gl.constexpr):
    """For each token the slot at which it names `expert`, or -1: int32 like `token`."""
    slot = gl.full(token.shape, -1, gl.int32, layout=token.type.layout)
    for j in gl.static_range(TOP_K - 1, -1, -1):
        named = gl.load(ids_ptr + token * TOP_K + j, mask=token < num_tokens, other=-1) == expert
        slot = gl.where(named & (token < num_tokens), token * TOP_K + j, slot)
    return slot


@gluon.jit(do_not_specialize=["num_tokens", "expert_offset", "num_experts", "split_stride"])
def grouped_gemm_w4a16_decode(
    x_ptr, x_scale_ptr, words_ptr, scales_ptr, shift_ptr, multiplier_ptr, bias_ptr, y_ptr,
    ids_ptr, items_ptr, num_items_ptr, token_of_row_ptr,
    num_tokens, expert_offset, num_experts, split_stride,
    TOP_K: gl.constexpr, K: gl.constexpr, X_STRIDE: gl.constexpr, ROW_TILES: gl.constexpr, N: gl.constexpr, Y_STRIDE: gl.constexpr,
    NVFP4: gl.constexpr, IS_W13: gl.constexpr, KIND: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr, LIMIT: gl.constexpr,
    HAS_BIAS: gl.constexpr, SCALED: gl.constexpr, DIRECT: gl.constexpr, TB: gl.constexpr, NB: gl.constexpr, SPLIT: gl.constexpr,
    X_AHEAD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    GROUPS: gl.constexpr = (ROW_TILES + NB - 1) // NB
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])
    FLAT: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    pid = gl.program_id(0)
    index = pid // (GROUPS * SPLIT)
    group = pid // SPLIT % GROUPS
    part = pid % SPLIT
    if PDL and IS_W13:
        gdc.gdc_wait()  # ids or the work list may still be in the making; the second GEMM starts after the first one has seen them
        gdc.gdc_launch_dependents()
    if DIRECT:
        slots = gl.arange(0, 64, layout=FLAT)
        expert_id = gl.load(ids_ptr + index)
        ids = gl.load(ids_ptr + slots, mask=slots < index, other=-1)
        expert = expert_id - expert_offset
        seen = gl.max((ids == expert_id).to(gl.int32), 0)
        is_active = (expert >= 0) & (expert < num_experts) & (seen == 0)
        row_start = 0
        num_rows = 0
    else:
        is_active = index < gl.load(num_items_ptr)
        expert = 0
        row_start = 0
        num_rows = 0
        expert_id = 0
        if is_active:
            expert = gl.load(items_ptr + index * 4)
            row_start = gl.load(items_ptr + index * 4 + 1)
            num_rows = gl.load(items_ptr + index * 4 + 2)
    if is_active:
        _tile(
            x_ptr, x_scale_ptr, words_ptr, scales_ptr, shift_ptr, multiplier_ptr, bias_ptr, y_ptr, ids_ptr, token_of_row_ptr, num_tokens,
            split_stride, expert, expert_id, row_start, num_rows, group, part, TOP_K, K, X_STRIDE, ROW_TILES, N, Y_STRIDE, NVFP4, IS_W13, KIND,
            ALPHA, BETA, LIMIT, HAS_BIAS, SCALED, DIRECT, TB, NB, SPLIT, X_AHEAD, PDL, MMA,
        )  # fmt: skip


@gluon.jit
def _tile(
    x_ptr, x_scale_ptr, words_ptr, scales_ptr, shift_ptr, multiplier_ptr, bias_ptr, y_ptr, ids_ptr, token_of_row_ptr, num_tokens, split_stride,
    expert, expert_id, row_start, num_rows, group, part,
    TOP_K: gl.constexpr, K: gl.constexpr, X_STRIDE: gl.constexpr, ROW_TILES: gl.constexpr, N: gl.constexpr, Y_STRIDE: gl.constexpr,
    NVFP4: gl.constexpr, IS_W13: gl.constexpr, KIND: gl.constexpr, ALPHA: gl.constexpr, BETA: gl.constexpr, LIMIT: gl.constexpr,
    HAS_BIAS: gl.constexpr, SCALED: gl.constexpr, DIRECT: gl.constexpr, TB: gl.constexpr, NB: gl.constexpr, SPLIT: gl.constexpr,
    X_AHEAD: gl.constexpr, PDL: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    TILES: gl.constexpr = (K + 63) // 64
    RUNS: gl.constexpr = (TILES + 3) // 4
    RUNS_PER_PART: gl.constexpr = (RUNS + SPLIT - 1) // SPLIT
    K_MASK: gl.constexpr = RUNS_PER_PART * SPLIT * 256 != K
    SCALES: gl.constexpr = 128 if NVFP4 else 64
    TOKEN_BASES: gl.constexpr = [[0, 1], [0, 2], [0, 4], [0, 8]] + ([] if TB == 8 else [[8, 0]] if TB == 16 else [[8, 0], [16, 0]])
    X_LAYOUT: gl.constexpr = gl.DistributedLinearLayout(TOKEN_BASES, [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]], [[0, 0], [0, 0]], [], [TB, 64])

    words = word_offsets()
    scale_entries = scale_offsets(NVFP4)
    first = part * RUNS_PER_PART
    bias = exponent_bias(0 if NVFP4 else gl.load(shift_ptr + expert))
    word_pointers = ()
    scale_pointers = ()
    for b in gl.static_range(NB):
        matrix_tile = (expert * ROW_TILES + gl.minimum(group * NB + b, ROW_TILES - 1)).to(gl.int64)
        word_pointers = word_pointers + (words_ptr + matrix_tile * (TILES * 512) + words,)
        scale_pointers = scale_pointers + (scales_ptr + matrix_tile * (RUNS * SCALES) + scale_entries,)
    # Four tiles of words and one run of scales are always on their way.
    queue = ()
    for c in gl.static_range(4):
        for b in gl.static_range(NB):
            queue = queue + (gl.load(word_pointers[b] + gl.minimum(first * 4 + c, TILES - 1) * 512, eviction_policy="evict_first"),)
    next_scales = ()
    for b in gl.static_range(NB):
        next_scales = next_scales + (gl.load(scale_pointers[b] + gl.minimum(first, RUNS - 1) * SCALES, eviction_policy="evict_first"),)

    row = gl.arange(0, TB, layout=gl.SliceLayout(1, X_LAYOUT))
    if PDL and not IS_W13:
        gdc.gdc_wait()
        gdc.gdc_launch_dependents()
    if DIRECT:
        slot = _first_slot_of(ids_ptr, row, expert_id, num_tokens, TOP_K)
        is_row = slot >= 0
        x_row = slot // TOP_K if IS_W13 else slot
    else:
        is_row = row < num_rows
        x_row = row_start + row
        if IS_W13:
            x_row = gl.load(token_of_row_ptr + x_row, mask=is_row, other=0)
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, X_LAYOUT))[None, :] + first * 256
    x_pointers = x_ptr + gl.where(is_row, x_row, 0).to(gl.int64)[:, None] * X_STRIDE + column
    x_mask = is_row[:, None] & (column >= 0)
    x_queue = ()
    for c in gl.static_range(X_AHEAD):
        x_queue = x_queue + (_load_x(x_pointers + c * 64, x_mask, column + c * 64, MMA, TB, K, K_MASK),)

    accumulators = ()
    for _ in gl.static_range(NB):
        accumulators = accumulators + (gl.zeros((64, TB), gl.float32, layout=MMA),)
    for run in range(RUNS_PER_PART):
        upcoming = gl.minimum(first + run + 1, RUNS - 1)
        low = ()
        high = ()
        fetched = ()
        for b in gl.static_range(NB):
            scales_low, scales_high = split_scales(next_scales[b])
            low = low + (scales_low,)
            high = high + (scales_high,)
            fetched = fetched + (gl.load(scale_pointers[b] + upcoming * SCALES, eviction_policy="evict_first"),)
        next_scales = fetched
        for c in gl.static_range(4):
            x = x_queue[0]
            step = run * 4 + c + X_AHEAD
            if not K_MASK:
                step = gl.minimum(step, RUNS_PER_PART * 4 - 1)
            x_queue = x_queue[1:] + (_load_x(x_pointers + step * 64, x_mask, column + step * 64, MMA, TB, K, K_MASK),)
            updated = ()
            for b in gl.static_range(NB):
                w = dequantize(queue[0], low[b] if c < 2 else high[b], bias, gl.DotOperandLayout(0, MMA, 2), c % 2 == 1, NVFP4)
                tile = upcoming * 4 + c
                if TILES % 4 != 0:
                    tile = gl.minimum(tile, TILES - 1)  # past the end x is masked to zero
                queue = queue[1:] + (gl.load(word_pointers[b] + tile * 512, eviction_policy="evict_first"),)
                updated = updated + (mma_v2(w, x, accumulators[b]),)
            accumulators = updated

    if SCALED:
        scaled_row = gl.arange(0, TB, layout=gl.SliceLayout(0, MMA))
        if DIRECT:
            scale_row = _first_slot_of(ids_ptr, scaled_row, expert_id, num_tokens, TOP_K)
            is_scaled = scale_row >= 0
            if IS_W13:
                scale_row = scale_row // TOP_K
        else:
            scale_row = row_start + scaled_row
            is_scaled = scaled_row < num_rows
            if IS_W13:
                scale_row = gl.load(token_of_row_ptr + scale_row, mask=is_scaled, other=0)
        x_scale = gl.load(x_scale_ptr + scale_row, mask=is_scaled, other=0.0)[None, :]
        scaled = ()
        for b in gl.static_range(NB):
            scaled = scaled + (accumulators[b] * x_scale,)
        accumulators = scaled
    multiplier0 = gl.load(multiplier_ptr + expert * 2)
    multiplier1 = gl.load(multiplier_ptr + expert * 2 + 1)
    y_ptr += part * split_stride
    for b in gl.static_range(NB):
        tile = group * NB + b
        if tile < ROW_TILES:
            tile_bias = bias_ptr + (expert * ROW_TILES + tile) * 64
            if IS_W13 and KIND != RELU2:
                gate, up = split_halves(accumulators[b], TB)
                i = gl.arange(0, 32, layout=gl.SliceLayout(1, gate.type.layout))
                gate = gate * multiplier0
                up = up * multiplier1
                if HAS_BIAS:
                    entry = tile_bias + i // 8 * 16 + i % 8
                    gate = gate + gl.load(entry)[:, None]
                    up = up + gl.load(entry + 8)[:, None]
                value = activate(gate, up, KIND, ALPHA, BETA, LIMIT)
                n = tile // 2 * 64 + slot_to_column(tile % 2 * 32 + i)
            else:
                i = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
                value = accumulators[b] * multiplier0
                if HAS_BIAS:
                    value = value + gl.load(tile_bias + i, mask=(i >= 0) & (part == 0), other=0.0)[:, None]  # the parts are added up later
                n = tile * 64 + i
                if IS_W13:
                    value = activate(value, value, KIND, ALPHA, BETA, LIMIT)
                    n = tile * 64 + slot_to_column(i)
            token = gl.arange(0, TB, layout=gl.SliceLayout(0, value.type.layout))
            if DIRECT:
                y_row = _first_slot_of(ids_ptr, token, expert_id, num_tokens, TOP_K)
                is_y_row = y_row >= 0
            else:
                y_row = row_start + token
                is_y_row = token < num_rows
            pointers = y_ptr + (gl.where(is_y_row, y_row, 0).to(gl.int64) * Y_STRIDE)[None, :] + n[:, None]
            gl.store(pointers, value.to(y_ptr.dtype.element_ty), mask=is_y_row[None, :] & (n < N)[:, None])
