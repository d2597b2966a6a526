"""How a checkpoint says it is quantised: config.json and hf_quant_config.json to one `Quantization`.

| kind | said by |
|---|---|
| modelopt | hf_quant_config.json, or quant_method "modelopt" |
| compressed-tensors | quant_method "compressed-tensors" |
| gpt-oss | quant_method "mxfp4" |
| deepseek-v4 | expert_dtype "fp4" |
| quark | quant_method "quark" |
| fp8-block | quant_method "fp8" |
| dense | nothing |

What each calls its tensors: `checkpoint.dialects`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from halfbyte.checkpoint.dialects import DEEPSEEK_V4, DENSE, GPT_OSS, MODELOPT, OUTPUTS, QUARK, Dialect
from halfbyte.checkpoint.projections import FUSED
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats import FORMATS, MXFP4, NVFP4, BlockFormat

Kind = Literal["modelopt", "compressed-tensors", "gpt-oss", "deepseek-v4", "quark", "fp8-block", "dense"]

# How each algorithm stores a module. W4A16 says that activations are never quantised, which shows as absent input scales.
_MODELOPT = dict.fromkeys(("NVFP4", "NVFP4_AWQ", "W4A16_NVFP4"), MODELOPT)
_COMPRESSED_TENSORS = {dialect.name: dialect for dialect in OUTPUTS["compressed-tensors"]}
_QUARK = "fp4 per_group"
_METHODS = ("modelopt", "compressed-tensors", "mxfp4", "quark", "fp8")


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
        return next((rule for rule in self.rules if matches(rule.pattern, module)), None)


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern of an exclude, ignore or target list means `module`. `language_model` segments are ignored on both sides.

    "re:..." is a regular expression matched from the start. Otherwise the pattern is a glob of the whole name, or of a run of whole path
    segments, so that "lm_head", "mlp.gate" and "model.layers.0" mean those modules and everything below them, and never "mlp.gate_proj".

    >>> matches("model.layers.*.mlp.gate", "model.layers.3.mlp.gate"), matches("mlp.gate", "model.layers.3.mlp.gate_proj")
    (True, False)
    """
    if pattern.startswith("re:"):
        return any(re.match(pattern[3:], name) for name in (module, _without_language_model(module)))
    pattern, module = _without_language_model(pattern), _without_language_model(module)
    if fnmatchcase(module, pattern):
        return True
    globs, segments = pattern.split("."), module.split(".")
    runs = range(len(segments) - len(globs) + 1)
    return any(all(fnmatchcase(segment, glob) for segment, glob in zip(segments[start:], globs, strict=False)) for start in runs)


def _without_language_model(name: str) -> str:
    return ".".join(segment for segment in name.split(".") if segment != "language_model")


def describe_quantization(config: Mapping[str, Any], hf_quant_config: Mapping[str, Any] | None = None, *, where: str = "config.json") -> Quantization:
    """Read the quantisation of a model from its config.json and, where there is one, ModelOpt's hf_quant_config.json.

    Raises:
        UnsupportedError: a quant_method, algorithm or format that halfbyte does not read, with those it does.
        CheckpointError: a block size that is not the format's.
    """
    inner = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config") or {}
    if hf_quant_config is not None:
        return _modelopt(hf_quant_config.get("quantization", hf_quant_config), where=f"{where}/hf_quant_config.json")
    method = inner.get("quant_method") or ("modelopt" if "quant_algo" in inner else None)
    if "fp4" in (config.get("expert_dtype"), inner.get("expert_dtype")):
        return Quantization("deepseek-v4", {"fp4": DEEPSEEK_V4}, (Rule("*.experts.*", "fp4"),), where)
    if method is None and not inner:
        return Quantization("dense", {}, (), where)
    if method in ("modelopt", "modelopt_fp4"):
        return _modelopt(inner, where)
    if method == "compressed-tensors":
        return _compressed_tensors(inner, where)
    if method == "mxfp4":
        kept = tuple(Rule(pattern, None) for pattern in inner.get("modules_to_not_convert") or ())
        return Quantization("gpt-oss", {"mxfp4": GPT_OSS}, (*kept, Rule("*.experts*", "mxfp4")), where)
    if method == "quark":
        return _quark(inner, where)
    if method == "fp8":
        block = inner.get("weight_block_size")
        if block != [128, 128]:
            raise UnsupportedError("only block-scaled fp8 is read", where=where, given=f"weight_block_size {block}", needed="[128, 128]")
        return Quantization("fp8-block", {}, (), where)
    raise UnsupportedError("unknown quantisation", where=where, given=f"quant_method {method!r}", needed=", ".join(_METHODS))


