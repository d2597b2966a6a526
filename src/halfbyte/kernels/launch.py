"""`launch`: a Triton kernel again, without what Triton finds out anew at every launch.

Triton looks at each argument, names the kernel compiled for such arguments, and compares the global constants of its source with what they were: some
50 us of the host, where the launch itself takes 5 (Triton 3.6). A prefill call has seven launches. Here the compiled kernel is found by the arguments
themselves. Triton's launch hooks are not called.
"""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

_MAX_KNOWN = 8192  # numbers of tokens are among the arguments
_known: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: tuple[Any, ...], **options: Any) -> None:
    """kernel[grid](*arguments, *constants, **options): all parameters of the kernel, its constexprs last, and Triton's options.

    An argument may be a tuple of tensors. Options are given in the same order at every launch of a kernel.
    """
    if not isinstance(kernel, JITFunction):  # interpreted
        kernel[grid](*arguments, *constants, **options)
        return
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    key = [id(kernel), device, constants, *options.values()]
    _describe(arguments, key)
    compiled = _known.get(tuple(key))
    if compiled is not None:
        stream = driver.get_current_stream(device)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *constants)
        return
    # Triton 3.10 will fuse no multiplication with an addition unless told to.
    compiled = kernel[grid](*arguments, *constants, **{"enable_fp_fusion": True} | options)
    if compiled is not None:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        _known[tuple(key)] = compiled


def _describe(arguments: tuple[Any, ...], key: list[Any]) -> None:
    """Append what the compiled kernel depends on."""
    for argument in arguments:
        kind = type(argument)
        if isinstance(argument, Tensor):
            key.append(argument.dtype)
            if argument.data_ptr() & 15:
                key.append("not aligned")
        elif kind is int:
            key.append(argument)
        elif kind is TensorDescriptor:
            key.append(id(argument.layout))  # of `tma_descriptor`, which has one for each kind of block
        elif isinstance(argument, tuple):
            _describe(argument, key)
        else:
            key.append(argument)
