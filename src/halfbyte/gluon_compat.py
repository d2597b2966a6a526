"""What the Gluon kernels share on the host: TMA descriptors, and names and cache keys where Triton releases differ (3.6 and newer)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

# The second names are those of Triton 3.6; calling them raises in 3.9.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
aggregate = getattr(gluon, "aggregate", None) or triton.language.core._aggregate
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


def fix_cache_keys(*functions: Any) -> None:
    """Let Triton compute the cache keys of these functions now, in this order; what else is among them is passed over.

    With Triton 3.6 and 3.7 (not 3.9) a kernel's key contains the global constants of the functions it calls only if those were hashed before: which
    of two kernels runs first in a process would decide whether the other is found in the disk cache or compiled again. So a module of functions that
    kernels of several modules share fixes them all: `fix_cache_keys(*globals().values())`.

    At every launch Triton compares all global constants of a kernel with what they were, which takes the host longer than the launch. Those here do
    not change, so they are forgotten.
    """
    for function in functions:
        if isinstance(function, JITFunction):
            function.cache_key  # noqa: B018 (a property that does the work)
            function.used_global_vals.clear()


def tma_descriptor(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A TMA descriptor of a matrix, copied in blocks of this size."""
    return TensorDescriptor.from_tensor(tensor, [rows, columns], _shared_layout(rows, columns, tensor.dtype))


@functools.cache
def _shared_layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    element = {torch.bfloat16: gl.bfloat16, torch.float8_e4m3fn: gl.float8e4nv, torch.int32: gl.int32, torch.int16: gl.int16}[dtype]
    return gl.NVMMASharedLayout.get_default_for([rows, columns], element)
