"""How a checkpoint says it is quantised: config.json and hf_quant_config.json to one `Quantization`.

| kind | said by |
|---|---|
| modelopt | hf_quant_config.json, quant_method "modelopt", a quant_algo or moe_quant_algo |
| compressed-tensors | quant_method "compressed-tensors" |
| gpt-oss | quant_method "mxfp4" |
| deepseek-v4 | expert_dtype "fp4", and none of the above |
| quark | quant_method "quark" |
| fp8-block | quant_method "fp8" |
| dense | nothing |

hf_quant_config.json goes first, as in TensorRT-LLM; vLLM and SGLang take config.json where it says something. So both must name ModelOpt. Only
"fp8" may stand in config.json beside it: it is left from the source, and the files have what ModelOpt wrote.

What each calls its tensors: `checkpoint.dialects`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from halfbyte.checkpoint.dialects import DEEPSEEK_V4, DENSE, GPT_OSS, MODELOPT, OUTPUTS, QUARK, Dialect
from halfbyte.checkpoint.document import Document
from halfbyte.checkpoint.patterns import FirstMatch
from halfbyte.checkpoint.projections import FUSED
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats import FORMATS, MXFP4, NVFP4, BlockFormat

Kind = Literal["modelopt", "compressed-tensors", "gpt-oss", "deepseek-v4", "quark", "fp8-block", "dense"]

# How each algorithm stores a module. W4A16 says that activations are never quantised, which shows as absent input scales.
_MODELOPT = dict.fromkeys(("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4"), MODELOPT)
_COMPRESSED_TENSORS = {dialect.name: dialect for dialect in OUTPUTS["compressed-tensors"]}
_QUARK = "fp4 per_group"
_METHODS = ("modelopt", "compressed-tensors", "mxfp4", "quark", "fp8")
_BESIDE_MODELOPT = ("", "modelopt", "modelopt_fp4", "fp8")  # methods that config.json may name where there is a hf_quant_config.json


@dataclass(frozen=True)
class Rule:
    """Modules that match `pattern` are stored by `algorithm`, the checkpoint's own word for it; None: left alone."""

    pattern: str
    algorithm: str | None


@dataclass(frozen=True)
class Quantization:
    """What a checkpoint says of its own quantisation.

    Attributes:
        kind: who says so.
        dialects: how modules are stored, by the checkpoint's own word for it.
        rules: first match wins; no match means not quantised.
        where: file the description came from.
    """

    kind: Kind
    dialects: Mapping[str, Dialect]
    rules: tuple[Rule, ...] = ()
    where: str = "config.json"

    @property
    def format(self) -> BlockFormat | None:
        """The block format of the quantised modules; None when there is none, or more than one."""
        formats = {self.dialects[rule.algorithm].format for rule in self.rules if rule.algorithm and rule.algorithm in self.dialects}
        return formats.pop() if len(formats) == 1 else None

    def algorithm_of(self, module: str) -> str | None:
        """The checkpoint's name for how `module` is stored, None when it is not quantised.

        An engine's fused module (`qkv_proj`) is stored as its parts are.

        Raises:
            CheckpointError: the parts of a fused module differ.
        """
        parent, _, leaf = module.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in FUSED.get(leaf, ())]
        own = self._first_match(module)
        if not parts or (own is not None and own.pattern != "*"):
            return own.algorithm if own else None
        algorithms = {rule.algorithm if rule else None for rule in map(self._first_match, parts)}
        if len(algorithms) != 1:
            raise CheckpointError(f"the parts of {module} are not stored alike", where=self.where, given=sorted(map(str, algorithms)), needed="one")
        return algorithms.pop()

    def excluded(self, module: str) -> bool:
        """Whether `module` is left unquantised.

        >>> q = describe_quantization({}, {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "model.layers.0.*"]}})
        >>> q.excluded("language_model.lm_head"), q.excluded("model.layers.10.mlp.gate_proj")
        (True, False)
        """
        return self.algorithm_of(module) is None

    def dialect_of(self, module: str) -> Dialect:
        """How `module` is stored; `DENSE` when it is not quantised, fp8-block included.

        Raises:
            UnsupportedError: it is stored in a format halfbyte does not read.
        """
        algorithm = self.algorithm_of(module)
        if algorithm is None:
            return DENSE
        if algorithm not in self.dialects:
            raise UnsupportedError(
                f"{module} is quantised in a way halfbyte does not read", where=self.where, given=algorithm, needed=", ".join(self.dialects)
            )
        return self.dialects[algorithm]

    def _first_match(self, module: str) -> Rule | None:
        index = self._patterns.find(module)
        return None if index is None else self.rules[index]

    @cached_property
    def _patterns(self) -> FirstMatch:
        return FirstMatch((rule.pattern for rule in self.rules), self.where)


