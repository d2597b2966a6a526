"""A rank that fails leaves the others waiting in a collective. `tell_others` leaves its message where they find it when their wait ends.

The wait ends when the failed process does (gloo notices), or after the timeout of the group. The message lies in the store that the group was made
with, so it survives its writer where the store does: torchrun's does, and a file's; that of rank 0 ends with rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from halfbyte.arguments import check_type
from halfbyte.errors import HalfbyteError, InputError


class PeerError(HalfbyteError):
    """Another rank failed, or no longer answers."""


@contextmanager
def tell_others(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Within, an exception is also left for the other ranks of `group`, whose collective then raises `PeerError` with its text.

    >>> with tell_others():  # without other ranks it does nothing
    ...     pass
    """
    try:
        yield
    except PeerError:  # not this rank's own
        raise
    except Exception as error:
        if dist.is_initialized():
            with suppress(RuntimeError):  # the store is gone: the first error is the one to be seen
                _store().set(_key(dist.get_rank()), f"{type(error).__name__}: {error}")
        raise


@contextmanager
def naming_the_failed(group: dist.ProcessGroup | None, what: str) -> Iterator[None]:
    """Within, a collective that breaks off says which rank failed, and of what, where that rank left word."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, HalfbyteError):
            raise
        ranks = dist.get_process_group_ranks(group)
        told = [f"rank {rank} failed with {text}" for rank in ranks if (text := _message_of(rank)) is not None]
        reason = "; ".join(told) or f"a rank ended or no longer answers: {error}"
        raise PeerError(reason, where=what, next_step="look at the output of that rank") from error


def ranks_of(group: dist.ProcessGroup | None, where: str) -> tuple[int, int]:
    """This rank in the group, and how many there are.

    Raises:
        InputError: torch.distributed is not initialised, this process is not in the group, or that is no group.
    """
    if not dist.is_available() or not dist.is_initialized():
        next_step = "start with torchrun and call torch.distributed.init_process_group first"
        raise InputError("torch.distributed is not initialised", where=where, needed="a process group", next_step=next_step)
    if group is not None and group is not dist.GroupMember.NON_GROUP_MEMBER:
        check_type(where, dist.ProcessGroup, group=group)
    rank = dist.get_rank(group)
    if rank < 0:
        raise InputError("this process is not in the group", where=where, given=f"global rank {dist.get_rank()}", needed="one of the group's ranks")
    return rank, dist.get_world_size(group)


def backend_of(group: dist.ProcessGroup | None, device_type: str) -> str:
    """Who moves tensors of this kind of device ("cpu", "cuda"): "gloo", "nccl", ...; "" where nobody does.

    >>> dist.init_process_group(rank=0, world_size=1, store=dist.HashStore(), backend="cpu:gloo")
    >>> backend_of(None, "cpu"), backend_of(None, "cuda")
    ('gloo', '')
    >>> dist.destroy_process_group()
    """
    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    return backends.get(device_type, "")


def _message_of(rank: int) -> str | None:
    try:
        store = _store()
        return store.get(_key(rank)).decode() if store.check([_key(rank)]) else None
    except RuntimeError:  # the store ended with its host
        return None


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()  # torch 2.11 to 2.15 have no public name for it


def _key(rank: int) -> str:
    return f"halfbyte/failed/{rank}"
