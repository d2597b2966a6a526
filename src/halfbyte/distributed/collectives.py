"""`all_gatherv` and `reduce_scatterv`: every rank brings its own number of rows, over any `torch.distributed` group.

    all_gatherv       rank r's [sizes[r], ...]          to all ranks' rows, in the order of ranks: [sum(sizes), ...]
    reduce_scatterv   every rank's [sum(sizes), ...]    to the sum of all ranks' rows of segment r: [sizes[r], ...]

| | equal sizes | uneven, NCCL | uneven, gloo |
|---|---|---|---|
| all_gatherv | one all-gather | grouped broadcasts, one launch | one broadcast per rank |
| reduce_scatterv | one reduce-scatter | grouped reductions, one launch | all-to-all, and a sum |
| reduce_scatterv, deterministic | all-to-all, and a sum | all-to-all, and a sum | all-to-all, and a sum |

Several tensors travel in one collective: their rows side by side, as bytes. Sizes are known on the host and the same on every rank; a rank without
rows takes part like the others. Nothing waits for the device, so with NCCL a call can be captured in a CUDA graph, which repeats its sizes.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
import torch.distributed as dist

from halfbyte.arguments import check_tensors
from halfbyte.distributed.failures import backend_of, naming_the_failed, ranks_of
from halfbyte.errors import InputError

# torch 2.13 renamed them.
_gather_equal: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_reduce_equal: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


def all_gatherv(
    tensors: torch.Tensor | Sequence[torch.Tensor],
    sizes: Sequence[int],
    *,
    group: dist.ProcessGroup | None = None,
    out: torch.Tensor | Sequence[torch.Tensor] | None = None,
    check: bool | None = None,
) -> torch.Tensor | list[torch.Tensor]:
    """The rows of all ranks, in the order of ranks, of one tensor or of several that travel together.

    Args:
        tensors: [sizes[rank], ...] each, of any dtypes, on one device that the group's backend serves.
        sizes: rows of every rank of the group.
        group: by default all ranks.
        out: where the results go, [sum(sizes), ...] contiguous, of the dtypes of `tensors`; by default new tensors.
        check: compare sizes, row lengths and dtypes between the ranks first, so that all of them raise where one is wrong. Costs a collective and
            waits for it; by default on CPUs only.

    Returns:
        A tensor where one was given, else a list.

    Raises:
        InputError: no process group; an argument does not fit; with `check`, the ranks disagree.
        PeerError: another rank failed.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> all_gatherv([torch.ones(2, 3), torch.arange(2)], sizes=[2])
    [tensor([[1., 1., 1.],
            [1., 1., 1.]]), tensor([0, 1])]
    >>> dist.destroy_process_group()
    """
    where = "all_gatherv"
    rank, world = ranks_of(group, where)
    sizes = as_sizes(sizes, where)
    given = _as_tensors("tensors", tensors, where)
    if not given:
        raise InputError("nothing to gather", where=where, needed="one tensor at least")
    results = None if out is None else _as_tensors("out", out, where)
    rows = [bytes_of(tensor) for tensor in given]
    widths = [row.shape[1] for row in rows]
    _agree(given, widths, sizes, given[0].shape[0], group, where, check)
    check_sizes(sizes, world, where)
    for tensor in given:
        _check_rows("a tensor", tensor, sizes[rank], given[0].device, where)
    total = sum(sizes)
    if results is None:
        results = [tensor.new_empty((total, *tensor.shape[1:])) for tensor in given]
    elif len(results) != len(given):
        raise InputError("out does not fit", where=where, given=f"{len(results)} tensors", needed=f"{len(given)}")
    for tensor, result in zip(given, results, strict=True):
        _check_out(result, (total, *tensor.shape[1:]), tensor, where)
    with naming_the_failed(group, where):
        if len(given) == 1 or not sum(widths):
            _gather(rows[0], sizes, bytes_of(results[0]), group)
        else:
            packed = rows[0].new_empty((total, sum(widths)))
            _gather(side_by_side(rows), sizes, packed, group)
            targets = [bytes_of(result) for result in results]
            word = _word([*rows, *targets])
            for target, part in zip(targets, packed.view(word).split([width // word.itemsize for width in widths], dim=1), strict=True):
                target.view(word).copy_(part)
    return results[0] if isinstance(tensors, torch.Tensor) else results


def reduce_scatterv(
    tensor: torch.Tensor,
    sizes: Sequence[int],
    *,
    group: dist.ProcessGroup | None = None,
    out: torch.Tensor | None = None,
    deterministic: bool = False,
    check: bool | None = None,
) -> torch.Tensor:
    """This rank's rows of the sum over the ranks.

    Args:
        tensor: [sum(sizes), ...], float: this rank's part of every rank's rows.
        sizes, group, check: as in `all_gatherv`.
        out: [sizes[rank], ...] contiguous; by default new, of tensor's dtype. With another float dtype the sum is `deterministic`.
        deterministic: add up in fp32, in the order of ranks, and round once: the same bits whatever the sizes and the backend. gloo always does.
            NCCL by itself adds in the tensor's dtype, in an order of its own.

    Raises:
        InputError: no process group; an argument does not fit; with `check`, the ranks disagree.
        PeerError: another rank failed.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    >>> reduce_scatterv(torch.ones(2, 3), sizes=[2])
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    >>> dist.destroy_process_group()
    """
    where = "reduce_scatterv"
    rank, world = ranks_of(group, where)
    sizes = as_sizes(sizes, where)
    _check_has_rows("tensor", tensor, where)
    if not tensor.is_floating_point():
        raise InputError("only floats are added up", where=where, given=tensor.dtype, needed="a float dtype")
    _agree([tensor], [bytes_of(tensor).shape[1]], sizes, tensor.shape[0], group, where, check, total=True)
    check_sizes(sizes, world, where)
    _check_rows("the tensor", tensor, sum(sizes), tensor.device, where)
    if out is None:
        out = tensor.new_empty((sizes[rank], *tensor.shape[1:]))
    _check_has_rows("out", out, where)
    _check_out(out, (sizes[rank], *tensor.shape[1:]), tensor, where, any_float=True)
    tensor = tensor.contiguous()
    with naming_the_failed(group, where):
        if deterministic or out.dtype != tensor.dtype or backend_of(group, tensor.device.type) != "nccl":
            _exchange_and_add(tensor, sizes, out, group)
        elif len(set(sizes)) == 1:
            scatter_equal(out, tensor, group)
        else:
            dist.reduce_scatter(out, list(tensor.split(list(sizes))), group=group)
    return out


def exchange_rows(tensor: torch.Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None) -> torch.Tensor:
    """Segment r of every rank's [sum(sizes), ...] to rank r: [world, sizes[rank], ...] of any dtype."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    received = tensor.new_empty((world, sizes[rank], *tensor.shape[1:]))
    dist.all_to_all_single(bytes_of(received.flatten(0, 1)), bytes_of(tensor), [sizes[rank]] * world, list(sizes), group=group)
    return received


