"""Which parameters of a transformers model a checkpoint holds quantised, and from which tensors of its files, found from the headers alone.

The names in the files decide, not the exclusion patterns of config.json: a packed tensor is renamed as transformers would rename the dense weight
it stands for, and the parameter of that name becomes packed. Where transformers has no such weight because its class stacks the experts, the name of
the matrix says its place. Whatever cannot be placed, or is missing, is an error before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from halfbyte.checkpoint.dialects import CODE_DTYPES, FP8_STACKED, belongs_to_quantized, scales_activations
from halfbyte.checkpoint.projections import PROJECTION_OF, STACKED, UP
from halfbyte.checkpoint.quantization import Quantization
from halfbyte.checkpoint.source import TensorInfo
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.integrations.transformers.stored import Stored, find_stored, missing_tensor

# Transformers renames experts alike whatever their number, so that one of a layer speaks for all: R1 has 178,176 names, and 696 such templates.
_EXPERT = re.compile("|".join(rf"(?<=\.experts\.{leaf})\d+(?=\.)" for leaf in ("", *(rf"{leaf}\." for leaf in PROJECTION_OF))))
# Stems of one expert's matrix, with the projection behind its number or before it (ModelOpt 0.43), and of all experts'.
_STEMS = (
    r"(?P<experts>.+)\.(?P<expert>\d+)\.(?P<leaf>\w+)",
    r"(?P<experts>.+)\.(?P<leaf>\w+)\.(?P<expert>\d+)",
    r"(?P<experts>.+)\.(?P<leaf>gate_up_proj|up_proj|down_proj)",
)
_MTP, _LAYER = re.compile(r"(^|\.)mtp\."), re.compile(r"(^|\.)layers\.(\d+)\.")
_QUANTISED_DTYPES = (*CODE_DTYPES, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class PackedParameter:
    """A matrix of the model, or that of all its experts, which comes quantised.

    Attributes:
        converter: what makes it of dense weights; None where one dense tensor is the parameter.
        places: the stored matrices by (expert, part), the part being 1 for the up half of gate_up_proj. Expert 0 where one holds all experts.
        merges_experts: each expert's matrix is stored alone.
    """

    converter: Any
    merges_experts: bool = False
    places: dict[tuple[int, int], Stored] = field(default_factory=dict)

    @property
    def holds_experts(self) -> bool:
        """Whether the converter, which packed matrices do without, does nothing to experts but stack them and join gate and up."""
        return self.converter is None or merges_experts(self.converter) or all(_joins_rows(operation) for operation in self.converter.operations)

    @property
    def first(self) -> Stored:
        return next(iter(self.places.values()))


class Names:
    """How transformers names the tensors of the files in `model`, which is dense and on the meta device."""

    def __init__(self, model: Any):
        self.dense = model.state_dict()
        self.prefix = model.base_model_prefix
        conversions = get_model_conversion_mapping(model)
        self.renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._converter_of = {pattern: entry for entry in self.converters for pattern in entry.source_patterns}
        self._ignored = re.compile("|".join(model._keys_to_ignore_on_load_unexpected or ("$^",)))
        self._places: dict[str, tuple[str, Any, int]] = {}
        self._renamed: dict[str, str] = {}
        fields = (getattr(model.config.get_text_config(), field, None) or 0 for field in ("num_hidden_layers", "num_nextn_predict_layers"))
        self._layers, self._further_layers = fields

    def place(self, name: str) -> tuple[str, Any, int]:
        """The parameter that the dense tensor `name` goes to, by which converter (None), and as which of its sources."""
        template, number = _template(name)
        if template not in self._places:
            target, pattern = rename_source_key(template, self.renamings, self.converters, self.prefix, self.dense)
            if target not in self.dense and template in self.dense:
                target, pattern = template, None
            converter = self._converter_of.get(pattern)
            self._places[template] = target, converter, converter.source_patterns.index(pattern) if converter else 0
        target, converter, part = self._places[template]
        return _numbered(target, number), converter, part

    def key(self, name: str) -> tuple[str, int, str]:
        """What two names of one tensor share: its parameter, the source of it, and the expert."""
        target, _, part = self.place(name)
        return target, part, _template(name)[1]

    def renamed(self, name: str) -> str:
        """`name` as the converters see it."""
        template, number = _template(name)
        if template not in self._renamed:
            renamed = template
            for renaming in self.renamings:
                renamed, _ = renaming.rename_source_key(renamed)
            self._renamed[template] = renamed
        return _numbered(self._renamed[template], number)

    def ignored(self, name: str, target: str) -> bool:
        """Whether transformers leaves the tensor out: layers that predict further tokens, and what a class says."""
        return bool(self._ignored.search(target)) or self._predicts_further_tokens(name)

    def _predicts_further_tokens(self, name: str) -> bool:
        if _MTP.search(name):
            return True
        match = _LAYER.search(name) if self._further_layers else None
        return match is not None and 0 <= int(match[2]) - self._layers < self._further_layers


def find_packed(model: Any, names: Names, tensors: Mapping[str, TensorInfo]) -> dict[str, PackedParameter]:
    """The quantised parameters of a dense (meta) `model` by name, for a checkpoint whose headers are `tensors`.

    Raises:
        CheckpointError: a scale is missing or of the wrong dtype; one matrix is stored twice.
        UnsupportedError: a packed tensor has no place in this model class, or a layer is quantised in another format.
    """
    packed: dict[str, PackedParameter] = {}
    for stem, stored in sorted(find_stored(tensors, lambda name: not names.ignored(name, names.place(name)[0])).items()):
        target, converter, part = names.place(stored.dense_name)
        merges = converter is not None and merges_experts(converter)
        if converter is not None and all(isinstance(operation, Transpose) for operation in converter.operations):
            converter = None  # shapes tell how packed matrices lie
        if target not in names.dense:
            target, part, merges = _place_by_name(model, names, stored)
            converter = None
        parameter = packed.setdefault(target, PackedParameter(converter, merges))
        place = (_expert_of(stem) if merges else 0, part)
        if place in parameter.places or parameter.merges_experts != merges:
            raise CheckpointError("a matrix is stored twice", where=stem, given=f"also {parameter.first.stem}", needed="one of them")
        parameter.places[place] = stored
    return packed


def check_complete(model: Any, names: Names, tensors: Mapping[str, TensorInfo], packed: Mapping[str, PackedParameter]) -> list[str]:
    """Refuse a checkpoint of which a quantised tensor would not be used, or which leaves parameters of the model without a value.

    The tensors that only scale activations, which engines with a quantised KV cache or quantised activations read, are no error: their names.

    Raises:
        CheckpointError: naming the first tensor or parameter.
    """
    used = {name for parameter in packed.values() for stored in parameter.places.values() for name in stored.tensors.values()}
    filled, of_activations = set(packed), []
    for name in sorted(tensors.keys() - used, key=dot_natural_key):
        target, converter, _ = names.place(name)
        targets = [target] if converter is None else [target.replace(converter.target_patterns[0], other) for other in converter.target_patterns]
        if target in packed:
            raise CheckpointError("the matrix is packed, and this tensor would be a part of it", where=name, given=tensors[name].dtype)
        if target in names.dense:
            if tensors[name].dtype in _QUANTISED_DTYPES and names.dense[target].is_floating_point():
                raise missing_tensor(name + FP8_STACKED.scales[0], f"{name} is {tensors[name].dtype}")
            filled.update(targets)
        elif names.ignored(name, target):
            continue
        elif scales_activations(name):
            of_activations.append(name)
        elif belongs_to_quantized(name) or tensors[name].dtype in _QUANTISED_DTYPES:
            raise CheckpointError(
                f"{type(model).__name__} has no place for this tensor of a quantised layer",
                where=name,
                given=f"{tensors[name].dtype} {tensors[name].shape}",
                next_step="run `halfbyte inspect` on the checkpoint; its config.json may belong to another model",
            )
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    filled.update(target for target, source in tied.items() if source in filled)
    filled.update(source for target, source in tied.items() if target in filled)
    may_miss = re.compile("|".join(getattr(model, "_keys_to_ignore_on_load_missing", None) or ("$^",)))
    missing = sorted((name for name in names.dense.keys() - filled if not may_miss.search(name)), key=dot_natural_key)
    if missing:
        raise CheckpointError(
            "the files have no tensor for this parameter, which would keep random values",
            where=missing[0],
            given=f"{len(missing)} such parameters",
            next_step="download the missing files, or correct config.json",
        )
    return of_activations


def check_described(quantization: Quantization, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse files that hold a module dense which the configuration names, by its whole name, as quantised.

    Patterns that mean many modules are no promise: published exclusion lists leave modules out.

    Raises:
        CheckpointError: naming the first such weight.
    """
    for rule in quantization.rules:
        info = tensors.get(f"{rule.pattern}.weight") if rule.algorithm else None
        if info is not None and info.dtype.is_floating_point and info.dtype not in _QUANTISED_DTYPES:
            raise CheckpointError(
                "the configuration says that this weight is quantised",
                where=f"{rule.pattern}.weight",
                given=info.dtype,
                needed=rule.algorithm,
                next_step=f"quantise the model again, or correct {quantization.where}",
            )


