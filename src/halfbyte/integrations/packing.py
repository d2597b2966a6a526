"""Packing the experts of a host's module in the memory that they have, and giving them back.

A host keeps canonical weights as Parameters of a module of its own. Where the kernels of the device want a layout of their own, the experts are
arranged in place at the first call: buffers, which state_dict does not see, take the place of the Parameters. `state_dict()` still holds the
canonical tensors (in new memory, codes under a zero scale as zeros), `load_state_dict` fills them, and when the module is moved to a device without
such kernels they come back. For activations that want another layout, experts are packed anew.

What differs between hosts is a `Host`. The state of a module is its `Packing`, at `module.halfbyte`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from halfbyte.device import Target
from halfbyte.errors import UnsupportedError
from halfbyte.experts import ExpertWeights
from halfbyte.formats import BlockFormat
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.kernels.problem import Problem
from halfbyte.kernels.table import wanted_layout
from halfbyte.loading import prepare
from halfbyte.moe.parallel import ExpertParallel
from halfbyte.weights import PreparedExperts

Module = Any  # a module of the host with a `Packing` at `halfbyte`


@dataclass(frozen=True)
class Host:
    """How a host keeps the experts of one module.

    Attributes:
        weights: (module) to its experts in canonical form, sharing the module's storage.
        parameters: (module) to the names of the Parameters that packing replaces, by the names of their canonical tensors ("w13.codes", ...).
        keeps_storage: (module) to whether the tensors stay where they are: not where the host brings other copies of them at every call.
    """

    weights: Callable[[Module], ExpertWeights]
    parameters: Callable[[Module], Mapping[str, str]]
    keeps_storage: Callable[[Module], bool]


@dataclass
class Packing:
    """What is kept beside the tensors of one module.

    Attributes:
        host, format: how the experts are kept, and in what.
        activations: what the experts see of their inputs.
        layout: "auto" packs the experts in place where the kernels of the device read a layout of their own; "canonical" never does.
        prepared: what the next call uses, as long as its tensors are at `addresses`.
        prepared_for: the circumstances that `prepared` fits.
        replaced: while packed in place, the dtypes of the Parameters that are gone, by name.
        parallel: who carries tokens to the ranks of their experts; the module then holds those of its own rank.
    """

    host: Host
    format: BlockFormat
    activations: ActivationFormat = "bf16"
    layout: Literal["auto", "canonical"] = "auto"
    prepared: PreparedExperts | None = None
    addresses: tuple[int, ...] = ()
    prepared_for: str = ""
    replaced: dict[str, torch.dtype] = field(default_factory=dict)
    parallel: ExpertParallel | None = None


def attach(module: Module, packing: Packing) -> None:
    """Make `module` one whose experts are packed when they are needed."""
    module.halfbyte = packing
    module.register_state_dict_post_hook(_save_canonical)
    module.register_load_state_dict_pre_hook(_load_canonical)


def is_attached(module: nn.Module) -> bool:
    return isinstance(getattr(module, "halfbyte", None), Packing)


def prepared_experts(module: Module) -> PreparedExperts:
    """The experts for the next call: prepared at the first one, and again when a tensor has moved (`model.to(device)`, offloading, a reload)."""
    packing = module.halfbyte
    layout = _layout_of(module)
    if packing.replaced and packing.prepared.layout != layout:
        restore_canonical(module)
    if layout != "canonical" and not packing.replaced:
        pack_in_place(module, layout)
    addresses = tuple(tensor.data_ptr() for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    if packing.prepared is None or packing.addresses != addresses:
        packing.prepared = _packed(module) if packing.replaced else prepare(packing.host.weights(module), "canonical")
        packing.addresses = addresses
    packing.prepared_for = circumstances(module, _device(module))
    return packing.prepared


def circumstances(module: Module, device: torch.device) -> str:
    """What decides how experts are prepared; a string, because torch.compile guards that it stays the same."""
    return f"{module.halfbyte.layout} layout, activations {module.halfbyte.activations}, {device.type} {device.index}"


def pack_in_place(module: Module, layout: str) -> None:
    """Arrange the experts in the memory of their Parameters, and put buffers in the place of those."""
    packing = module.halfbyte
    packing.prepared = prepare(packing.host.weights(module), layout, in_place=True)
    for name in packing.host.parameters(module).values():
        packing.replaced[name] = module.get_parameter(name).dtype
        delattr(module, name)
    for name, tensor in packing.prepared.storage.tensors.items():
        module.register_buffer(_buffer_name(name), tensor, persistent=False)


def restore_canonical(module: Module) -> None:
    """Undo `pack_in_place`; nothing to do where the module is not packed."""
    packing = module.halfbyte
    if not packing.replaced:
        return
    packed = _packed(module)
    for name, tensor in _canonical_parameters(module, packed).items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    for name in packed.storage.tensors:
        delattr(module, _buffer_name(name))
    packing.prepared, packing.prepared_for, packing.replaced = None, "", {}


def canonical_parameters(module: Module) -> dict[str, torch.Tensor]:
    """The Parameters that `pack_in_place` replaced, by name, made anew; none where the module is not packed. Errors as `packed_tensors`."""
    packing = module.halfbyte
    return _canonical_parameters(module, _packed(module)) if packing.replaced else {}


def packed_tensors(module: Module) -> dict[str, torch.Tensor]:
    """The buffers that hold the packed experts, by the names of the layout.

    Raises:
        UnsupportedError: the module was cast to another dtype, which packed weights do not survive.
    """
    storage = module.halfbyte.prepared.storage
    tensors = {name: module.get_buffer(_buffer_name(name)) for name in storage.tensors}
    for name, tensor in storage.tensors.items():
        if tensors[name].dtype != tensor.dtype:
            raise UnsupportedError("packed experts cannot be cast", where=f"{type(module).__name__}.{name}", given=tensors[name].dtype)
    return tensors


def _layout_of(module: Module) -> str:
    packing = module.halfbyte
    if packing.layout != "auto" or not packing.host.keeps_storage(module):
        return "canonical"
    return _wanted_layout(_device(module), packing.format, packing.activations)


@functools.cache
def _wanted_layout(device: torch.device, format: BlockFormat, activations: ActivationFormat) -> str:
    return wanted_layout(Problem("fused_moe", Target.of(device), format, activations=activations), in_place=True)[0]


def _packed(module: Module) -> PreparedExperts:
    """The packed experts, in the module's buffers as they are now; errors as `packed_tensors`."""
    prepared = module.halfbyte.prepared
    return replace(prepared, storage=prepared.storage.with_tensors(packed_tensors(module)), target=Target.of(_device(module)))


def _canonical_parameters(module: Module, packed: PreparedExperts) -> dict[str, torch.Tensor]:
    """The tensors that `pack_in_place` replaced, by the names of their Parameters."""
    packing, canonical = module.halfbyte, packed.unprepare().tensors
    names = packing.host.parameters(module)
    return {name: canonical[tensor].view(packing.replaced[name]) for tensor, name in names.items()}


def _save_canonical(module: Module, state_dict: dict[str, torch.Tensor], prefix: str, _: object) -> None:
    state_dict.update({prefix + name: tensor for name, tensor in canonical_parameters(module).items()})


def _load_canonical(module: Module, *_: object) -> None:
    restore_canonical(module)


def _buffer_name(name: str) -> str:
    return f"packed_{name.replace('.', '_')}"


def _device(module: Module) -> torch.device:
    return next(itertools.chain(module.buffers(recurse=False), module.parameters(recurse=False))).device
