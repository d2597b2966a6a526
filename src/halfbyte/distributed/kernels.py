"""Kernels over memory that every GPU of a group can reach (Triton): `push_rows` sends tokens, `pull_rows` adds up partial sums. Of those in e4m3 see
`exchange`.

Memory is addressed through a table, int64 on the device: the base address of each rank's block (the blocks are laid out alike), then the offset of
each region. Addresses are 64-bit throughout. Every rank runs the same sequence of kernels; this is what orders them:

* A rank counts up one flag in each peer's block when its part of a phase is done, and waits until its own flags have reached the number of the
  phase (the epoch, counted on the device, so that a CUDA graph can be replayed). Flags never return to zero; differences are taken: they may wrap.
* A dispatch ends when the rows of all ranks are here. A combine begins by saying that the partial sums are ready, and ends after all have said so.
* So a rank pushes into a buffer only after every peer has entered the combine behind its last use, and writes partial sums only after every peer has
  left the combine that read the last ones: dispatch and combine take turns, and no other barrier is needed.

Scalar operations alone take part in the synchronisation. A wait ends after `SPINS` looks, about two minutes, with a trap: an error, not a hang.
"""

from __future__ import annotations

import triton
import triton.language as tl

from halfbyte.distributed.peer_memory import REGIONS
from halfbyte.gluon_compat import fix_cache_keys
from halfbyte.kernels.quantizers.blocks import half
from halfbyte.kernels.quantizers.chunk import load_words, nvfp4_block, prepare_global
from halfbyte.kernels.quantizers.fp8 import divide, e4m3_bytes, fp32_scale, prepare_division
from halfbyte.kernels.quantizers.rows import amax_of_row, mx_scales_of_row, nvfp4_scale_of_row, store_quad

# Places in the table, behind the addresses of the ranks.
FLAGS, SIZES, CODES, BLOCK_SCALES, ROW_SCALES, IDS, WEIGHTS, PARTIAL, STAMPS = map(tl.constexpr, range(len(REGIONS)))
SPINS = tl.constexpr(150_000_000)


@triton.jit
def region(table_ptr, peer, REGION: tl.constexpr, WORLD: tl.constexpr, dtype: tl.constexpr):
    """Where the region begins in the block of `peer`."""
    address = tl.load(table_ptr + peer) + tl.load(table_ptr + WORLD + REGION)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def signal(table_ptr, rank, PHASE: tl.constexpr, WORLD: tl.constexpr):
    """Count up this rank's flag in every block. What this program has seen and done before is visible to who sees the flag."""
    for peer in range(WORLD):
        tl.atomic_add(region(table_ptr, peer, FLAGS, WORLD, tl.int32) + PHASE * WORLD + rank, 1, sem="release", scope="sys")


@triton.jit
def trap_after(spins, ASM: tl.constexpr):
    if ASM:  # noqa: SIM102 - decided when compiling
        if spins >= SPINS:
            tl.inline_asm_elementwise("trap; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait(table_ptr, rank, epoch, PHASE: tl.constexpr, WORLD: tl.constexpr, ASM: tl.constexpr):
    """Until every rank's flag here has reached the epoch."""
    flags = region(table_ptr, rank, FLAGS, WORLD, tl.int32) + PHASE * WORLD
    for peer in range(WORLD):
        spins = 0
        while (tl.atomic_add(flags + peer, 0, sem="acquire", scope="sys") - epoch < 0) & (spins < SPINS):
            spins += 1
        trap_after(spins, ASM)


@triton.jit
def is_last(ticket_ptr):
    """Whether all other programs have come here already; what they did before is visible then."""
    tl.debug_barrier()
    return tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="sys") == tl.num_programs(0) - 1


@triton.jit
def first_row_of(sizes_ptr, rank, WORLD: tl.constexpr):
    """Of this rank among the rows of all, in the order of ranks."""
    first = 0
    for other in tl.static_range(WORLD):
        first += tl.where(other < rank, tl.load(sizes_ptr + other), 0)
    return first


@triton.jit
def _two_codes(word, factor, divisor, inverse, DIVIDE: tl.constexpr, BF16: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr):
    """e4m3 of x / scale of both elements of a word, in the low half of an int32."""
    low, high = half(word, 0, BF16), half(word, 1, BF16)
    if DIVIDE:
        low, high = divide(low, factor, divisor, inverse, ASM), divide(high, factor, divisor, inverse, ASM)
    else:
        low, high = low * factor, high * factor
    return e4m3_bytes(low, NATIVE).to(tl.int32) | (e4m3_bytes(high, NATIVE).to(tl.int32) << 8)