def merges_experts(converter: Any) -> bool:
    """True for what stacks experts and, perhaps, puts gate rows before up rows."""
    merge, *rest = converter.operations
    concatenates = not rest or (len(rest) == 1 and _joins_rows(rest[0]))
    return type(merge) is MergeModulelist and merge.dim == 0 and concatenates


def _joins_rows(operation: Any) -> bool:
    return type(operation) is Concatenate and operation.dim == 1


def _template(name: str) -> tuple[str, str]:
    """`name` for expert 0, and the number that stood there; "" where there was none.

    >>> _template("layers.3.mlp.experts.17.up_proj.weight")
    ('layers.3.mlp.experts.0.up_proj.weight', '17')
    """
    match = _EXPERT.search(name)
    return (name, "") if match is None else (f"{name[: match.start()]}0{name[match.end() :]}", match[0])


def _numbered(template: str, number: str) -> str:
    return _EXPERT.sub(number, template, count=1) if number else template


def _place_by_name(model: Any, names: Names, stored: Stored) -> tuple[str, int, bool]:
    """The stacked parameter of a matrix that transformers does not find by its name, the part of it, and whether it is one expert's.

    The class may know only stacked experts, and may keep them one module further up (`moe.experts` as `experts`, in Gemma 4).
    """
    match = next(filter(None, (re.fullmatch(pattern, stored.stem) for pattern in _STEMS)), None)
    if match:
        prefix, leaf, is_one = match["experts"], match["leaf"], "expert" in match.groupdict()
        projection = PROJECTION_OF.get(leaf)
        leaves = dict.fromkeys((STACKED[projection], leaf)) if projection and is_one else (leaf,)
        for experts in (prefix, re.sub(r"\.(moe|mlp)\.(\w+)$", r".\2", prefix), re.sub(r"\.moe$", ".experts", prefix)):
            for stacked in leaves:
                target, _, _ = names.place(f"{experts}.{stacked}")
                if target in names.dense and names.dense[target].ndim == 3:
                    return target, int(projection == UP and stacked == STACKED[UP]), is_one
    raise UnsupportedError(
        f"{type(model).__name__} has no place for this packed tensor",
        where=stored.stem,
        needed="a model whose experts transformers keeps as gate_up_proj and down_proj (decorated with use_experts_implementation)",
    )


def _expert_of(stem: str) -> int:
    """The number of the expert: the last segment of the name that is one."""
    return int(next(segment for segment in reversed(stem.split(".")) if segment.isdigit()))
