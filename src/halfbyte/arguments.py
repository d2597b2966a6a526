"""What public functions and classes do with tensors and devices that they are given: check, find, compare."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from halfbyte.errors import InputError, UnsupportedError


def check_tensors(where: str, **arguments: object) -> None:
    """Raise InputError for an argument that is no tensor.

    >>> check_tensors("f", x=[1.0])
    Traceback (most recent call last):
    ...
    halfbyte.errors.InputError: f: x is no tensor (given list; needed torch.Tensor)
    """
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise InputError(f"{name} is no tensor", where=where, given=type(value).__name__, needed="torch.Tensor")


def as_device(device: torch.device | str, where: str) -> torch.device:
    """The device of that name, with its index.

    Raises:
        UnsupportedError: there is no such device on this machine, or this build of torch does not know it.
    """
    try:
        return torch.empty(0, dtype=torch.uint8, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedError(f"cannot use the device: {reason}", where=where, given=device, next_step="run: halfbyte doctor") from error


def same_bits(some: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors have the same names, shapes, dtypes, devices and bits."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)

    def kinds(tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
        return {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors.items()}

    return kinds(some) == kinds(others) and all(torch.equal(bits(tensor), bits(others[name])) for name, tensor in some.items())
