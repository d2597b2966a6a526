"""May new experts take the place of prepared ones? Everything that can be wrong with them is found before a byte is written."""

from __future__ import annotations

from typing import Any

import torch

from halfbyte.checkpoint.experts import ExpertWeights
from halfbyte.errors import InputError
from halfbyte.formats import QuantTensor

_DESCRIBED_BY = ("format", "activation", "num_experts", "hidden", "intermediate", "first_expert", "num_global_experts")


def check_same_kind(held: Any, arriving: Any) -> None:
    """Compare two storages of one layout, of which `arriving` may be on "meta": what describes them, then every tensor's name, dtype and shape.

    Raises:
        InputError: they differ.
    """
    for name in _DESCRIBED_BY:
        if getattr(held, name) != getattr(arriving, name):
            raise _not_replaceable(f"the experts differ in {name}", getattr(arriving, name), getattr(held, name))
    ours, theirs = ({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in side.tensors.items()} for side in (held, arriving))
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise _not_replaceable(f"the experts differ in {name}", *(_described(side.get(name)) for side in (theirs, ours)))


def check_scales(w: ExpertWeights) -> None:
    """Refuse what no kernel can use.

    Raises:
        InputError: scales in another layout than "linear", a block scale that is negative or NaN, another scale that is negative or not finite.
    """
    for name, weight in (("w13", w.w13), ("w2", w.w2)):
        if not isinstance(weight, QuantTensor):
            continue
        if weight.scale_layout != "linear":
            raise _not_replaceable(f"{name} has its scales in another layout", weight.scale_layout, "linear")
        raw = weight.scales.view(torch.uint8)
        largest = 0x7E if weight.format.has_global_scale else 0xFE  # above: NaN, and for e4m3 the negative half
        if raw.numel() and int(raw.max()) > largest:
            raise _not_replaceable(f"{name} has block scales that are negative or NaN", f"byte {int(raw.max()):#04x}", f"at most {largest:#04x}")
    for name, tensor in w.tensors.items():
        if name.endswith(("global_scale", "input_scale")) and not bool(((tensor >= 0) & tensor.isfinite()).all()):
            raise _not_replaceable(f"{name} has values that are negative or not finite", f"smallest {tensor.min().item()}", "finite scales >= 0")


def _described(tensor: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "none" if tensor is None else f"{str(tensor[0]).removeprefix('torch.')} {tensor[1]}"


def _not_replaceable(problem: str, given: object, needed: object) -> InputError:
    return InputError(problem, where="PreparedExperts.update_", given=given, needed=needed, next_step="nothing was written")
