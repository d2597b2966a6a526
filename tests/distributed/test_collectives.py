"""all_gatherv and reduce_scatterv on gloo, against concatenation and a sum in float64 of what every rank is known to bring."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close_rel, assert_equal_bits
from ranks import run_ranks

from halfbyte.distributed import all_gatherv, reduce_scatterv
from halfbyte.errors import InputError

SIZES = {
    2: [[3, 3], [5, 1], [0, 4], [4, 0], [0, 0]],
    3: [[2, 2, 2], [7, 1, 0], [0, 0, 5], [0, 0, 0]],
    4: [[1, 1, 1, 1], [0, 9, 2, 0]],
    8: [[3, 0, 1, 5, 0, 0, 2, 1]],
}
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64, torch.bool)


def brought(rank: int, rows: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """What rank brings, random bytes that any rank can compute."""
    random = torch.Generator().manual_seed(100 * rank + rows)
    values = torch.randint(0, 2 if dtype == torch.bool else 120, (rows, *shape), generator=random)
    return values.to(torch.uint8).view(dtype) if dtype.itemsize == 1 else values.to(dtype)


def check_gathers(rank: int, world: int) -> None:
    for sizes in SIZES[world]:
        for dtype in DTYPES:
            expected = torch.cat([brought(other, rows, dtype, 3, 2) for other, rows in enumerate(sizes)])
            assert_equal_bits(all_gatherv(brought(rank, sizes[rank], dtype, 3, 2), sizes), expected)
        kinds = [(torch.uint8, (7,)), (torch.float32, ()), (torch.int32, (3,)), (torch.bfloat16, (2, 2))]
        tensors = [brought(rank, sizes[rank], dtype, *shape) for dtype, shape in kinds]
        expected_all = [torch.cat([brought(other, rows, dtype, *shape) for other, rows in enumerate(sizes)]) for dtype, shape in kinds]
        results = all_gatherv(tensors, sizes)
        buffers = [torch.full_like(result, 99) for result in expected_all]
        returned = all_gatherv(tensors, sizes, out=buffers)
        for result, buffer, same, wanted in zip(results, buffers, returned, expected_all, strict=True):
            assert_equal_bits(result, wanted)
            assert_equal_bits(buffer, wanted)
            assert same is buffer
        strided = brought(rank, sizes[rank], torch.float32, 6)[:, ::2]
        assert_equal_bits(all_gatherv(strided, sizes), torch.cat([brought(o, n, torch.float32, 6)[:, ::2] for o, n in enumerate(sizes)]))
        empty = [torch.ones(sizes[rank], 0), torch.ones(sizes[rank], 2, 0)]
        assert [tuple(result.shape) for result in all_gatherv(empty, sizes)] == [(sum(sizes), 0), (sum(sizes), 2, 0)]
        column = brought(rank, 1, torch.float32, sizes[rank]).t()  # contiguous, though its last stride is not 1
        assert_equal_bits(all_gatherv(column, sizes), torch.cat([brought(o, 1, torch.float32, n).t() for o, n in enumerate(sizes)]))
    pair = dist.new_group([world - 1, 0])
    if rank in (0, world - 1):
        mine = torch.full((2 - dist.get_rank(pair), 1), float(rank))
        assert all_gatherv(mine, [2, 1], group=pair).flatten().tolist() in ([0, 0, world - 1], [world - 1, world - 1, 0])
    elif world > 2:
        with pytest.raises(InputError, match="not in the group"):
            all_gatherv(torch.ones(1), [1, 1], group=pair)


def check_reductions(rank: int, world: int) -> None:
    def part(other: int, total: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(total, 33, generator=torch.Generator().manual_seed(other)).to(dtype)

    for sizes in SIZES[world]:
        total, first = sum(sizes), sum(sizes[:rank])
        mine = slice(first, first + sizes[rank])
        for dtype in (torch.float32, torch.bfloat16):
            parts = [part(other, total, dtype) for other in range(world)]
            in_order = torch.zeros(total, 33)
            for other in parts:
                in_order += other.float()
            result = reduce_scatterv(parts[rank], sizes)
            assert_equal_bits(result, in_order[mine].to(dtype))  # rounded once
            assert_close_rel(result, sum(p.double() for p in parts)[mine].float())
            buffer = torch.full((sizes[rank], 33), torch.nan)
            assert reduce_scatterv(parts[rank], sizes, out=buffer, deterministic=True) is buffer
            assert_equal_bits(buffer, in_order[mine])


def check_errors(rank: int, world: int) -> None:
    """Every rank raises, though one alone is wrong, and can go on."""
    last, one = world - 1, [1] * world
    with pytest.raises(InputError, match=rf"disagree about the sizes.*rank {last}: \[.*2\]"):
        all_gatherv(torch.ones(1, 2), [1] * last + [2 if rank == last else 1])
    with pytest.raises(InputError, match=f"rank {last} has 2 rows, not 1"):
        all_gatherv(torch.ones(2 if rank == last else 1, 2), one)
    with pytest.raises(InputError, match=f"rank 0 has {world + 1} rows, not {world}"):
        reduce_scatterv(torch.ones(world + (rank == 0), 2), one)
    with pytest.raises(InputError, match=f"bytes per row.*rank {last}: 12"):
        all_gatherv(torch.ones(1, 3 if rank == last else 2), one)
    with pytest.raises(InputError, match="disagree about the dtypes"):
        all_gatherv(torch.ones(1, 2, dtype=torch.int32 if rank == last else torch.float32), one)
    with pytest.raises(InputError, match=rf"sizes do not fit the group.*{world} numbers"):
        all_gatherv(torch.ones(1, 2), [1] * (world + 1))
    with pytest.raises(InputError, match="rank 0: 1 sizes"):
        all_gatherv(torch.ones(1, 2), one[:1] if rank == 0 else one)
    with pytest.raises(InputError, match="out does not fit"):
        all_gatherv(torch.ones(1, 2), one, out=torch.ones(world, 3))
    with pytest.raises(InputError, match="out does not fit"):
        reduce_scatterv(torch.ones(world, 2), one, out=torch.ones(2, 2))
    with pytest.raises(InputError, match="only floats"):
        reduce_scatterv(torch.ones(world, 2, dtype=torch.int32), one)
    for wrong in (None, 3, "ab", [1.0] * world, torch.ones(world, dtype=torch.int64)):
        with pytest.raises(InputError, match="sizes do not fit"):
            all_gatherv(torch.ones(1), wrong)
        with pytest.raises(InputError, match="sizes do not fit"):
            reduce_scatterv(torch.ones(world), wrong)
    for wrong in (None, "a", [1.0], torch.tensor(1.0)):
        with pytest.raises(InputError, match=r"tensors? (is no tensor|has no rows)"):
            all_gatherv(wrong, one)
        with pytest.raises(InputError, match=r"tensor (is no tensor|has no rows)"):
            reduce_scatterv(wrong, one)
        with pytest.raises(InputError, match=r"out (is no tensor|has no rows|does not fit)"):
            all_gatherv(torch.ones(1), one, out=wrong or 3)
    assert all_gatherv(torch.full((1,), rank), one).tolist() == list(range(world))


def check_collectives(rank: int, world: int) -> None:
    check_gathers(rank, world)
    check_reductions(rank, world)
    check_errors(rank, world)


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_collectives(world: int) -> None:
    run_ranks(check_collectives, world)


def check_that_fails(rank: int, world: int) -> None:
    gathered = all_gatherv(torch.full((1,), rank), [1] * world)
    assert rank == 0 or gathered.tolist() == [0]


def test_a_wrong_rank_is_seen_by_the_one_who_started_it() -> None:
    outcomes = run_ranks(check_that_fails, 2, ends_alone=False)
    assert outcomes[1] is not None and "AssertionError" in outcomes[1]


def test_without_a_group() -> None:
    for call in (lambda: all_gatherv(torch.ones(1), [1]), lambda: reduce_scatterv(torch.ones(1), [1])):
        with pytest.raises(InputError, match=r"not initialised.*torchrun"):
            call()