@triton.jit
def _four_words(w, factor, divisor, inverse, DIVIDE: tl.constexpr, BF16: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr):
    """Sixteen e4m3 codes of eight words of two elements."""
    words = ()
    for i in tl.static_range(4):
        low = _two_codes(w[2 * i], factor, divisor, inverse, DIVIDE, BF16, NATIVE, ASM)
        words = words + (low | (_two_codes(w[2 * i + 1], factor, divisor, inverse, DIVIDE, BF16, NATIVE, ASM) << 16),)
    return words


@triton.jit
def fp8_row(w, GROUPS: tl.constexpr, BF16: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr):
    """Codes and the scale of a row quantised with one scale, as `formats.fp8_tensor` defines them."""
    scale = fp32_scale(amax_of_row(w, BF16))
    factor, divisor, inverse = prepare_division(scale, ASM)
    whole = tl.zeros((1, GROUPS), tl.float32)
    return _four_words(w, factor, whole + divisor, whole + inverse, True, BF16, NATIVE, ASM), scale


@triton.jit
def ranks_of(ids, row, placement_ptr, num_experts, WORLD: tl.constexpr, COPIES: tl.constexpr):
    """Bits of the ranks that hold one of these experts for the row: placement int32 [E, 1 + COPIES], number of copies, then the rank of each."""
    is_expert = (ids >= 0) & (ids < num_experts)
    entry = placement_ptr + tl.where(is_expert, ids, 0) * (1 + COPIES)
    copy = row % tl.load(entry)
    rank = tl.load(entry + 1 + copy)
    return tl.reduce_or(tl.where(is_expert, 1 << rank, 0), 0)


