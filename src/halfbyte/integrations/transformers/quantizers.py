"""The quantizers through which `from_pretrained` loads FP4 checkpoints, and the conversions from file names to packed parameters."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte.checkpoint.dialects import OUTPUTS
from halfbyte.checkpoint.json_files import read_json
from halfbyte.checkpoint.quantization import describe_quantization
from halfbyte.checkpoint.source import TensorInfo, check_one_home, read_header
from halfbyte.errors import UnsupportedError
from halfbyte.integrations.transformers.conversion import LoadPlan, PackedWeights, Recipe
from halfbyte.integrations.transformers.modules import (
    FP8Linear,
    QuantLinear,
    first_projection,
    hold_fp8_weight,
    is_dispatched,
    pack_experts,
    packed_parameters,
)
from halfbyte.integrations.transformers.plan import Names, PackedParameter, check_complete, check_described, find_packed
from halfbyte.integrations.transformers.stored import BLOCK_SCALE, CODES, INPUT_SCALE, Stored
from halfbyte.integrations.transformers.undecorated import adapt

IMPLEMENTATION = "halfbyte"
_MOST_LISTED = 8
logger = logging.getLogger(__name__)
_COMPRESSED = {dialect.name for dialect in OUTPUTS["compressed-tensors"]}


class FP4Config(QuantizationConfigMixin):
    """The quantization_config of a checkpoint, kept as it is in config.json."""

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def is_compressed_fp4(config: Mapping[str, Any]) -> bool:
    """Whether a compressed-tensors config stores some modules in FP4; what has none stays with transformers."""
    groups = config.get("config_groups")
    formats = [group.get("format") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    return any((format or config.get("format")) in _COMPRESSED for format in formats or [None])


def is_quark_fp4(config: Mapping[str, Any]) -> bool:
    """Whether a Quark config stores weights in FP4; what does not stays with transformers."""
    weights = (config.get("global_quant_config") or {}).get("weight") or {}
    return isinstance(weights, dict) and weights.get("dtype") == "fp4"


def is_fp8_beside_fp4(config: Mapping[str, Any]) -> bool:
    """Whether an FP8 config stores the experts in FP4, as DeepSeek-V4's do; what does not stays with transformers."""
    return config.get("expert_dtype") == "fp4" or "NVFP4" in str(config.get("moe_quant_algo", "")).upper()


