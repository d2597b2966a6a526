"""The quantizers through which `from_pretrained` loads FP4 checkpoints, and the conversions from file names to packed parameters."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter, WeightRenaming
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte.checkpoint.dialects import GPT_OSS, OUTPUTS, Dialect
from halfbyte.checkpoint.projections import STACKED
from halfbyte.checkpoint.quantization import describe_quantization
from halfbyte.checkpoint.source import read_header
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.integrations.transformers.modules import (
    BLOCK_SCALE,
    CODES,
    GLOBAL_SCALE,
    INPUT_SCALE,
    QuantLinear,
    first_projection,
    halves_from_alternating,
    pack_experts,
    packed_parameters,
)
from halfbyte.integrations.transformers.plan import PackedParameter, find_packed

IMPLEMENTATION = "halfbyte"
_COMPRESSED = {dialect.name: dialect for dialect in OUTPUTS["compressed-tensors"]}


class FP4Config(QuantizationConfigMixin):
    """The quantization_config of a checkpoint, kept as it is in config.json."""

    def __init__(self, **fields: Any):
        self.__dict__.update(fields)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def compressed_dialect(config: dict[str, Any]) -> Dialect | None:
    """The FP4 dialect of a compressed-tensors config, or None when it is another format (or a mixture), which stays with transformers."""
    groups = config.get("config_groups")
    group_formats = [group.get("format") for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    formats = {format or config.get("format") for format in group_formats or [None]}
    return _COMPRESSED.get(formats.pop() or "") if len(formats) == 1 else None


class FP4Quantizer(HfQuantizer):
    """Loads FP4 experts and linear layers as they are; nothing is made dense. Loading only: such a model is neither trained nor saved."""

    requires_calibration = True  # transformers' word for "the checkpoint must already be quantised"
    is_trainable = False

    def __init__(self, config: Any, dialect: Dialect, **kwargs: Any):
        super().__init__(config, **kwargs)
        fields = config.to_dict()
        description = describe_quantization(
            {"quantization_config": fields}, fields if "quantization" in fields else None, where="quantization_config"
        )
        if description.format is None or description.format is not dialect.format:
            raise UnsupportedError("unexpected FP4 format", where="quantization_config", given=description.format, needed=dialect.format)
        self.dialect, self.format = dialect, description.format

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def _convert_model_for_quantization(self, model: Any) -> None:
        """Keep the model's own modules: transformers would turn Llama 4 experts into one linear layer an expert."""

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        if not checkpoint_files or not all(file.endswith(".safetensors") for file in checkpoint_files):
            raise UnsupportedError("FP4 checkpoints are read from safetensors files only", given=checkpoint_files)
        plan = model._get_dtype_plan(model.dtype)
        self.dtypes = {name: _planned(plan, name, tensor.dtype) for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        tensors = {name: info for file in checkpoint_files for name, info in read_header(Path(file)).items()}
        experts: dict[str, dict[str, PackedParameter]] = defaultdict(dict)
        for parameter_name, parameter in find_packed(model, tensors, self.dialect).items():
            module_name, _, name = parameter_name.rpartition(".")
            module = model.get_submodule(module_name)
            if hasattr(module, "_apply_gate") and name in (first_projection(module), "down_proj") and _merges_experts(parameter.converter):
                experts[module_name][name] = parameter
            elif isinstance(module, nn.Linear) and name == "weight" and parameter.converter is None:
                model.set_submodule(module_name, QuantLinear(module, self.format, parameter))
            else:
                raise UnsupportedError(
                    f"{type(module).__name__} cannot hold packed weights",
                    where=parameter_name,
                    needed="experts decorated with use_experts_implementation, or nn.Linear",
                )
        for module_name, packed in experts.items():
            pack_experts(model.get_submodule(module_name), self.format, packed, module_name)
        if experts:
            model.set_experts_implementation(IMPLEMENTATION)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Put ours first: transformers 5.17 matches a pattern anywhere, so that its `weight` would also take `weight_scale`."""
        dialect = self.dialect
        ours: list[Any] = []
        if dialect is GPT_OSS:
            for name in dict.fromkeys(STACKED.values()):
                for suffix, target in ((dialect.codes, CODES), (dialect.scales[0], BLOCK_SCALE)):
                    ours.append(WeightConverter(rf"\.{name}{suffix}$", f".{name}{target}", [JoinBlocks()]))
            return ours + weight_conversions
        if dialect.codes != dialect.dense:
            ours.append(WeightRenaming(re.escape(dialect.codes) + "$", dialect.dense))
        for converter in weight_conversions:
            if not (isinstance(converter, WeightConverter) and _merges_experts(converter)):
                continue
            for suffix, target, operations in (
                (dialect.scales[0], BLOCK_SCALE, converter.operations),
                (dialect.global_scale, GLOBAL_SCALE, [DecodeScales(dialect)]),
                (dialect.input_scale, INPUT_SCALE, [DecodeScales(dialect)]),
            ):
                if suffix:
                    stems = [pattern.removesuffix("$").removesuffix(dialect.dense) for pattern in converter.source_patterns]
                    added = WeightConverter(
                        [stem + re.escape(suffix) + "$" for stem in stems], [converter.target_patterns[0] + target], list(operations)
                    )
                    added.scope_prefix, added.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
                    ours.append(added)
        for suffix, target in ((dialect.global_scale, f"weight{GLOBAL_SCALE}"), (dialect.input_scale, INPUT_SCALE.lstrip("_"))):
            if suffix:
                ours.append(WeightConverter(re.escape(suffix) + "$", f".{target}", [DecodeScales(dialect)]))
        return ours + weight_conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for _, name, tensor in packed_parameters(model):
            if tensor.is_meta:  # offloaded to disk
                continue
            if not getattr(tensor, "_is_hf_initialized", False):
                raise CheckpointError(
                    "transformers found no tensor for this parameter", where=name, next_step="run `halfbyte inspect` on the checkpoint"
                )
            if tensor.dtype == torch.float32 and not (tensor.isfinite().all() and (tensor > 0).all()):
                raise CheckpointError("a scale is not a positive finite number", where=name, given=tensor.tolist())
        # transformers 5.17 leaves tensors that it renamed in the dtype of the file when the checkpoint is quantised; 5.23 does not.
        packed = {name for _, name, _ in packed_parameters(model)}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name not in packed and tensor.dtype != self.dtypes.get(name, tensor.dtype):
                tensor.data = tensor.to(self.dtypes[name])
        return model.requires_grad_(False)


class DecodeScales(MergeModulelist):
    """Scalars of every expert to fp32 decode multipliers: [] for one, [E], or [E, 2] for gate and up.

    Subclasses MergeModulelist because that is how transformers knows that the tensors of a list are experts.
    """

    def __init__(self, dialect: Dialect):
        super().__init__()
        self.dialect = dialect

    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any) -> dict[str, torch.Tensor]:
        columns = [torch.stack([scale.reshape(()) for scale in input_dict[pattern]]) for pattern in source_patterns]
        scales = torch.stack(columns, dim=-1) if len(columns) > 1 else columns[0]
        if isinstance(kwargs["model"].get_submodule(kwargs["full_layer_name"].rpartition(".")[0]), QuantLinear):
            scales = scales.reshape(())
        return {target_patterns[0]: self.dialect.decode_scalar(scales)}


class JoinBlocks(ConversionOps):
    """gpt-oss codes [E, N, K/32, 16] to [E, N, K/2] (scales [E, N, K/32] stay), alternating gate and up rows to gate rows then up rows."""

    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any) -> dict[str, torch.Tensor]:
        (tensors,) = input_dict.values()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        module = kwargs["model"].get_submodule(kwargs["full_layer_name"].rpartition(".")[0])
        if tensor.ndim == 4:
            tensor = tensor.flatten(2)
        if target_patterns[0].startswith(".gate_up_proj") and not module.is_concatenated:
            tensor = halves_from_alternating(tensor, dim=1)
        return {target_patterns[0]: tensor}


def _planned(plan: dict[str, torch.dtype], name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype transformers means `name` to have: some modules stay in fp32 whatever was asked for."""
    return next((kept for pattern, kept in plan.items() if re.search(pattern.replace("*", ".*"), name)), dtype)


def _merges_experts(converter: Any) -> bool:
    """True for what stacks experts and, perhaps, puts gate rows before up rows; None (nothing to convert) counts too."""
    if converter is None:
        return True
    merge, *rest = converter.operations
    concatenates = not rest or (len(rest) == 1 and type(rest[0]) is Concatenate and rest[0].dim == 1)
    return type(merge) is MergeModulelist and merge.dim == 0 and concatenates