@triton.jit(do_not_specialize=["first_row", "num_rows", "rank"])
def push_rows(
    x_ptr, scale_ptr, row_scale_ptr, ids_ptr, weights_ptr, num_tokens_ptr, placement_ptr, needs_ptr, table_ptr, sync_ptr,
    first_row, num_rows, rank, num_experts,
    FORMAT: tl.constexpr, HIDDEN: tl.constexpr, TOP_K: tl.constexpr, WORLD: tl.constexpr, COPIES: tl.constexpr, COUNTED: tl.constexpr,
    BF16: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Rows first_row .. first_row + num_rows of every rank's buffers from this rank's x, and then wait for the rows of the others.

    x        [num_rows, H] bf16 or fp16 as int32 words ("copy": sent as they are; "nvfp4", "nvfp4 by row", "fp8", "mxfp8": quantised on the way)
    scale    fp32 [1], "nvfp4": the global scale
    ids      int32 [num_rows, TOP_K]; -1 is sent for rows from num_tokens int32 [1] on (COUNTED)
    COPIES   0: all rows go to all ranks; else the hidden state goes only to ranks that hold an expert of the row, as `ranks_of` says, and `needs`
             int32 [num_rows] remembers these
    """
    NUM_GROUPS: tl.constexpr = HIDDEN // 16
    GROUPS: tl.constexpr = triton.next_power_of_2(NUM_GROUPS)
    SLOTS: tl.constexpr = triton.next_power_of_2(TOP_K)
    group = tl.arange(0, GROUPS)[None, :]
    word = tl.arange(0, 8 * GROUPS)
    slot = tl.arange(0, SLOTS)
    inside = group < NUM_GROUPS
    num_tokens = num_rows
    if COUNTED:
        num_tokens = tl.load(num_tokens_ptr)
    if FORMAT == "nvfp4":
        prepared = prepare_global(tl.load(scale_ptr), 6.0, ASM)
    epoch = tl.load(sync_ptr + 1) + 1
    if tl.program_id(0) == 0:
        for peer in range(WORLD):
            tl.store(region(table_ptr, peer, SIZES, WORLD, tl.int32) + (epoch & 1) * WORLD + rank, num_rows)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        target = tl.cast(first_row + row, tl.int64)
        ids = tl.load(ids_ptr + row * TOP_K + slot, mask=slot < TOP_K, other=-1)
        ids = tl.where(row < num_tokens, ids, -1)
        weights = tl.load(weights_ptr + row * TOP_K + slot, mask=slot < TOP_K, other=0.0)
        if COPIES > 0:
            needs = ranks_of(ids, first_row + row, placement_ptr, num_experts, WORLD, COPIES)
            tl.store(needs_ptr + row, needs)
        x_row = x_ptr + tl.cast(row, tl.int64) * (HIDDEN // 2)
        if FORMAT == "copy":
            words = tl.load(x_row + word, mask=word < HIDDEN // 2)
        else:
            w = load_words(x_row + group * 8, inside)
        if FORMAT == "nvfp4":
            byte, low, high = nvfp4_block(w, prepared, BF16, False, NATIVE, ASM)
        elif FORMAT == "nvfp4 by row":
            scale = nvfp4_scale_of_row(w, BF16)
            byte, low, high = nvfp4_block(w, prepare_global(scale, 6.0, ASM), BF16, False, NATIVE, ASM)
        elif FORMAT == "fp8":
            codes, scale = fp8_row(w, GROUPS, BF16, NATIVE, ASM)
        elif FORMAT == "mxfp8":
            byte, factor = mx_scales_of_row(w, GROUPS, BF16, ASM)
            codes = _four_words(w, factor, factor, factor, False, BF16, NATIVE, ASM)
        for step in range(WORLD):
            peer = (rank + 1 + step) % WORLD  # not all to the same one at once
            tl.store(region(table_ptr, peer, IDS, WORLD, tl.int32) + target * TOP_K + slot, ids, mask=slot < TOP_K)
            tl.store(region(table_ptr, peer, WEIGHTS, WORLD, tl.float32) + target * TOP_K + slot, weights, mask=slot < TOP_K)
            wanted = 1
            if COPIES > 0:
                wanted = (needs >> peer) & 1
            if wanted != 0:
                to = region(table_ptr, peer, CODES, WORLD, tl.int32)
                if FORMAT == "copy":
                    tl.store(to + target * (HIDDEN // 2) + word, words, mask=word < HIDDEN // 2)
                elif (FORMAT == "fp8") | (FORMAT == "mxfp8"):
                    store_quad(to + target * (HIDDEN // 4) + group * 4, codes[0], codes[1], codes[2], codes[3], inside)
                else:
                    pairs = to + target * (HIDDEN // 8) + group * 2
                    tl.store(pairs[:, :, None] + tl.arange(0, 2)[None, None, :], tl.join(low, high), mask=inside[:, :, None])
                if (FORMAT == "nvfp4") | (FORMAT == "nvfp4 by row"):
                    tl.store(region(table_ptr, peer, BLOCK_SCALES, WORLD, tl.uint8) + target * NUM_GROUPS + group, byte.to(tl.uint8), mask=inside)
                if FORMAT == "mxfp8":
                    scales = region(table_ptr, peer, BLOCK_SCALES, WORLD, tl.uint8) + target * (NUM_GROUPS // 2) + group // 2
                    tl.store(scales, byte.to(tl.uint8), mask=inside & (group % 2 == 0))
                if (FORMAT == "fp8") | (FORMAT == "nvfp4 by row"):
                    tl.store(region(table_ptr, peer, ROW_SCALES, WORLD, tl.float32) + target, scale)
    if is_last(sync_ptr):
        signal(table_ptr, rank, 0, WORLD)
        wait(table_ptr, rank, epoch, 0, WORLD, ASM)
        tl.store(sync_ptr, 0)
        tl.store(sync_ptr + 1, epoch)


@triton.jit(do_not_specialize=["first_row", "num_rows", "rank"])
def pull_rows(
    out_ptr, needs_ptr, table_ptr, sync_ptr, first_row, num_rows, rank,
    HIDDEN: tl.constexpr, WORLD: tl.constexpr, SPARSE: tl.constexpr, BLOCK: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out[row] = round(sum over ranks, in their order, of partial[first_row + row] of the rank), in fp32.

    out      [num_rows, H]
    SPARSE   ranks that `needs` int32 [num_rows] does not name have nothing for the row, and are not asked
    """
    epoch = tl.load(sync_ptr + 3) + 1
    if tl.program_id(0) == 0:
        signal(table_ptr, rank, 1, WORLD)
    wait(table_ptr, rank, epoch, 1, WORLD, ASM)
    tl.debug_barrier()
    BLOCKS: tl.constexpr = triton.cdiv(HIDDEN, BLOCK)
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    for tile in range(tl.program_id(0), num_rows * BLOCKS, tl.num_programs(0)):
        row = tile // BLOCKS
        column = tile % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        inside = column < HIDDEN
        source = tl.cast(first_row + row, tl.int64)
        needs = tl.full((BLOCK,), -1, tl.int32)
        if SPARSE:
            needs = tl.load(needs_ptr + row) + tl.zeros_like(column)
        total = tl.zeros((BLOCK,), tl.float32)
        for peer in tl.static_range(WORLD):
            wanted = inside & ((needs >> peer) & 1 != 0)
            values = region(table_ptr, peer, PARTIAL, WORLD, dtype) + source * HIDDEN + column
            total += tl.load(values, mask=wanted, other=0.0).to(tl.float32)
        tl.store(out_ptr + tl.cast(row, tl.int64) * HIDDEN + column, total.to(out_ptr.dtype.element_ty), mask=inside)
    if is_last(sync_ptr + 2):
        tl.store(sync_ptr + 2, 0)
        tl.store(sync_ptr + 3, epoch)


fix_cache_keys(*globals().values())