def _exchange_and_add(tensor: torch.Tensor, sizes: Sequence[int], out: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    add_in_order(exchange_rows(tensor, sizes, group), out)


def add_in_order(parts: torch.Tensor, out: torch.Tensor) -> None:
    """The sum of parts [world, ...] in fp32 (float64 of such), in their order, rounded once into out [...]."""
    if out.is_cuda and parts.dtype != torch.float64:
        from halfbyte.distributed.sums import add_rows  # imports Triton

        add_rows(parts.flatten(2) if parts.ndim > 2 else parts.unsqueeze(2), out.flatten(1) if out.ndim > 1 else out.unsqueeze(1))
        return
    total = torch.zeros(out.shape, dtype=torch.float64 if parts.dtype == torch.float64 else torch.float32, device=out.device)
    for part in parts:
        total += part
    out.copy_(total)


def _gather(rows: torch.Tensor, sizes: Sequence[int], out: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """uint8 rows [sizes[rank], width] of all ranks to out [sum(sizes), width]."""
    if len(set(sizes)) == 1:
        gather_equal(out, rows, group)
        return
    segments = list(out.split(list(sizes)))
    if backend_of(group, rows.device.type) == "nccl":
        dist.all_gather(segments, rows, group=group)
        return
    segments[dist.get_rank(group)].copy_(rows)
    for rank, segment in enumerate(segments):
        if segment.numel():
            dist.broadcast(segment, group=group, group_src=rank)


def gather_equal(out: torch.Tensor, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """The same number of elements from every rank, one after another, to out."""
    _gather_equal(out.view(-1), tensor.reshape(-1), group=group)


def scatter_equal(out: torch.Tensor, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
    """The sum over the ranks of `tensor`, an equal part to each rank's out."""
    _reduce_equal(out, tensor, group=group)


def side_by_side(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8 [n, width] of several tensors as one, copied in the widest words that fit them all: single bytes take a GPU several times as long."""
    word = _word(rows)
    return torch.cat([row.view(word) for row in rows], dim=1).view(torch.uint8)


def _word(rows: Sequence[torch.Tensor]) -> torch.dtype:
    fits = [dtype for dtype in (torch.int64, torch.int32, torch.int16) if all(_divides(row, dtype.itemsize) for row in rows)]
    return fits[0] if fits else torch.uint8


def _divides(row: torch.Tensor, size: int) -> bool:
    return row.shape[1] % size == 0 and row.data_ptr() % size == 0 and row.storage_offset() % size == 0


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """[n, ...] as bytes [n, bytes per row]; a view where the tensor is contiguous."""
    if tensor.numel() == 0:  # its strides mean nothing, and `contiguous` leaves them
        return tensor.new_empty((tensor.shape[0], math.prod(tensor.shape[1:]) * tensor.dtype.itemsize), dtype=torch.uint8)
    # Flat: torch calls tensors contiguous whose last stride is not 1.
    return tensor.contiguous().flatten().view(torch.uint8).view(tensor.shape[0], -1)


def _agree(
    tensors: Sequence[torch.Tensor], widths: Sequence[int], sizes: Sequence[int], rows: int, group: dist.ProcessGroup | None, where: str,
    check: bool | None, *, total: bool = False,
) -> None:  # fmt: skip
    """Raise InputError on every rank where they disagree, or where one has other rows than `sizes` says."""
    device = tensors[0].device
    if not (device.type == "cpu" if check is None else check):
        return
    world = dist.get_world_size(group)
    mine = [rows, sum(widths), len(sizes), *list(sizes)[:world], *[0] * (world - len(sizes))]
    dtypes = " ".join(str(tensor.dtype) for tensor in tensors).encode()
    header = torch.tensor([*mine, sum((index + 1) * byte for index, byte in enumerate(dtypes))], dtype=torch.int64, device=device)
    headers = header.new_empty((world, len(header)))
    with naming_the_failed(group, where):
        gather_equal(headers, header, group)
    everyone = headers.tolist()
    said = [f"rank {rank}: {its[3 : 3 + world] if its[2] == world else f'{its[2]} sizes'}" for rank, its in enumerate(everyone)]
    if any(its[2:-1] != everyone[0][2:-1] for its in everyone):
        raise InputError("ranks disagree about the sizes", where=where, given="; ".join(said), needed="one list for all")
    if everyone[0][2] != world:
        return  # `check_sizes` says so on every rank
    expected = everyone[0][3 : 3 + world]
    wrong = [
        f"rank {rank} has {its[0]} rows, not {wanted}"
        for rank, its in enumerate(everyone)
        if its[0] != (wanted := sum(expected) if total else expected[rank])
    ]
    if wrong:
        raise InputError("rows do not fit the sizes", where=where, given="; ".join(wrong), needed=f"sizes {expected}")
    if any(its[1] != everyone[0][1] for its in everyone):
        given = "; ".join(f"rank {rank}: {its[1]}" for rank, its in enumerate(everyone))
        raise InputError("ranks disagree about the bytes per row", where=where, given=given, needed="tensors of one kind on all")
    if any(its[-1] != everyone[0][-1] for its in everyone):
        raise InputError("ranks disagree about the dtypes", where=where, given=f"here {dtypes.decode()}", needed="the same on all")


def as_sizes(sizes: Sequence[int], where: str) -> tuple[int, ...]:
    """Rows of every rank as a tuple; InputError for what are no integers."""
    if isinstance(sizes, Sequence) and all(isinstance(count, Integral) for count in sizes):
        return tuple(sizes)
    raise InputError("sizes do not fit", where=where, given=reprlib.repr(sizes), needed="the number of rows of every rank")


def check_sizes(sizes: Sequence[int], world: int, where: str) -> None:
    """Raise InputError unless there is one number of rows per rank."""
    if len(sizes) != world or any(size < 0 for size in sizes):
        raise InputError("sizes do not fit the group", where=where, given=list(sizes), needed=f"{world} numbers of rows, one per rank")


def _as_tensors(name: str, given: Any, where: str) -> list[torch.Tensor]:
    tensors = [given] if isinstance(given, torch.Tensor) or not isinstance(given, Iterable) else list(given)
    for tensor in tensors:
        _check_has_rows(name, tensor, where)
    return tensors


def _check_has_rows(name: str, tensor: torch.Tensor, where: str) -> None:
    check_tensors(where, **{name: tensor})
    if not tensor.ndim:
        raise InputError(f"{name} has no rows", where=where, given="a scalar", needed="[rows, ...]")


def _check_rows(name: str, tensor: torch.Tensor, rows: int, device: torch.device, where: str) -> None:
    if tensor.shape[0] != rows or tensor.device != device:
        given = f"{tuple(tensor.shape)} on {tensor.device}"
        raise InputError(f"{name} does not fit the sizes", where=where, given=given, needed=f"{rows} rows on {device}")


def _check_out(out: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor, where: str, *, any_float: bool = False) -> None:
    right_dtype = out.dtype == like.dtype or (any_float and out.is_floating_point())
    if tuple(out.shape) != shape or not right_dtype or out.device != like.device or not out.is_contiguous():
        given = f"{out.dtype} {tuple(out.shape)} on {out.device}, strides {out.stride()}"
        raise InputError("out does not fit", where=where, given=given, needed=f"{like.dtype} {shape} on {like.device}, contiguous")
