"""Everything that can be wrong with experts, found before a byte of them is written anywhere."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from halfbyte.errors import InputError
from halfbyte.experts import ExpertWeights
from halfbyte.formats import QuantTensor

_DESCRIBED_BY = ("format", "activation", "num_experts", "hidden", "intermediate", "first_expert", "num_global_experts")
_SCALARS = ("global_scale", "input_scale")


def fp4_matrices(w: ExpertWeights, layout: str) -> tuple[QuantTensor, QuantTensor]:
    """w13 and w2, known to be in FP4 with scales in rows.

    Raises:
        InputError: the weights are dense, or their scales are not in layout "linear".
    """
    if not isinstance(w.w13, QuantTensor) or not isinstance(w.w2, QuantTensor):
        raise InputError(f"layout {layout!r} holds FP4 weights", where="prepare", given="dense experts", needed="NVFP4 or MXFP4 experts")
    for name, matrix in (("w13", w.w13), ("w2", w.w2)):
        _check_linear(name, matrix)
    return w.w13, w.w2


ScaleCheck = Callable[[torch.Tensor], None]
"""Takes the flag, bool or uint8 [] on any device, that says whether the scales of some experts are unusable."""


class ScaleChecks:
    """The checks of many layers, whose results are read together: the host waits once, not once per layer.

    >>> w = halfbyte.ExpertWeights(*(halfbyte.quantize(torch.randn(4, n, 32), halfbyte.MXFP4) for n in (64, 32)))
    >>> checks = halfbyte.ScaleChecks()
    >>> model = [halfbyte.prepare(w, scale_check=checks.of(f"layer {i}")) for i in range(3)]
    >>> checks.wait()
    """

    def __init__(self) -> None:
        self._flags: list[tuple[str, torch.Tensor]] = []

    def of(self, name: str) -> ScaleCheck:
        """What `prepare` and `update_` take as their `scale_check`; an error will call the experts `name`."""
        return functools.partial(self._add, name)

    def _add(self, name: str, flag: torch.Tensor) -> None:
        self._flags.append((name, flag))

    def wait(self) -> None:
        """Read the results, and forget them.

        Raises:
            InputError: scales are negative or not finite; the message names the experts, whose packed codes mean nothing.
        """
        flags, self._flags = self._flags, []
        host = [flag.to("cpu", non_blocking=True) for _, flag in flags]
        for device in {flag.device for _, flag in flags if flag.is_cuda}:
            torch.cuda.synchronize(device)
        bad = [name for (name, _), flag in zip(flags, host, strict=True) if flag]
        if bad:
            next_step = "run `halfbyte inspect` on the checkpoint"
            raise InputError("scales are negative or not finite", where=", ".join(bad), needed="finite scales >= 0", next_step=next_step)


def has_unusable_scales(w: ExpertWeights) -> torch.Tensor:
    """bool [] on the device of `w`, for which the host has not waited: whether any scale, of a block or other, is negative or not finite."""
    flag = has_unusable_scalars(w)
    for matrix in (w.w13, w.w2):
        if isinstance(matrix, QuantTensor) and matrix.scales.numel():
            flag = flag | (matrix.scales.view(torch.uint8).amax() > matrix.format.largest_scale_byte)
    return flag


def has_unusable_scalars(w: ExpertWeights) -> torch.Tensor:
    """bool [] on the device of `w`, for which the host has not waited: whether a global or input scale is negative or not finite.

    So is the inverse of the largest input scale of the layer, by which activations are multiplied, where all are zero.
    """
    scalars = [tensor.flatten() for name, tensor in w.tensors.items() if name.endswith(_SCALARS)]
    scalars += [_inverse_of_largest(tensor).reshape(1) for name, tensor in w.tensors.items() if name.endswith("input_scale") and tensor.numel()]
    return ~_usable(torch.cat(scalars)).all() if scalars else torch.zeros((), dtype=torch.bool, device=w.device)


def check_scales(w: ExpertWeights, *, positive: bool = False) -> None:
    """Refuse what no kernel can use. Reads every scale once; weights without data ("meta") have nothing to refuse.

    Args:
        positive: refuse global and input scales of zero, too.

    Raises:
        InputError: scales in another layout than "linear", a block scale that is negative or NaN, another scale that is negative or not finite,
            input scales that are all zero.
    """
    for name, matrix in (("w13", w.w13), ("w2", w.w2)):
        if isinstance(matrix, QuantTensor):
            _check_linear(name, matrix)
            _check_block_scales(name, matrix)
    for name, tensor in w.tensors.items():
        if not name.endswith(_SCALARS) or tensor.device.type == "meta":
            continue
        bad = int((~_usable(tensor, positive)).sum())
        if bad:
            raise _unusable(f"{name} is not usable", bad, tensor, "finite scales > 0" if positive else "finite scales >= 0")
        if name.endswith("input_scale") and tensor.numel() and not _usable(_inverse_of_largest(tensor)):
            raise _unusable(f"{name} is zero, or too small to divide by", tensor.numel(), tensor, "one that activations can be divided by")


def check_same_kind(held: Any, arriving: Any) -> None:
    """Compare two storages of one layout, of which `arriving` may be on "meta": what describes them, then every tensor's name, dtype and shape.

    Raises:
        InputError: they differ.
    """
    for name in _DESCRIBED_BY:
        if getattr(held, name) != getattr(arriving, name):
            raise _not_replaceable(name, getattr(arriving, name), getattr(held, name))
    ours, theirs = ({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in side.tensors.items()} for side in (held, arriving))
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise _not_replaceable(name, *(_described(side.get(name)) for side in (theirs, ours)))


def _usable(tensor: torch.Tensor, positive: bool = False) -> torch.Tensor:
    return (tensor < math.inf) & (tensor > 0 if positive else tensor >= 0)  # neither holds for NaN


def _inverse_of_largest(input_scale: torch.Tensor) -> torch.Tensor:
    return input_scale.float().amax().reciprocal()


def _check_linear(name: str, matrix: QuantTensor) -> None:
    if matrix.scale_layout != "linear":
        raise InputError(f"{name} has its block scales in tiles", where="expert weights", given=repr(matrix.scale_layout), needed="'linear'")


def _check_block_scales(name: str, matrix: QuantTensor) -> None:
    raw, largest = matrix.scales.view(torch.uint8), matrix.format.largest_scale_byte
    if raw.device.type == "meta" or not raw.numel() or raw.amax() <= largest:
        return
    bad = sum(int((expert > largest).sum()) for expert in raw)
    raise _unusable(f"{name} has block scales that are negative or NaN", bad, raw, "finite scales >= 0")


def _unusable(problem: str, count: int, tensor: torch.Tensor, needed: str) -> InputError:
    next_step = "run `halfbyte inspect` on the checkpoint; nothing was written"
    return InputError(problem, where="expert weights", given=f"{count} of {tensor.numel()} values", needed=needed, next_step=next_step)


def _not_replaceable(name: str, given: object, needed: object) -> InputError:
    where = "PreparedExperts.update_"
    return InputError(f"the experts differ in {name}", where=where, given=given, needed=needed, next_step="nothing was written")


def _described(tensor: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "none" if tensor is None else f"{str(tensor[0]).removeprefix('torch.')} {tensor[1]}"
