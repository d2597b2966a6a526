"""`PackedWeights`: how transformers' loader turns the tensors of the files into packed parameters, by a plan made beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from transformers.core_model_loading import MergeModulelist, WeightConverter

from halfbyte.checkpoint.source import TensorInfo
from halfbyte.integrations.transformers import fp8
from halfbyte.integrations.transformers.plan import Names, PackedParameter
from halfbyte.integrations.transformers.stored import BLOCK_SCALE, CODES, GLOBAL_SCALE, INPUT_SCALE, PRE_QUANT_SCALE, Stored
from halfbyte.integrations.transformers.values import (
    powers_of_two,
    usable_block_scales,
    usable_fp8_scales,
    usable_fp8_weight,
    usable_input_multiplier,
    usable_scalars,
)

_PATTERN = "halfbyte"  # the key of our converter in transformers' tables; no name is matched against it


class Recipe(NamedTuple):
    """How one tensor of the model is made.

    Attributes:
        parameter: the matrix it belongs to; role: what it is of it, None for the whole matrix made dense.
        experts, parts: how many matrices are stacked, and how many make one of them (gate and up: 2); 0 experts for a single matrix.
        alternating: the rows of stacked gate_up_proj matrices alternate.
        transposed: the matrices lie as [K, N].
    """

    parameter: PackedParameter
    role: str | None
    experts: int = 0
    parts: int = 1
    alternating: bool = False
    transposed: bool = False

    @property
    def matrices(self) -> Iterator[tuple[tuple[int, int], Stored]]:
        """Those that the module computes with, by (expert, part); LongCat's files may hold rows for its zero experts, which nothing reads."""
        return ((place, stored) for place, stored in self.parameter.places.items() if not self.experts or place[0] < self.experts)

    @property
    def stored_names(self) -> Iterator[str]:
        """The tensors of the files that have this role."""
        role = self.role
        return (stored.tensors[role] for _, stored in self.matrices if role is not None and role in stored.tensors)


@dataclass(frozen=True)
class LoadPlan:
    """What is loaded packed.

    Attributes:
        targets: names in the model by those that tensors of the files have when converters see them.
        recipes: by name in the model.
        files, headers: where the tensors of the files lie, and what they are.
        names: what transformers calls them; others: the tensors of the model that come dense.
        kept: tensors that scale activations and that the model has no place for, as they are in the files.
    """

    targets: Mapping[str, str]
    recipes: Mapping[str, Recipe]
    files: Mapping[str, Path]
    headers: Mapping[str, TensorInfo]
    names: Names
    others: tuple[str, ...]
    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)


