"""What halfbyte is measured against: systems that run the same layer from the same weights, behind one signature."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import halfbyte
from halfbyte.bench.room import check_room
from halfbyte.bench.shapes import MoEShape
from halfbyte.env import expanded
from halfbyte.errors import InputError
from halfbyte.experts import SWIGLU, ExpertWeights
from halfbyte.formats import QuantTensor
from halfbyte.kernels.reference.activation import activate

# hidden bf16 [T, H], ids int32 [T, k], weights fp32 [T, k] to [T, H]. Two optional attributes: `graph = False` says that it waits for the device,
# and cannot be captured in a CUDA graph; `kernel` names what runs.
Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Build = Callable[[ExpertWeights, MoEShape], Layer]


@dataclass(frozen=True)
class Peer:
    """A system to measure: `load()` returns its build function and may fail when its software is not there."""

    name: str
    load: Callable[[], Build]


def find_peer(spec: str) -> Peer:
    """The peer of that name: a built-in one, or FILE.py:FUNCTION (FILE.py alone: its `build`), a function (weights, shape) -> layer.

    Raises:
        InputError: no such built-in peer, no such file.
    """
    if spec in BUILT_IN:
        return Peer(spec, lambda: BUILT_IN[spec])
    file_name, _, function = spec.rpartition(":") if not spec.endswith(".py") else (spec, "", "")
    file = expanded(file_name)
    if file.suffix != ".py":
        raise InputError("unknown peer", given=repr(spec), needed=f"{' or '.join(BUILT_IN)} or FILE.py:FUNCTION")
    if not file.is_file():
        raise InputError("no such peer file", given=file)
    return Peer(function or file.stem, functools.cache(lambda: _load(file, function or "build")))


def _load(file: Path, function: str) -> Build:
    spec = importlib.util.spec_from_file_location(f"halfbyte_peer_{file.stem}", file)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


class ReferenceLayer:
    """halfbyte's own definition of the layer, in plain torch."""

    graph = False

    def __init__(self, weights: ExpertWeights, shape: MoEShape):
        self._prepared = halfbyte.prepare(weights, layout="canonical")

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return halfbyte.fused_moe(hidden, self._prepared, ids, weights, backend="reference")


class TorchLayer:
    """bf16 weights and torch's grouped_mm: what the layer costs without quantisation. Holds 2 bytes per weight beside the packed ones.

    Raises:
        UnsupportedError: there is no room for the bf16 weights.
    """

    graph = True

    def __init__(self, weights: ExpertWeights, shape: MoEShape):
        check_room(2 * (weights.w13.shape.numel() + weights.w2.shape.numel()), weights.device, "the bf16 weights")
        self._w13, self._w2 = _bf16(weights.w13), _bf16(weights.w2)
        self._w13_bias, self._w2_bias = weights.w13_bias, weights.w2_bias
        self._activation = weights.activation
        self._experts = torch.arange(weights.num_experts, dtype=torch.int32, device=weights.device)

    def __call__(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        expert_of_row, slot_of_row = ids.flatten().sort(stable=True)
        row_end = torch.searchsorted(expert_of_row, self._experts, right=True, out_int32=True)
        gate_up = F.grouped_mm(hidden[slot_of_row // ids.shape[1]], self._w13.mT, offs=row_end)
        if self._w13_bias is not None:
            gate_up += self._w13_bias[expert_of_row]
        rows = F.grouped_mm(self._activate(gate_up), self._w2.mT, offs=row_end)
        if self._w2_bias is not None:
            rows += self._w2_bias[expert_of_row]
        row_of_slot = torch.empty_like(rows)
        row_of_slot[slot_of_row] = rows
        return torch.bmm(weights.to(rows.dtype).unsqueeze(1), row_of_slot.view(*ids.shape, -1)).squeeze(1)

    def _activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self._activation != SWIGLU:
            return activate(gate_up, self._activation)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up  # two kernels instead of the five of the general formula


def _bf16(weight: QuantTensor | torch.Tensor) -> torch.Tensor:
    return weight.dequantize(torch.bfloat16) if isinstance(weight, QuantTensor) else weight.bfloat16()


BUILT_IN: dict[str, Build] = {"torch": TorchLayer, "reference": ReferenceLayer}