def describe_quantization(config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None = None, *, where: str = "") -> Quantization:
    """Read the quantisation of a model from its config.json and, where there is one, ModelOpt's hf_quant_config.json.

    Errors name the file in the directory `where`.

    Raises:
        UnsupportedError: a quant_method, algorithm or format that halfbyte does not read, with those it does.
        CheckpointError: a block size that is not the format's, a value of another type, a pattern that cannot be matched, two methods.
    """
    directory, where = where, str(Path(where, "config.json"))
    outer = Document(config, where)
    inner = outer.section("quantization_config")
    if not inner.values:
        inner = outer.section("text_config").section("quantization_config")
    method = inner.get("quant_method", "")
    if hf_quant_config is not None:
        if method not in _BESIDE_MODELOPT:
            raise CheckpointError(
                "config.json and hf_quant_config.json name two methods of quantisation",
                where=directory,
                given=f"quant_method {method!r} and ModelOpt",
                needed="one",
                next_step="remove what does not belong to these weights: hf_quant_config.json, or quantization_config from config.json",
            )
        document = Document(hf_quant_config, str(Path(directory, "hf_quant_config.json")))
        return _modelopt(document.section("quantization") if "quantization" in hf_quant_config else document)
    # DeepSeek-V4 in NVFP4 goes on saying expert_dtype fp4 of its experts, and fp8 of its method: who names an algorithm goes first.
    if method in ("modelopt", "modelopt_fp4") or "quant_algo" in inner or "moe_quant_algo" in inner:
        return _modelopt(inner)
    if method == "compressed-tensors":
        return _compressed_tensors(inner)
    if "fp4" in (outer.get("expert_dtype", ""), inner.get("expert_dtype", "")):
        return _made("deepseek-v4", {"fp4": DEEPSEEK_V4}, [Rule("*.experts.*", "fp4")], where)
    if not method and not inner.values:
        return _made("dense", {}, [], where)
    if method == "mxfp4":
        kept = [Rule(pattern, None) for pattern in inner.words("modules_to_not_convert")]
        return _made("gpt-oss", {"mxfp4": GPT_OSS}, [*kept, Rule("*.experts*", "mxfp4")], where)
    if method == "quark":
        return _quark(inner)
    if method == "fp8":
        block = inner.integers("weight_block_size")
        if block != (128, 128):
            raise UnsupportedError(
                "only block-scaled fp8 is read", where=where, given=f"weight_block_size {list(block) or None}", needed="[128, 128]"
            )
        return _made("fp8-block", {}, [], where)
    raise UnsupportedError("unknown quantisation", where=where, given=f"quant_method {method or None!r}", needed=", ".join(_METHODS))


def _made(kind: Kind, dialects: Mapping[str, Dialect], rules: Sequence[Rule], where: str) -> Quantization:
    """The description, whose patterns have all been understood."""
    quantization = Quantization(kind, dialects, tuple(rules), where)
    quantization.excluded("")
    return quantization


def _modelopt(quantization: Document) -> Quantization:
    """Both forms: hf_quant_config.json's "quantization" and config.json's flat or config_groups "quantization_config"."""
    where = quantization.where
    excluded = [pattern for key in ("exclude_modules", "ignore", "modules_to_not_convert") for pattern in quantization.words(key)]
    groups = [weights for group in quantization.sections("config_groups").values() if (weights := group.section("weights")).values]
    of_experts = quantization.get("moe_quant_algo", "").upper()  # where it is said apart, the other layers are block-scaled fp8
    algorithm = quantization.get("quant_algo", "MIXED_PRECISION" if of_experts else "").upper() or _algorithm_of_group(groups)
    _check_block_size(quantization, NVFP4)
    for group in groups:
        if group.get("num_bits", 4) == 4:
            _check_block_size(group, NVFP4)
    rules = [Rule(pattern, None) for pattern in excluded]
    if algorithm == "MIXED_PRECISION":
        for module, entry in quantization.sections("quantized_layers").items():
            layer_algorithm = entry.get("quant_algo", "none").upper()
            if layer_algorithm in _MODELOPT:
                _check_block_size(entry, NVFP4)
            rules.append(Rule(module, layer_algorithm))
        if of_experts:
            rules.append(Rule("*.experts.*", of_experts))
    elif algorithm in _MODELOPT:
        rules.append(Rule("*", algorithm))
    else:
        raise UnsupportedError("unknown ModelOpt algorithm", where=where, given=algorithm, needed=", ".join((*_MODELOPT, "MIXED_PRECISION")))
    return _made("modelopt", _MODELOPT, rules, where)