class PackedWeights(WeightConverter):
    """The converter of every tensor in a `LoadPlan`, which comes before those of the model."""

    def __init__(self, plan: LoadPlan):
        # Transformers 5.17 and 5.23 look into the operations only for what is sharded, which packed models are not.
        super().__init__([_PATTERN], [_PATTERN], [MergeModulelist()])
        self.plan = plan

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeights:
        return PackedWeights(self.plan)  # one for each target; a plan is large

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        target = self.plan.targets.get(source_key)
        return (source_key, None) if target is None else (target, _PATTERN)

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        super().add_tensor(target_key, source_key, source_key, future)

    def convert(self, layer_name: str, model: Any = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        """The tensor `layer_name` of the model.

        Raises:
            CheckpointError: a value that cannot be used.
        """
        tensors = _Arriving({name: futures[0] for name, futures in self.collected_tensors.items()}, self.plan)
        self.collected_tensors.clear()
        recipe = self.plan.recipes[layer_name]
        if recipe.role is None:
            return {layer_name: _dense(recipe, tensors, layer_name, model, kwargs.get("config"))}
        if recipe.role == INPUT_SCALE:
            return {layer_name: _input_scales(recipe, tensors)}
        return {layer_name: _stack(recipe, tensors)}


class _Arriving:
    """The tensors of one target by name, each of which can be taken once."""

    def __init__(self, sources: dict[str, Any], plan: LoadPlan):
        self._sources, self._plan = sources, plan

    def take(self, stored: Stored, role: str) -> torch.Tensor:
        """One tensor, checked; scalars as fp32 decode multipliers [] or [E]."""
        name = stored.tensors[role]
        source = self._sources.pop(name)
        tensor = for_current_stream(source.result()) if isinstance(source, Future) else source()
        codes = stored.tensors[CODES]
        format = stored.dialect.format
        if format is None:
            return usable_fp8_weight(tensor, name) if role == CODES else usable_fp8_scales(tensor, len(stored.shape), name)
        if role == CODES:
            return tensor.view(torch.uint8)
        if role == BLOCK_SCALE:
            scales = powers_of_two(tensor, name) if tensor.dtype == torch.float32 else tensor.view(format.scale_dtype)
            return usable_block_scales(scales, lambda: self._codes_like(codes, scales.shape), format, name)
        if role == PRE_QUANT_SCALE:
            return usable_input_multiplier(tensor.float(), name)
        scalars = stored.dialect.decode_scalar(tensor.flatten())
        scalars = scalars.reshape(()) if scalars.numel() == 1 else scalars
        return usable_scalars(scalars, (lambda: self._plan.read(codes)) if role == GLOBAL_SCALE else None, name)

    def _codes_like(self, codes: str, scales: torch.Size) -> torch.Tensor:
        """Codes in blocks that lie as the scales do: where those are [E, K/block, N] (transposed), the codes are made [E, K/block, N, bytes]."""
        tensor = self._plan.read(codes).view(torch.uint8)
        if tensor.ndim == len(scales) and tensor.shape[-2:] != (scales[-2], tensor.shape[-1]):
            return tensor.unflatten(-2, (scales[-2], -1)).transpose(-1, -2)
        return tensor


def for_current_stream(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, which one of transformers' threads made on the default stream of its device, safe to use on the current one.

    Else its memory would go to the next tensor as soon as nobody holds it, while what reads it still waits on the current stream. An engine may have
    chosen another stream than the default one: vLLM does.
    """
    if tensor.is_cuda:
        current, default = torch.cuda.current_stream(tensor.device), torch.cuda.default_stream(tensor.device)
        if current != default:
            current.wait_stream(default)
            tensor.record_stream(current)
    return tensor


def _stack(recipe: Recipe, tensors: _Arriving) -> torch.Tensor:
    """One role of a matrix, or of those of all experts: gate rows before up rows."""
    role, parameter = recipe.role, recipe.parameter
    assert role is not None
    if not recipe.experts:
        return tensors.take(parameter.first, role)
    if not parameter.merges_experts:
        halves = [_as_canonical(recipe, tensors.take(stored, role)) for _, stored in sorted(parameter.places.items(), key=lambda item: item[0])]
        return halves[0] if len(halves) == 1 else torch.cat(halves, dim=1)
    out = None
    for (expert, part), stored in recipe.matrices:
        tensor = tensors.take(stored, role)
        rows = tensor.shape[0] if tensor.ndim else 1
        if out is None:
            out = tensor.new_empty(recipe.experts, recipe.parts * rows, *tensor.shape[1:])
        out[expert, part * rows : (part + 1) * rows] = tensor
    assert out is not None
    return out.squeeze(-1) if out.shape == (recipe.experts, 1) else out


def _as_canonical(recipe: Recipe, tensor: torch.Tensor) -> torch.Tensor:
    """What one tensor holds of all experts: [E, N, ...] with gate rows before up rows; scalars [E], or [E, 1 or 2] of gate and up."""
    if recipe.role in (GLOBAL_SCALE, INPUT_SCALE):
        scalars = tensor.expand(recipe.experts) if tensor.ndim == 0 else tensor
        held = recipe.parts // len(recipe.parameter.places)
        return scalars.reshape(recipe.experts, -1).expand(recipe.experts, held).contiguous() if recipe.parts > 1 else scalars.contiguous()
    if tensor.ndim == 4:
        tensor = tensor.flatten(2)
    if recipe.transposed:
        tensor = tensor.transpose(1, 2)
    if recipe.alternating:
        tensor = halves_from_alternating(tensor, dim=1)
    return tensor.contiguous()


def _input_scales(recipe: Recipe, tensors: _Arriving) -> torch.Tensor:
    """Calibrated input scales; experts that calibration gave no tokens have none, and get the largest of the layer. The plan has named them.

    Raises:
        CheckpointError: one is not a positive finite number.
    """
    parameter = recipe.parameter
    taken = {place: tensors.take(stored, INPUT_SCALE) for place, stored in parameter.places.items() if INPUT_SCALE in stored.tensors}
    if not recipe.experts:
        return taken[0, 0]
    if not parameter.merges_experts:
        halves = [_as_canonical(recipe, scale) for _, scale in sorted(taken.items(), key=lambda item: item[0])]
        return torch.cat(halves, dim=1) if len(halves) > 1 else halves[0]
    largest = torch.stack(list(taken.values())).max()
    out = largest.expand(recipe.experts, recipe.parts).clone()
    for (expert, part), scale in taken.items():
        if expert < recipe.experts:
            out[expert, part] = scale
    return out if recipe.parts > 1 else out.squeeze(-1)


def _dense(recipe: Recipe, tensors: _Arriving, target: str, model: Any, config: Any) -> torch.Tensor:
    """FP8 matrices that no module can hold: dequantised, then converted as transformers converts dense ones."""
    parameter, dtype = recipe.parameter, model.get_parameter(target).dtype
    sources: dict[str, list[torch.Tensor]] = {}
    for (_, part), stored in sorted(parameter.places.items(), key=lambda item: item[0]):
        weight, scales = tensors.take(stored, CODES), tensors.take(stored, BLOCK_SCALE)
        pattern = parameter.converter.source_patterns[part] if parameter.converter else target
        sources.setdefault(pattern, []).append(fp8.dequantize(weight, scales, dtype))
    if parameter.converter is None:
        return sources[target][0]
    converted: Any = sources
    for operation in parameter.converter.operations:
        converted = operation.convert(
            converted,
            source_patterns=parameter.converter.source_patterns,
            target_patterns=parameter.converter.target_patterns,
            full_layer_name=target,
            model=model,
            config=config,
            missing_keys=None,
        )
    (result,) = converted.values()
    return result


def halves_from_alternating(x: torch.Tensor, dim: int) -> torch.Tensor:
    """gate0, up0, gate1, up1, ... along `dim` to gate0, gate1, ..., up0, up1, ...

    >>> halves_from_alternating(torch.tensor([0, 10, 1, 11]), dim=0).tolist()
    [0, 1, 10, 11]
    """
    return x.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def alternating_from_halves(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of `halves_from_alternating`.

    >>> alternating_from_halves(torch.tensor([0, 1, 10, 11]), dim=0).tolist()
    [0, 10, 1, 11]
    """
    return x.unflatten(dim, (2, -1)).transpose(dim, dim + 1).flatten(dim, dim + 1)
