"""What public functions and classes do with tensors, devices and dtypes that they are given: check, find, name, compare."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch

from halfbyte.errors import InputError, UnsupportedError

# The usual types first: abstract ones take longer to ask.
_INTEGERS: Any = (int, Integral)
_NUMBERS: Any = (int, float, Real)
_LARGEST = 2**31 - 1


def check_type(where: str, wanted: type | tuple[type, ...], **arguments: object) -> None:
    """Raise InputError for an argument that is of another type.

    >>> check_type("f", int, count=1, size="large")
    Traceback (most recent call last):
    ...
    halfbyte.errors.InputError: f: size is no int (given str; needed int)
    """
    for name, value in arguments.items():
        if not isinstance(value, wanted):
            kinds = wanted if isinstance(wanted, tuple) else (wanted,)
            problem = f"{name} is no {' or '.join(kind.__name__ for kind in kinds)}".replace("no Tensor", "no tensor")
            raise InputError(problem, where=where, given=type(value).__name__, needed=" or ".join(map(_path_of, kinds)))


def check_tensors(where: str, **arguments: object) -> None:
    """Raise InputError for an argument that is no tensor, or a sparse or otherwise encoded one.

    >>> check_tensors("f", x=[1.0])
    Traceback (most recent call last):
    ...
    halfbyte.errors.InputError: f: x is no tensor (given list; needed torch.Tensor)
    """
    check_type(where, torch.Tensor, **arguments)
    for name, tensor in arguments.items():
        assert isinstance(tensor, torch.Tensor)
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise InputError(f"{name} is no plain tensor", where=where, given=f"{tensor.layout}, {tensor.dtype}", needed="torch.strided, unquantized")


def check_writable(where: str, out: torch.Tensor) -> None:
    """Raise InputError for an `out` that cannot be written to: a leaf whose gradient is asked for, or one whose elements share their places.

    >>> check_writable("f", torch.zeros(1, 2).expand(3, 2))
    Traceback (most recent call last):
    ...
    halfbyte.errors.InputError: f: out cannot be written to (given strides (0, 1), shape (3, 2); needed a place for each element)
    """
    if out.requires_grad and out.is_leaf and torch.is_grad_enabled():
        raise InputError("out cannot be written to", where=where, given="a leaf that requires a gradient", needed="out.detach()")
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        given = f"strides {out.stride()}, shape {tuple(out.shape)}"
        raise InputError("out cannot be written to", where=where, given=given, needed="a place for each element")


def check_integers(where: str, least: int, **arguments: Any) -> None:
    """Raise InputError for an argument that is no integer, or a smaller one than `least`, or too large for int32, as ids and sizes are held.

    >>> check_integers("f", 1, rows=2, columns=0)
    Traceback (most recent call last):
    ...
    halfbyte.errors.InputError: f: columns does not fit (given 0; needed an integer of at least 1)
    """
    for name, value in arguments.items():
        if not isinstance(value, _INTEGERS) or isinstance(value, bool) or not least <= value <= _LARGEST:
            needed = f"an integer of at least {least}" + (", less than 2^31" if isinstance(value, _INTEGERS) and value > _LARGEST else "")
            raise InputError(f"{name} does not fit", where=where, given=reprlib.repr(value), needed=needed)


def check_numbers(where: str, **arguments: Any) -> None:
    """Raise InputError for an argument that is no finite number.

    >>> check_numbers("f", scale=float("nan"))
    Traceback (most recent call last):
    ...
    halfbyte.errors.InputError: f: scale does not fit (given nan; needed a finite number)
    """
    for name, value in arguments.items():
        if not isinstance(value, _NUMBERS) or not -math.inf < value < math.inf:
            raise InputError(f"{name} does not fit", where=where, given=reprlib.repr(value), needed="a finite number")


def check_callable(where: str, **arguments: object) -> None:
    """Raise InputError for an argument that is neither None nor a function."""
    for name, value in arguments.items():
        if value is not None and not callable(value):
            raise InputError(f"{name} is no function", where=where, given=type(value).__name__, needed="a function, or None")


def check_name(what: str, value: object, names: Iterable[str], where: str) -> None:
    """Raise InputError for a value that is none of `names`.

    >>> check_name("colour", "gren", ("red", "green"), "f")
    Traceback (most recent call last):
    ...
    halfbyte.errors.InputError: f: unknown colour (given 'gren'; needed 'red' or 'green')
    """
    if not isinstance(value, str) or value not in names:
        raise InputError(f"unknown {what}", where=where, given=reprlib.repr(value), needed=" or ".join(map(repr, names)))


def check_floats(where: str, **dtypes: object) -> None:
    """Raise InputError for what is no dtype of floats.

    >>> check_floats("f", dtype=torch.int32)
    Traceback (most recent call last):
    ...
    halfbyte.errors.InputError: f: dtype does not fit (given torch.int32; needed a dtype of floats)
    """
    for name, dtype in dtypes.items():
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"{name} does not fit", where=where, given=reprlib.repr(dtype), needed="a dtype of floats")


def as_device(device: torch.device | str, where: str) -> torch.device:
    """The device of that name, with its index.

    Raises:
        InputError: no device, and no name of one.
        UnsupportedError: there is no such device on this machine, or this build of torch does not know it.
    """
    check_type(where, (torch.device, str, int), device=device)
    try:
        return torch.empty(0, dtype=torch.uint8, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedError(f"cannot use the device: {reason}", where=where, given=device, next_step="run: halfbyte doctor") from error


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x [rows, K] itself where its rows lie one after another from a multiple of 16 bytes on, else a copy that does.

    For kernels that read words. `contiguous` is not enough: to torch a single row is contiguous whatever its stride, and a slice may start anywhere.

    >>> x = torch.zeros(3, 5)
    >>> dense_rows(x) is x, dense_rows(x[:1, :4]).stride()
    (True, (4, 1))
    """
    is_dense = x.stride() == (x.shape[1], 1) and x.data_ptr() % 16 == 0
    return x if is_dense else x.clone(memory_format=torch.contiguous_format)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, as config.json and arguments have it.

    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def same_bits(some: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors have the same names, shapes, dtypes, devices and bits."""

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().flatten().view(torch.uint8)  # flat: torch calls tensors contiguous whose last stride is not 1

    def kinds(tensors: Mapping[str, torch.Tensor]) -> dict[str, object]:
        return {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors.items()}

    return kinds(some) == kinds(others) and all(torch.equal(bits(tensor), bits(others[name])) for name, tensor in some.items())


def _path_of(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
