"""`Workspace`: memory that the calls of many layers share for what lies between their input and their result.

Kernels ask `scratch` for such memory. It comes from the workspace that `lend` has put in force, or else from torch's allocator.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch

from halfbyte.arguments import check_tensors
from halfbyte.errors import InputError

ALIGNMENT = 256  # bytes, as torch aligns what it allocates
_MAX_KEPT = 4096
_in_force = threading.local()


class Workspace:
    """A buffer for one stream of one device: every call starts anew at its beginning, so calls that may overlap need one each.

    What does not fit is allocated by torch, as without a workspace; `halfbyte.workspace_nbytes` says how much fits a layer. A CUDA graph that was
    captured with it needs the buffer to stay as it is.

    Attributes:
        buffer: uint8 [nbytes], contiguous, at an address that is a multiple of 256.

    >>> workspace = halfbyte.Workspace(torch.empty(1 << 20, dtype=torch.uint8))
    >>> 0 <= (1 << 20) - workspace.nbytes < 256  # what lies before an aligned address is left out
    True
    """

    def __init__(self, buffer: torch.Tensor) -> None:
        """Raises InputError where `buffer` is something else."""
        check_tensors("Workspace", buffer=buffer)
        if buffer.dtype != torch.uint8 or buffer.ndim != 1 or not buffer.is_contiguous():
            given = f"{buffer.dtype} {tuple(buffer.shape)}"
            raise InputError("a workspace is a buffer of bytes", where="Workspace", given=given, needed="contiguous uint8 [nbytes]")
        self.buffer = buffer[-buffer.data_ptr() % ALIGNMENT :]
        self._used = self._missed = 0
        self._kept: dict[Hashable, tuple[Any, int]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has a buffer of its own, and nothing that was made in this one."""
        return Workspace, (self.buffer,)

    @property
    def nbytes(self) -> int:
        return self.buffer.numel()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next free bytes as a tensor, uninitialised."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._used + nbytes > self.nbytes:
            self._missed += 1
            return torch.empty(shape, dtype=dtype, device=self.buffer.device)
        view = self.buffer[self._used : self._used + nbytes].view(dtype).view(shape)
        self._used += aligned(nbytes)
        return view

    def keep(self, make: Callable[..., Any], arguments: tuple[Hashable, ...]) -> Any:
        """`make`(*arguments), which takes its memory here: made once for a place, as all layers of a model ask for the same."""
        key = (make, self._used, arguments)
        kept = self._kept.get(key)
        if kept is not None:
            made, self._used = kept
            return made
        missed = self._missed
        made = make(*arguments)
        if missed == self._missed:
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            self._kept[key] = made, self._used
        return made

    def start(self) -> None:
        """Everything that was taken is free again."""
        self._used = 0


def aligned(nbytes: int) -> int:
    """What a tensor of so many bytes takes of a workspace."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def lend(workspace: Workspace | None) -> AbstractContextManager[None]:
    """Within, and in this thread, `scratch` takes its memory from `workspace`."""
    return nullcontext() if workspace is None else _Loan(workspace)


class _Loan(AbstractContextManager[None]):
    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def __enter__(self) -> None:
        self._workspace.start()
        _in_force.workspace = self._workspace

    def __exit__(self, *_: object) -> None:
        _in_force.workspace = None


Make = TypeVar("Make", bound=Callable[..., Any])


def kept_in_workspace(make: Make) -> Make:
    """`make`, whose result is made of `scratch` memory and of its arguments alone: a workspace gives the same objects again."""

    def find(*arguments: Hashable) -> Any:
        workspace: Workspace | None = getattr(_in_force, "workspace", None)
        return make(*arguments) if workspace is None else workspace.keep(make, arguments)

    return cast(Make, find)


@kept_in_workspace
def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory that is needed until the call ends."""
    workspace: Workspace | None = getattr(_in_force, "workspace", None)
    return torch.empty(shape, dtype=dtype, device=device) if workspace is None else workspace.take(shape, dtype)