class FP4Quantizer(HfQuantizer):
    """Loads FP4 experts, FP4 and FP8 linear layers as they are; such a model is saved (`saving`), not trained."""

    requires_calibration = True  # transformers' word for "the checkpoint must already be quantised"
    is_trainable = False

    def __init__(self, config: Any, **kwargs: Any):
        super().__init__(config, **kwargs)
        fields = config.to_dict()
        nested = fields if "quantization" in fields else None  # hf_quant_config.json's form
        self.description = describe_quantization({"quantization_config": fields}, nested)
        self.hf_quant_config = {key: value for key, value in nested.items() if key != "quant_method"} if nested else None

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False  # by what transformers has for it; see `saving`

    def _convert_model_for_quantization(self, model: Any) -> None:
        """Keep the model's own modules: transformers would turn Llama 4 experts into one linear layer an expert."""

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        if not checkpoint_files or not all(file.endswith(".safetensors") for file in checkpoint_files):
            raise UnsupportedError("FP4 checkpoints are read from safetensors files only", given=checkpoint_files)
        beside = Path(checkpoint_files[0]).with_name("hf_quant_config.json")
        if beside.exists():
            self.hf_quant_config = read_json(beside)
            described = {"quantization_config": self.quantization_config.to_dict()}
            describe_quantization(described, self.hf_quant_config, where=str(beside.parent))  # raises where the two files contradict each other
        plan = model._get_dtype_plan(model.dtype)
        self.dtypes = {name: _planned(plan, name, tensor.dtype) for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        headers = {Path(file): read_header(Path(file)) for file in checkpoint_files}
        check_one_home({file.name: header for file, header in headers.items()}, str(Path(checkpoint_files[0]).parent))
        files = {name: file for file, header in headers.items() for name in header}
        tensors = {name: info for header in headers.values() for name, info in header.items()}
        check_described(self.description, tensors)
        names = Names(model)
        packed = find_packed(model, names, tensors)
        recipes = _replace_modules(model, packed, tensors)
        of_activations = check_complete(model, names, tensors, packed)
        _warn_of_missing_input_scales(recipes)
        targets = {
            names.renamed(stored.tensors[role]): target
            for target, recipe in recipes.items()
            for stored in recipe.parameter.places.values()
            for role in ((CODES, BLOCK_SCALE) if recipe.role is None else (recipe.role,))
            if role in stored.tensors
        }
        others = tuple(name for name in names.dense if name not in packed)
        self.plan = LoadPlan(targets, recipes, files, tensors, names, others)
        self.plan.kept.update({name: self.plan.read(name) for name in of_activations})

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Put ours first: at most one converter takes a tensor."""
        return [PackedWeights(self.plan), *weight_conversions]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Packed tensors arrive as they are; transformers would cast scales to the dtype of the parameter."""
        return None if isinstance(converter, PackedWeights) else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # transformers 5.17 leaves tensors that it renamed in the dtype of the file when the checkpoint is quantised; 5.23 does not.
        packed = {name for _, name, _ in packed_parameters(model)}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name not in packed and tensor.dtype != self.dtypes.get(name, tensor.dtype):
                tensor.data = tensor.to(self.dtypes[name])
        # What is left in the files' own form is what `save_pretrained` has to revert; ours, `saving` does.
        model._weight_conversions = [entry for entry in model._weight_conversions if not isinstance(entry, PackedWeights)]
        return model.requires_grad_(False)


def _replace_modules(model: Any, packed: Mapping[str, PackedParameter], tensors: Mapping[str, TensorInfo]) -> dict[str, Recipe]:
    """Put packed modules in the place of dense ones; how each of their tensors is made, by name."""
    recipes: dict[str, Recipe] = {}
    experts: dict[str, dict[str, PackedParameter]] = defaultdict(dict)
    for parameter_name, parameter in packed.items():
        module_name, _, name = parameter_name.rpartition(".")
        module = model.get_submodule(module_name)
        is_weight = isinstance(module, nn.Linear) and name == "weight" and parameter.converter is None
        is_fp8 = all(stored.is_fp8 for stored in parameter.places.values())
        if not is_fp8:
            adapt(module)
        if is_weight and type(module).forward is not nn.Linear.forward:  # it uses its weight in a way of its own
            if not is_fp8:
                raise _no_place(module, parameter_name, parameter, "nn.Linear itself")
            recipes |= {f"{module_name}.{tensor}": recipe for tensor, recipe in hold_fp8_weight(module, parameter, tensors).items()}
        elif is_weight:
            linear = (FP8Linear if is_fp8 else QuantLinear)(module, parameter, tensors)
            model.set_submodule(module_name, linear)
            recipes |= {f"{module_name}.{tensor}": recipe for tensor, recipe in linear.recipes.items()}
        elif is_fp8:
            recipes[parameter_name] = Recipe(parameter, None)
        elif is_dispatched(module) and name in (first_projection(module), "down_proj") and parameter.holds_experts:
            experts[module_name][name] = parameter
        else:
            raise _no_place(module, parameter_name, parameter, "experts decorated with use_experts_implementation, or nn.Linear")
    for module_name, projections in experts.items():
        made = pack_experts(model.get_submodule(module_name), projections, tensors, module_name)
        recipes |= {f"{module_name}.{tensor}": recipe for tensor, recipe in made.items()}
    if any(hasattr(model.get_submodule(name), "config") for name in experts):  # decorated
        model.set_experts_implementation(IMPLEMENTATION)
    return recipes


def _no_place(module: nn.Module, name: str, parameter: PackedParameter, needed: str) -> UnsupportedError:
    return UnsupportedError(f"{type(module).__name__} has no place for packed weights", where=parameter.first.stem, given=name, needed=needed)


def _warn_of_missing_input_scales(recipes: Mapping[str, Recipe]) -> None:
    """Name the matrices without an input scale where others of the layer, or of the linear layers of the model, have one."""
    groups: dict[str, list[Stored]] = defaultdict(list)
    for target, recipe in recipes.items():
        if recipe.role == CODES:
            group = target.rpartition(".")[0] if recipe.experts else "linear layers"
            groups[group] += [stored for _, stored in recipe.matrices if stored.dialect.input_scale]
    for group, matrices in groups.items():
        missing = [stored.stem + stored.dialect.input_scale for stored in matrices if INPUT_SCALE not in stored.tensors]
        if 0 < len(missing) < len(matrices):
            logger.warning(
                "%s: no input scale for %s: bf16 activations do not use it; of experts, quantised ones take the largest of the layer",
                group,
                ", ".join(missing[:_MOST_LISTED]) + (f" and {len(missing) - _MOST_LISTED} more" if len(missing) > _MOST_LISTED else ""),
            )


def _planned(plan: dict[str, torch.dtype], name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype transformers means `name` to have: some modules stay in fp32 whatever was asked for."""
    return next((kept for pattern, kept in plan.items() if re.search(pattern.replace("*", ".*"), name)), dtype)
