"""`Workspace`: memory that the calls of many layers share for what lies between their input and their result.

Kernels ask `scratch` for such memory. It comes from the workspace that `lend` has put in force, or else from torch's allocator.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from halfbyte.arguments import check_tensors
from halfbyte.errors import InputError

ALIGNMENT = 256  # bytes, as torch aligns what it allocates
_MAX_VIEWS = 4096
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
        self._used = 0
        self._views: dict[tuple[int, tuple[int, ...], torch.dtype], torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        return self.buffer.numel()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The next free bytes as a tensor, uninitialised."""
        key = (self._used, shape, dtype)
        view = self._views.get(key)  # making one takes the host longer than finding it, and all layers of a model ask for the same
        if view is None:
            nbytes = math.prod(shape) * dtype.itemsize
            if self._used + nbytes > self.nbytes:
                return torch.empty(shape, dtype=dtype, device=self.buffer.device)
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            view = self._views[key] = self.buffer[self._used : self._used + nbytes].view(dtype).view(shape)
        self._used += aligned(view.nbytes)
        return view

    def start(self) -> None:
        """Everything that was taken is free again."""
        self._used = 0


def aligned(nbytes: int) -> int:
    """What a tensor of so many bytes takes of a workspace."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@contextmanager
def lend(workspace: Workspace | None) -> Iterator[None]:
    """Within, and in this thread, `scratch` takes its memory from `workspace`."""
    if workspace is None:
        yield
        return
    workspace.start()
    _in_force.workspace = workspace
    try:
        yield
    finally:
        _in_force.workspace = None


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised memory that is needed until the call ends."""
    workspace: Workspace | None = getattr(_in_force, "workspace", None)
    return torch.empty(shape, dtype=dtype, device=device) if workspace is None else workspace.take(shape, dtype)
