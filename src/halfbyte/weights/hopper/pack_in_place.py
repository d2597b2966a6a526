"""`pack_kernels.pack_matrix` where the tiles of an expert lie in the memory of its codes (Gluon, sm_90): every byte read once and written once.

What has to be read before any of it is written is a unit: 64 gate and 64 up rows, which become the two row tiles in their places; without gate and
up, 64 rows and one tile. A group of programs packs one unit at a time. Its programs keep their pieces of it, four tiles and a run of scales each, in
shared memory until all have read theirs, then write them to where they belong. While a unit waits for the programs that are still reading it, the
free stages of its programs take the first pieces of the next one. DeepSeek-R1's w13 has 56 pieces per unit and 14 programs per group.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from halfbyte.device import current
from halfbyte.gluon_compat import barrier, tma_descriptor, tma_store
from halfbyte.weights.hopper.bits import WordsFor
from halfbyte.weights.hopper.layout import RowOrder
from halfbyte.weights.hopper.pack_kernels import encode_nvfp4_scale, row_of_pair, words_of_codes

PROGRAMS_OF_A_MULTIPROCESSOR = 4
STAGES = gl.constexpr(6)  # of a program, 9 KiB each
PIECES = 4  # of a unit that a program keeps; the other stages are for the next unit
AHEAD = gl.constexpr(2)  # pieces on their way while one is encoded
MAX_REGISTERS = 128


@gluon.jit
def _read(source, unit, index, ORDER: gl.constexpr, SCALES: gl.constexpr):
    """The codes, int32 [32, 32], and scales, uint8 [32, 4 SCALES], of both rows of each pair of a piece. Zeros beyond the last column or unit."""
    CODES: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    SCALE_BYTES: gl.constexpr = gl.BlockedLayout([1, SCALES], [8, 4], [4, 1], [1, 0])
    codes_ptr, scales_ptr, num_units, expert_units, rows, intermediate, lanes, runs = source
    expert, tile, run = unit // expert_units, unit % expert_units + index // runs * expert_units, index % runs
    columns = lanes * SCALES // 4  # of scales
    codes_ptr += expert.to(gl.int64) * rows * (2 * lanes)
    scales_ptr += expert.to(gl.int64) * rows * columns
    code = 32 * run + gl.arange(0, 32, layout=gl.SliceLayout(0, CODES))
    scale = 4 * SCALES * run + gl.arange(0, 4 * SCALES, layout=gl.SliceLayout(0, SCALE_BYTES))
    is_code = (code < gl.where(unit < num_units, 2 * lanes, 0))[None, :]
    is_scale = (scale < gl.where(unit < num_units, columns, 0))[None, :]
    codes, scales = (), ()
    for half in gl.static_range(2):
        row, exists = row_of_pair(gl.arange(0, 32, layout=gl.SliceLayout(1, CODES)), tile, half, intermediate, ORDER)
        codes = codes + (gl.load(codes_ptr + row[:, None] * (2 * lanes) + code[None, :], mask=exists[:, None] & is_code, other=0),)
        row, exists = row_of_pair(gl.arange(0, 32, layout=gl.SliceLayout(1, SCALE_BYTES)), tile, half, intermediate, ORDER)
        scales = scales + (gl.load(scales_ptr + row[:, None] * columns + scale[None, :], mask=exists[:, None] & is_scale, other=0),)
    return codes[0], codes[1], scales[0], scales[1]


@gluon.jit
def _following(unit, i, num_held, num_groups):
    """The next piece of a program: of this unit, or the first of the group's next unit."""
    is_last = i + 1 == num_held
    return gl.where(is_last, unit + num_groups, unit), gl.where(is_last, 0, i + 1)


@gluon.jit
def _words(codes, scales, NVFP4: gl.constexpr, WORDS_FOR: gl.constexpr):
    """int32 [32, 16, 2]; 16 codes with an NVFP4 scale of zero are zeros."""
    codes = gl.reshape(codes, (32, 16, 2))
    if NVFP4:
        has_scale = gl.convert_layout(scales, gl.SliceLayout(2, codes.type.layout), assert_trivial=True) != 0
        codes = gl.where(gl.expand_dims(has_scale, 2), codes, 0)
    return words_of_codes(codes, WORDS_FOR)


@gluon.jit
def _keep(piece, words, scale_words, NVFP4: gl.constexpr, WORDS_FOR: gl.constexpr):
    """Write what `_read` gave to `words`, int32 [64, 32] in shared memory, and `scale_words`, int16 [8, 64 or 32], as it will be in the tiles."""
    codes0, codes1, scales0, scales1 = piece
    SCALES: gl.constexpr = scales0.shape[1] // 4
    both = gl.join(_words(codes0, scales0, NVFP4, WORDS_FOR), _words(codes1, scales1, NVFP4, WORDS_FOR))
    both = gl.permute(gl.reshape(both, (32, 4, 4, 2, 2)), (1, 0, 2, 4, 3))  # pair, tile, t, word, row to tile, pair, t, row, word
    words.store(gl.reshape(both, (64, 32)))
    scales0, scales1 = scales0.to(gl.int32), scales1.to(gl.int32)
    if NVFP4:
        scales0, scales1 = encode_nvfp4_scale(scales0), encode_nvfp4_scale(scales1)
    scales = gl.permute(gl.reshape(scales0 | scales1 << 8, (32, 4, SCALES)), (0, 2, 1))  # pair, tile, scale to pair, scale, tile
    scale_words.store(gl.reshape(scales.to(gl.int16), (8, 16 * SCALES)))


