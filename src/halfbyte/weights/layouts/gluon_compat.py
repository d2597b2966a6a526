"""Where Triton releases differ. Everything else that is Gluon is the same for Triton 3.6 and newer."""

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# The second names are those of Triton 3.6; calling them raises in 3.9.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


def fix_cache_keys(*kernels: Any) -> None:
    """Let Triton compute the cache keys of these kernels now, in this order.

    With Triton 3.6 (not 3.9) a kernel's key contains the global constants of the functions it calls only if those were hashed before: which
    of two kernels runs first in a process would decide whether the other is found in the disk cache or compiled again.
    """
    for kernel in kernels:
        kernel.cache_key  # noqa: B018 (a property that does the work)