def _modelopt(quantization: Mapping[str, Any], where: str) -> Quantization:
    """Both forms: hf_quant_config.json's "quantization" and config.json's flat or config_groups "quantization_config"."""
    excluded: list[str] = []
    for key in ("exclude_modules", "ignore", "modules_to_not_convert"):
        excluded += quantization.get(key) or ()
    groups = [group["weights"] for group in (quantization.get("config_groups") or {}).values() if group.get("weights")]
    algorithm = str(quantization.get("quant_algo") or "").upper() or _algorithm_of_group(groups)
    for size in [quantization.get("group_size")] + [group.get("group_size") for group in groups if group.get("num_bits", 4) == 4]:
        _check_block_size(size, NVFP4, where)
    rules = [Rule(pattern, None) for pattern in excluded]
    if algorithm == "MIXED_PRECISION":
        for module, entry in (quantization.get("quantized_layers") or {}).items():
            layer_algorithm = str(entry.get("quant_algo")).upper()
            if layer_algorithm in _MODELOPT:
                _check_block_size(entry.get("group_size"), NVFP4, where)
            rules.append(Rule(module, layer_algorithm))
    elif algorithm in _MODELOPT:
        rules.append(Rule("*", algorithm))
    else:
        raise UnsupportedError("unknown ModelOpt algorithm", where=where, given=algorithm, needed=", ".join((*_MODELOPT, "MIXED_PRECISION")))
    return Quantization("modelopt", _MODELOPT, tuple(rules), where)


def _algorithm_of_group(groups: list[Mapping[str, Any]]) -> str:
    kinds = {(group.get("num_bits"), group.get("type")) for group in groups}
    return "NVFP4" if kinds == {(4, "float")} else f"no quant_algo, weights {sorted(map(str, kinds))}"


def _compressed_tensors(quantization: Mapping[str, Any], where: str) -> Quantization:
    rules = [Rule(pattern, None) for pattern in quantization.get("ignore") or ()]
    groups = quantization.get("config_groups") or {"config_groups": {}}  # left out: the format holds for every Linear
    for name, group in groups.items():
        algorithm = str(group.get("format") or quantization.get("format"))
        if algorithm in _COMPRESSED_TENSORS:
            _check_block_size((group.get("weights") or {}).get("group_size"), _COMPRESSED_TENSORS[algorithm].format, f"{where}, {name}")
        # A bare class name ("Linear") means every module of that class.
        targets = group.get("targets") or ["Linear"]
        rules += [Rule("*" if target.isidentifier() and target[0].isupper() else target, algorithm) for target in targets]
    if not any(rule.algorithm in _COMPRESSED_TENSORS for rule in rules):
        given = sorted({str(rule.algorithm) for rule in rules if rule.algorithm}) or [str(quantization.get("format"))]
        raise UnsupportedError("unknown compressed-tensors format", where=where, given=", ".join(given), needed=", ".join(_COMPRESSED_TENSORS))
    return Quantization("compressed-tensors", _COMPRESSED_TENSORS, tuple(rules), where)


def _quark(quantization: Mapping[str, Any], where: str) -> Quantization:
    """AMD Quark: `exclude`, then `layer_quant_config` by name, then `layer_type_quant_config` ("Linear" means all), then `global_quant_config`."""
    rules = [Rule(pattern, None) for pattern in quantization.get("exclude") or ()]
    rules += [Rule(pattern, _quark_algorithm(entry, where)) for pattern, entry in (quantization.get("layer_quant_config") or {}).items()]
    of_linear = (quantization.get("layer_type_quant_config") or {}).get("Linear") or quantization.get("global_quant_config")
    rules.append(Rule("*", _quark_algorithm(of_linear, where)))
    if not any(rule.algorithm == _QUARK for rule in rules):
        given = sorted({str(rule.algorithm) for rule in rules if rule.algorithm})
        raise UnsupportedError("unknown Quark format", where=where, given=", ".join(given) or "none", needed=_QUARK)
    return Quantization("quark", {_QUARK: QUARK}, tuple(rules), where)


def _quark_algorithm(entry: Mapping[str, Any] | None, where: str) -> str | None:
    """How Quark stores the weights of one entry of its configuration; None: not quantised."""
    weight = (entry or {}).get("weight")
    if not weight:
        return None
    if not isinstance(weight, Mapping):  # weights quantised in stages
        return f"weights {weight}"
    algorithm = f"{weight.get('dtype')} {weight.get('qscheme')}"
    if weight.get("dtype") != "fp4" or weight.get("qscheme") != "per_group":
        return algorithm
    if weight.get("scale_format") not in (None, "e8m0"):
        return f"{algorithm} with {weight['scale_format']} scales"
    _check_block_size(weight.get("group_size"), MXFP4, where)
    return _QUARK


def _check_block_size(size: object, format: BlockFormat | None, where: str) -> None:
    if format is not None and size not in (None, format.block):
        raise CheckpointError(
            f"wrong block size for {format!r}",
            where=where,
            given=f"group_size {size}",
            needed=format.block,
            next_step=f"quantise again; known formats: {', '.join(f'{known!r} has {known.block}' for known in FORMATS.values())}",
        )