@gluon.jit
def _write(target, stages, arrivals_ptr, unit, first_stage, program, num_programs, num_held, UNIT_TILES: gl.constexpr):
    """When all programs of the group have read the unit, for which they must run at the same time, write the pieces to where they belong."""
    words, scale_words, words_desc, scale_words_desc = stages
    expert_units, column_tiles, runs = target
    BOX: gl.constexpr = words_desc.block_type.shape[0] // 16  # tiles
    while gl.atomic_add(arrivals_ptr + unit, 0, sem="acquire") < num_programs:  # one thread asks: many would keep the last programs from arriving
        pass
    barrier()
    for i in range(num_held):
        index, stage = program + i * num_programs, (first_stage + i) % STAGES
        tile, run = (unit // expert_units * UNIT_TILES + index // runs) * expert_units + unit % expert_units, index % runs
        for c in gl.static_range(0, 4, BOX):
            if 4 * run + c < column_tiles:
                tiles = words.index(stage) if BOX == 4 else words.index(stage).slice(16 * c, 16, dim=0)
                tma_store(words_desc, [(tile * column_tiles + 4 * run + c) * 16, 0], tiles)
        tma_store(scale_words_desc, [(tile * runs + run) * 8, 0], scale_words.index(stage))


@gluon.jit(do_not_specialize=["num_units", "num_groups"])  # so that any number of experts needs the same kernels
def _pack_in_place(
    codes_ptr, scales_ptr, words_desc, scale_words_desc, arrivals_ptr, refused_ptr,
    num_units, expert_units, num_groups, rows, intermediate, lanes, column_tiles, runs,
    ORDER: gl.constexpr, NVFP4: gl.constexpr, WORDS_FOR: gl.constexpr,
):  # fmt: skip
    SCALES: gl.constexpr = 4 if NVFP4 else 2  # of a row in a tile
    UNIT_TILES: gl.constexpr = 2 if ORDER == "gate_up" else 1
    if gl.load(refused_ptr) != 0:
        return
    words = gl.allocate_shared_memory(gl.int32, [STAGES, 64, 32], words_desc.layout)
    scale_words = gl.allocate_shared_memory(gl.int16, [STAGES, 8, 16 * SCALES], scale_words_desc.layout)
    stages, target = (words, scale_words, words_desc, scale_words_desc), (expert_units, column_tiles, runs)
    source = (codes_ptr, scales_ptr, num_units, expert_units, rows, intermediate, lanes, runs)
    group, program, num_programs = gl.program_id(0) % num_groups, gl.program_id(0) // num_groups, gl.num_programs(0) // num_groups
    num_held = (UNIT_TILES * runs - program + num_programs - 1) // num_programs  # pieces of this program in a unit
    num_free = gl.minimum(STAGES - num_held, num_held - 1)

    next_unit, next_i, pieces = group, 0, ()
    for _ in gl.static_range(AHEAD):
        pieces = pieces + (_read(source, next_unit, program + next_i * num_programs, ORDER, SCALES),)
        next_unit, next_i = _following(next_unit, next_i, num_held, num_groups)

    first_stage = 0
    for unit in range(group, num_units, num_groups):
        for i in range(num_held):
            piece = pieces[0]
            pieces = pieces[1:] + (_read(source, next_unit, program + next_i * num_programs, ORDER, SCALES),)
            next_unit, next_i = _following(next_unit, next_i, num_held, num_groups)
            if (unit > group) & (i == gl.maximum(num_free - 1, 0)):
                _write(target, stages, arrivals_ptr, unit - num_groups, first_stage + STAGES - num_held, program, num_programs, num_held, UNIT_TILES)
            if i == num_free:  # from here on in stages of the last unit
                tma.store_wait(0)
                barrier()
            stage = (first_stage + i) % STAGES
            _keep(piece, words.index(stage), scale_words.index(stage), NVFP4, WORDS_FOR)
        fence_async_shared()
        barrier()
        gl.atomic_add(arrivals_ptr + unit, 1, sem="release")
        first_stage = (first_stage + num_held) % STAGES
    last = (num_units - 1 - group) // num_groups * num_groups + group
    _write(target, stages, arrivals_ptr, last, first_stage + STAGES - num_held, program, num_programs, num_held, UNIT_TILES)
    tma.store_wait(0)


def pack_matrix_in_place(
    codes: torch.Tensor, scales: torch.Tensor, words: torch.Tensor, scale_words: torch.Tensor, order: RowOrder, words_for: WordsFor,
    refused: torch.Tensor, num_sms: int,
) -> None:  # fmt: skip
    """`pack_kernels.pack_matrix` where `words`, `scale_words` or both lie in the storage of codes and scales, expert upon expert.

    `num_sms`: multiprocessors of the device.
    """
    num_experts, rows, half_columns = codes.shape
    _, row_tiles, runs, entries = scale_words.shape
    unit_tiles, column_tiles = 2 if order == "gate_up" else 1, words.shape[2]
    expert_units = row_tiles // unit_tiles
    programs = triton.cdiv(unit_tiles * runs, PIECES)
    groups = max(1, min(num_experts * expert_units, PROGRAMS_OF_A_MULTIPROCESSOR * num_sms // programs))  # 1: the launch fails where it is too large
    arrivals = torch.zeros(num_experts * expert_units, dtype=torch.int32, device=words.device)
    with current(words.device):
        _pack_in_place[(groups * programs,)](
            codes.view(torch.int32), scales, tma_descriptor(words.view(-1, 32), 64 if column_tiles % 4 == 0 else 16, 32),
            tma_descriptor(scale_words.view(torch.int16).view(-1, entries // 2), 8, entries // 2), arrivals, refused,
            num_experts * expert_units, expert_units, groups, rows, rows // unit_tiles, half_columns // 8, column_tiles, runs,
            order, entries == 128, words_for, num_warps=4, maxnreg=MAX_REGISTERS, launch_cooperative_grid=True,
            enable_fp_fusion=True,
        )  # fmt: skip
