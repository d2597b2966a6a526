"""`launch`: a Triton kernel again, without what Triton finds out anew at every launch.

Triton looks at each argument, names the kernel compiled for such arguments, and compares the global constants of its source with what they were: some
50 us of the host, where the launch itself takes 5 (Triton 3.6). A prefill call has seven launches. Here the compiled kernel is found by the arguments
themselves. Triton's launch hooks are not called.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

_MAX_KNOWN = 8192  # numbers of tokens are among the arguments
_known: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options): all parameters of the kernel, by position or by name, and Triton's options by name.

    An argument may be a tuple of tensors.
    """
    if not isinstance(kernel, JITFunction):  # interpreted
        kernel[grid](*arguments, **options)
        return
    arguments = (*arguments, *map(options.pop, kernel.arg_names[len(arguments) :]))
    options.setdefault("enable_fp_fusion", True)  # Triton 3.10 will fuse no multiplication with an addition unless told to
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    key: list[Any] = [id(kernel), device, *options.values()]
    _describe(arguments, key)
    compiled = _known.get(tuple(key))
    if compiled is None:
        compiled = kernel[grid](*arguments, **options)
        if compiled is not None:
            if len(_known) >= _MAX_KNOWN:
                _known.clear()
            _known[tuple(key)] = compiled
        return
    sizes = (*grid, 1, 1)[:3]
    stream = driver.get_current_stream(device)
    compiled.run(*sizes, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def _describe(arguments: tuple[Any, ...], key: list[Any]) -> None:
    """Append what the compiled kernel depends on."""
    for argument in arguments:
        kind = type(argument)
        if kind is int or kind is bool:  # most are
            key.append(argument)
        elif isinstance(argument, torch.Tensor):
            key.append(argument.dtype)
            if argument.data_ptr() & 15:
                key.append("not aligned")
        elif kind is TensorDescriptor:
            key += (argument.base.dtype, id(argument.layout), *argument.block_shape)
        elif isinstance(argument, tuple) and argument and isinstance(argument[0], torch.Tensor):
            _describe(argument, key)
        else:
            key.append(argument)
