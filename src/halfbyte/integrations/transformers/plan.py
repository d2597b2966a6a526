"""Which parameters of a transformers model a checkpoint holds in FP4, found from the headers of its files.

The names in the files decide, not the exclusion patterns of config.json: a packed tensor is renamed as transformers would rename the dense weight
it stands for, and the parameter of that name becomes packed. Whatever cannot be placed, or lacks a companion, is an error before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from halfbyte.checkpoint.dialects import CODE_DTYPES, QUANTIZED_ONLY, Dialect
from halfbyte.checkpoint.source import TensorInfo
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats import NVFP4

# What the packed parameters of `modules` can hold as they come from the file.
_BYTE_SCALES = (torch.uint8, torch.float8_e8m0fnu)


@dataclass
class PackedParameter:
    """A parameter of the model that comes packed: the stems of its tensors, the converter that merges them (None: one tensor), and their kinds."""

    converter: Any
    stems: list[str] = field(default_factory=list)
    scale_dtype: torch.dtype = torch.uint8
    has_input_scale: bool = False


def find_packed(model: Any, tensors: Mapping[str, TensorInfo], dialect: Dialect) -> dict[str, PackedParameter]:
    """Return the packed parameters of a dense (meta) `model` by name, for a checkpoint whose headers are `tensors`.

    Raises:
        CheckpointError: a scale is missing or of the wrong dtype, or only some experts have input scales.
        UnsupportedError: a packed tensor has no place in this model class, or a layer is quantised in another format.
    """
    dense = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    ignored = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ("$^",)))
    packed: dict[str, PackedParameter] = {}
    stems = set()
    for name in sorted(tensors, key=dot_natural_key):
        stem = name.removesuffix(dialect.codes)
        if stem == name or tensors[name].dtype not in CODE_DTYPES:
            continue
        stems.add(stem)
        target, pattern = rename_source_key(stem + dialect.dense, renamings, converters, model.base_model_prefix, dense)
        if ignored.search(target):
            continue
        if target not in dense:
            raise UnsupportedError(
                f"{type(model).__name__} has no place for this packed tensor",
                where=name,
                needed="a model whose experts transformers merges into gate_up_proj and down_proj (decorated with use_experts_implementation)",
            )
        converter = next((entry for entry in converters if pattern in entry.source_patterns), None)
        packed.setdefault(target, PackedParameter(converter)).stems.append(stem)
    for name in tensors:
        stem = name.removesuffix(next(filter(name.endswith, (*QUANTIZED_ONLY, dialect.scales[0])), ""))
        if stem != name and stem not in stems and not ignored.search(name):
            raise UnsupportedError(
                "this layer is quantised in another format",
                where=name,
                given=_dtype(tensors, stem + dialect.codes),
                needed=f"{dialect.name} or dense",
            )
    for parameter in packed.values():
        _check_companions(parameter, tensors, dialect)
    return packed


def _check_companions(parameter: PackedParameter, tensors: Mapping[str, TensorInfo], dialect: Dialect) -> None:
    scale_dtypes = (torch.float8_e4m3fn,) if dialect.format is NVFP4 else _BYTE_SCALES
    for stem in parameter.stems:
        _check_dtype(tensors, stem + dialect.scales[0], scale_dtypes)
        if dialect.global_scale:
            _check_dtype(tensors, stem + dialect.global_scale, (torch.float32,))
    parameter.scale_dtype = tensors[parameter.stems[0] + dialect.scales[0]].dtype
    if dialect.input_scale:
        names = [stem + dialect.input_scale for stem in parameter.stems]
        parameter.has_input_scale = any(name in tensors for name in names)
        if parameter.has_input_scale:
            for name in names:
                _check_dtype(tensors, name, (torch.float32,))


def _check_dtype(tensors: Mapping[str, TensorInfo], name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if name not in tensors or tensors[name].dtype not in dtypes:
        raise CheckpointError(
            "a quantised layer lacks this tensor" if name not in tensors else "a scale has the wrong dtype",
            where=name,
            given=_dtype(tensors, name),
            needed=" or ".join(map(str, dtypes)),
            next_step="run `halfbyte inspect` on the checkpoint, or quantise it again",
        )


def _dtype(tensors: Mapping[str, TensorInfo], name: str) -> str:
    return str(tensors[name].dtype) if name in tensors else "nothing"