def _algorithm_of_group(groups: list[Document]) -> str:
    kinds = {(group.get("num_bits", 0), group.get("type", "")) for group in groups}
    return "NVFP4" if kinds == {(4, "float")} else f"no quant_algo, weights {sorted(map(str, kinds))}"


def _compressed_tensors(quantization: Document) -> Quantization:
    """Without config_groups, the format alone says how every Linear outside `ignore` is stored."""
    whole = quantization.get("format", "none")
    rules = [Rule(pattern, None) for pattern in quantization.words("ignore")]
    groups = quantization.sections("config_groups")
    for group in groups.values():
        algorithm = group.get("format", whole)
        if algorithm in _COMPRESSED_TENSORS:
            _check_block_size(group.section("weights"), _COMPRESSED_TENSORS[algorithm].format)
        # A bare class name ("Linear") means every module of that class.
        targets = group.words("targets") or ("Linear",)
        rules += [Rule("*" if target.isidentifier() and target[0].isupper() else target, algorithm) for target in targets]
    if not groups:
        rules.append(Rule("*", whole))
    if not any(rule.algorithm in _COMPRESSED_TENSORS for rule in rules):
        given = ", ".join(sorted({rule.algorithm for rule in rules if rule.algorithm}))
        raise UnsupportedError("unknown compressed-tensors format", where=quantization.where, given=given, needed=", ".join(_COMPRESSED_TENSORS))
    return _made("compressed-tensors", _COMPRESSED_TENSORS, rules, quantization.where)


def _quark(quantization: Document) -> Quantization:
    """AMD Quark: `exclude`, then `layer_quant_config` by name, then `layer_type_quant_config` ("Linear" means all), then `global_quant_config`."""
    rules = [Rule(pattern, None) for pattern in quantization.words("exclude")]
    of_layers = quantization.section("layer_quant_config")
    rules += [Rule(pattern, _quark_algorithm(of_layers.section(pattern))) for pattern in of_layers.values]
    of_linear = quantization.section("layer_type_quant_config").section("Linear")
    rules.append(Rule("*", _quark_algorithm(of_linear if of_linear.values else quantization.section("global_quant_config"))))
    if not any(rule.algorithm == _QUARK for rule in rules):
        given = sorted({rule.algorithm for rule in rules if rule.algorithm})
        raise UnsupportedError("unknown Quark format", where=quantization.where, given=", ".join(given) or "none", needed=_QUARK)
    return _made("quark", {_QUARK: QUARK}, rules, quantization.where)


def _quark_algorithm(entry: Document) -> str | None:
    """How Quark stores the weights of one entry of its configuration; None: not quantised."""
    stored = entry.values.get("weight")
    if not stored:
        return None
    if not isinstance(stored, Mapping):  # weights quantised in stages
        return f"weights {stored}"
    weight = entry.section("weight")
    algorithm = f"{weight.get('dtype', 'None')} {weight.get('qscheme', 'None')}"
    if algorithm != _QUARK:
        return algorithm
    if (scales := weight.get("scale_format", "e8m0")) != "e8m0":
        return f"{algorithm} with {scales} scales"
    _check_block_size(weight, MXFP4)
    return _QUARK


def _check_block_size(scheme: Document, format: BlockFormat | None) -> None:
    if format is not None and (size := scheme.get("group_size", format.block)) != format.block:
        raise CheckpointError(
            f"wrong block size for {format!r}",
            where=scheme.where,
            given=f"group_size {size}",
            needed=format.block,
            next_step=f"quantise again; known formats: {', '.join(f'{known!r} has {known.block}' for known in FORMATS.values())}",
        )
