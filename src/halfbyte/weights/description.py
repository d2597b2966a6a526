"""Experts taken apart for ops of torch.library, which take tensors and strings: their tensors, and a description of all the rest."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from halfbyte.experts import Activation
from halfbyte.formats import BlockFormat, QuantTensor
from halfbyte.formats.block_format import FORMATS
from halfbyte.weights.hopper.layout import HopperMatrix
from halfbyte.weights.layouts import LAYOUTS

_PARTS = (QuantTensor, Activation, HopperMatrix)  # of storages
_CLASSES = {cls.__name__: cls for cls in (*_PARTS, *(layout.storage for layout in LAYOUTS.values()))}


def describe(experts: Any) -> str:
    """Write down everything about `experts` (of any layout) but the values of its tensors, as JSON.

    It stands for itself: a graph that holds it can be cached or exported, and run by another process.

    >>> w = halfbyte.ExpertWeights(torch.zeros(2, 8, 4), torch.zeros(2, 4, 4))
    >>> rebuild(describe(w), list(w.tensors.values())).activation
    Activation(kind='swiglu', alpha=1.0, beta=0.0, limit=None)
    """
    names = {id(tensor): name for name, tensor in experts.tensors.items()}
    return json.dumps({"tensors": list(experts.tensors), "experts": _outline(experts, names)})


def rebuild(description: str, tensors: Sequence[torch.Tensor]) -> Any:
    """The experts that `description` was made of, with these for the values of their `tensors`."""
    names, outline = _parse(description)
    return _build(outline, dict(zip(names, tensors, strict=True)))


@functools.cache
def _parse(description: str) -> tuple[list[str], Any]:
    parsed = json.loads(description)
    return parsed["tensors"], parsed["experts"]


def _outline(value: Any, names: Mapping[int, str]) -> Any:
    if isinstance(value, torch.Tensor):
        return {"tensor": names[id(value)]}
    if isinstance(value, BlockFormat):
        return {"format": value.name}
    if isinstance(value, dict):
        return {"dict": {key: _outline(item, names) for key, item in value.items()}}
    if is_dataclass(value):
        return {"class": type(value).__name__, "fields": {field.name: _outline(getattr(value, field.name), names) for field in fields(value)}}
    return value


def _build(outline: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(outline, dict):
        return outline
    if "tensor" in outline:
        return tensors[outline["tensor"]]
    if "format" in outline:
        return FORMATS[outline["format"]]
    if "dict" in outline:
        return {key: _build(item, tensors) for key, item in outline["dict"].items()}
    made: Any = object.__new__(_CLASSES[outline["class"]])  # not its __init__: what it checks was checked, and this is done at every call
    vars(made).update({key: _build(item, tensors) for key, item in outline["fields"].items()})
    return made
