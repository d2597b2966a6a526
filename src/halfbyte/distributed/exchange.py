"""`exchange_codes`: partial sums in e4m3, sent to the owners of their rows and added up there as they arrive (Triton).

Beside the order of phases in `kernels`, each row has a flag of its own, its stamp: the epoch, and the scale of its codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from halfbyte.distributed.kernels import (
    IDS,
    PARTIAL,
    SIZES,
    SPINS,
    STAMPS,
    first_row_of,
    fp8_row,
    is_last,
    ranks_of,
    region,
    signal,
    trap_after,
    wait,
)
from halfbyte.kernels.quantizers.chunk import load_words
from halfbyte.kernels.quantizers.rows import store_quad


@triton.jit
def _wait_for_row(stamp_ptr, epoch, ASM: tl.constexpr):
    """The row's stamp, as soon as its upper half has reached the epoch."""
    spins = 0
    stamp = tl.atomic_add(stamp_ptr, 0, sem="acquire", scope="sys")
    while (tl.cast(stamp >> 32, tl.int32) - epoch < 0) & (spins < SPINS):
        stamp = tl.atomic_add(stamp_ptr, 0, sem="acquire", scope="sys")
        spins += 1
    trap_after(spins, ASM)
    return stamp


@triton.jit
def _release(ASM: tl.constexpr):
    """What the program has stored is visible before what it stores from here on (thread 0 of it, which does the atomic operations)."""
    tl.debug_barrier()
    if ASM:
        tl.inline_asm_elementwise(
            "{ .reg .pred first; .reg .b32 thread; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0; @first fence.acq_rel.sys; mov.b32 $0, 0; }",
            "=r", [], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _send_codes(
    item, num_items, words_ptr, placement_ptr, table_ptr, sizes, rank, num_experts,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, WORLD: tl.constexpr, COPIES: tl.constexpr, BF16: tl.constexpr, NATIVE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """An item of `exchange_codes` in e4m3 to its owner: where its stamp lies there, 0 where nothing was sent, and its scale as bits."""
    NUM_GROUPS: tl.constexpr = HIDDEN // 16
    GROUPS: tl.constexpr = triton.next_power_of_2(NUM_GROUPS)
    SLOTS: tl.constexpr = triton.next_power_of_2(TOP_K)
    group = tl.arange(0, GROUPS)[None, :]
    slot = tl.arange(0, SLOTS)
    inside = group < NUM_GROUPS
    index = item // (WORLD - 1)
    peer = (rank + 1 + item % (WORLD - 1)) % WORLD
    peer_rows = tl.load(sizes + peer)
    stamp, bits = tl.full((), 0, tl.int64), tl.full((), 0, tl.int32)
    if (item < num_items) & (index < peer_rows):
        source = tl.cast(first_row_of(sizes, peer, WORLD) + index, tl.int64)
        wanted = 1
        if COPIES > 0:
            ids = tl.load(region(table_ptr, rank, IDS, WORLD, tl.int32) + source * TOP_K + slot, mask=slot < TOP_K, other=-1)
            wanted = (ranks_of(ids, source.to(tl.int32), placement_ptr, num_experts, WORLD, COPIES) >> rank) & 1
        if wanted != 0:
            position = tl.cast(rank * peer_rows + index, tl.int64)
            codes, scale = fp8_row(load_words(words_ptr + source * (HIDDEN // 2) + group * 8, inside), GROUPS, BF16, NATIVE, ASM)
            to = region(table_ptr, peer, PARTIAL, WORLD, tl.int32) + position * (HIDDEN // 4)
            store_quad(to + group * 4, codes[0], codes[1], codes[2], codes[3], inside)
            stamp = (region(table_ptr, peer, STAMPS, WORLD, tl.int64) + position).to(tl.int64)
            bits = scale.to(tl.int32, bitcast=True)
    return stamp, bits


@triton.jit
def _stamp(stamp, bits, epoch):
    if stamp != 0:
        value = (tl.cast(epoch, tl.int64) << 32) | (tl.cast(bits, tl.int64) & 0xFFFFFFFF)
        tl.atomic_xchg(stamp.to(tl.pointer_type(tl.int64)), value, sem="relaxed", scope="sys")


@triton.jit
def _add_up(
    own_ptr, out_ptr, codes_ptr, stamps, source, row, num_rows, needs, rank, epoch, HIDDEN: tl.constexpr, WORLD: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """out[row] = round(sum over the ranks that `needs` names, in their order, of their partial sums), in fp32, as they arrive."""
    BLOCK: tl.constexpr = triton.next_power_of_2(HIDDEN) // 2
    for part in tl.static_range(2):  # more columns at once do not fit into the registers
        column = part * BLOCK + tl.arange(0, BLOCK)
        inside = column < HIDDEN
        wanted = inside & (((needs >> rank) & 1) + tl.zeros_like(column) != 0)
        own = tl.load(own_ptr + source * HIDDEN + column, mask=wanted, other=0.0)
        total = tl.zeros((BLOCK,), tl.float32)
        for peer in tl.static_range(WORLD):
            if peer == rank:
                total += own.to(tl.float32)
            elif (needs >> peer) & 1 != 0:
                at = tl.cast(peer * num_rows + row, tl.int64)
                if part == 0:
                    stamp = _wait_for_row(stamps + at, epoch, ASM)
                    tl.debug_barrier()
                else:
                    stamp = tl.load(stamps + at)
                codes = tl.load(codes_ptr + at * HIDDEN + column, mask=inside, other=0.0)
                total += codes.to(tl.float32) * stamp.to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(out_ptr + tl.cast(row, tl.int64) * HIDDEN + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["max_rows", "rank", "num_experts", "num_senders"])
def exchange_codes(
    own_ptr, words_ptr, out_ptr, placement_ptr, needs_ptr, table_ptr, sync_ptr, max_rows, rank, num_experts, num_senders,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, WORLD: tl.constexpr, COPIES: tl.constexpr, BF16: tl.constexpr,
    NATIVE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """As `pull_rows`, but partial sums travel in e4m3 with one scale per row: each is sent to its owner, who adds rows up as they arrive.

    own, words   [R, H]: this rank's partial sums as bf16 or fp16, and as int32 words; those of its own rows are not rounded
    out          [own rows, H]
    max_rows     the most rows that a rank has
    COPIES       as in `push_rows`: 0, or rows without an expert here are not sent, nor waited for by their owners, who have `needs`

    The first `num_senders` programs send: row i of every peer, then row i + 1 of every peer. The others add up the rows of this rank, in the same
    order, so that the link does not idle while sums are made. Senders never wait; all programs have to be on the GPU together. Rows lie by sender, in
    a buffer that experts do not write to.
    """
    program = tl.program_id(0)
    epoch = tl.load(sync_ptr + 3) + 1
    sizes = region(table_ptr, rank, SIZES, WORLD, tl.int32) + (tl.load(sync_ptr + 1) & 1) * WORLD
    if program < num_senders:
        num_items = max_rows * (WORLD - 1)
        for item in range(program, num_items, 2 * num_senders):  # two rows for one fence, which waits for their bytes to be there
            stamp, bits = _send_codes(
                item, num_items, words_ptr, placement_ptr, table_ptr, sizes, rank, num_experts, HIDDEN, TOP_K, WORLD, COPIES, BF16, NATIVE, ASM
            )
            next_stamp, next_bits = _send_codes(
                item + num_senders, num_items, words_ptr, placement_ptr, table_ptr, sizes, rank, num_experts, HIDDEN, TOP_K, WORLD, COPIES, BF16,
                NATIVE, ASM,
            )  # fmt: skip
            _release(ASM)
            _stamp(stamp, bits, epoch)
            _stamp(next_stamp, next_bits, epoch)
    else:
        if program == num_senders:
            signal(table_ptr, rank, 1, WORLD)
        num_rows = tl.load(sizes + rank)
        first_row = first_row_of(sizes, rank, WORLD)
        codes, stamps = region(table_ptr, rank, PARTIAL, WORLD, tl.float8e4nv), region(table_ptr, rank, STAMPS, WORLD, tl.int64)
        for row in range(program - num_senders, num_rows, tl.num_programs(0) - num_senders):
            needs = tl.full((), -1, tl.int32)
            if COPIES > 0:
                needs = tl.load(needs_ptr + row)
            source = tl.cast(first_row + row, tl.int64)
            _add_up(own_ptr, out_ptr, codes, stamps, source, row, num_rows, needs, rank, epoch, HIDDEN, WORLD, ASM)
    if is_last(sync_ptr + 2):
        wait(table_ptr, rank, epoch, 1, WORLD, ASM)
        tl.store(sync_ptr + 2, 0)
        tl.store(sync_ptr + 3, epoch)
