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

from halfbyte.checkpoint.source import TensorInfo
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats import MXFP4, NVFP4, BlockFormat

_CODE_DTYPES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
_BYTE_SCALES = (torch.uint8, torch.float8_e8m0fnu)
# Tensors that only a quantised layer has. Beside a weight that is not packed they mean another format (FP8, INT4), which must not load as plain.
_SCALE_SUFFIXES = (".weight_scale", ".weight_scale_2", ".weight_scale_inv", ".weight_global_scale", ".weight_zero_point")


@dataclass(frozen=True)
class Scheme:
    """How a family of checkpoints names what belongs to one packed matrix: suffixes behind a common stem.

    `dense` is the suffix of the dense weight that the codes stand for; `encode`: the file holds encode multipliers (1 / decode).
    """

    name: str
    format: BlockFormat
    codes: str
    block_scale: str
    global_scale: str | None = None
    input_scale: str | None = None
    dense: str = ".weight"
    encode: bool = False


MODELOPT = Scheme("modelopt", NVFP4, ".weight", ".weight_scale", ".weight_scale_2", ".input_scale")
NVFP4_PACK = Scheme("nvfp4-pack-quantized", NVFP4, ".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale", encode=True)
MXFP4_PACK = Scheme("mxfp4-pack-quantized", MXFP4, ".weight_packed", ".weight_scale")
GPT_OSS = Scheme("mxfp4", MXFP4, "_blocks", "_scales", dense="")


@dataclass
class PackedParameter:
    """A parameter of the model that comes packed: the stems of its tensors, the converter that merges them (None: one tensor), and their kinds."""

    converter: Any
    stems: list[str] = field(default_factory=list)
    scale_dtype: torch.dtype = torch.uint8
    has_input_scale: bool = False


def find_packed(model: Any, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> dict[str, PackedParameter]:
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
        stem = name.removesuffix(scheme.codes)
        if stem == name or tensors[name].dtype not in _CODE_DTYPES:
            continue
        stems.add(stem)
        target, pattern = rename_source_key(stem + scheme.dense, renamings, converters, model.base_model_prefix, dense)
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
        stem = name.removesuffix(next(filter(name.endswith, (*_SCALE_SUFFIXES, scheme.block_scale)), ""))
        if stem != name and stem not in stems and not ignored.search(name):
            raise UnsupportedError(
                "this layer is quantised in another format", where=name, given=_dtype(tensors, stem + scheme.codes), needed=f"{scheme.name} or dense"
            )
    for parameter in packed.values():
        _check_companions(parameter, tensors, scheme)
    return packed


def _check_companions(parameter: PackedParameter, tensors: Mapping[str, TensorInfo], scheme: Scheme) -> None:
    scale_dtypes = (torch.float8_e4m3fn,) if scheme.format is NVFP4 else _BYTE_SCALES
    for stem in parameter.stems:
        _check_dtype(tensors, stem + scheme.block_scale, scale_dtypes)
        if scheme.global_scale is not None:
            _check_dtype(tensors, stem + scheme.global_scale, (torch.float32,))
    parameter.scale_dtype = tensors[parameter.stems[0] + scheme.block_scale].dtype
    if scheme.input_scale is not None:
        names = [stem + scheme.input_scale for stem in parameter.stems]
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
