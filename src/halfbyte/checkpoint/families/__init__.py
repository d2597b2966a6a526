"""Model families: from config.json and tensor names to one `MoEConfig`.

| family (model_type) | MoE layers | router | notes |
|---|---|---|---|
| qwen3_moe, qwen3_next, qwen2_moe | decoder_sparse_step, mlp_only_layers | softmax, renormalised when norm_topk_prob | |
| mixtral | all | softmax over the top k | `block_sparse_moe.experts.E.w1/w3/w2` or `mlp.experts` |
| deepseek_v3, glm4_moe | from first_k_dense_replace | sigmoid + correction bias, groups, scale | shared experts are not MoE weights |
| gpt_oss | all | biased logits, softmax over the top k | stacked, gate and up alternate, biases, clamped SwiGLU |
| deepseek_v4 | all | sqrt(softplus) + correction bias; the first layers look token ids up in a table | `ffn.experts.E.w1/w3/w2`, clamped SwiGLU |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.experts import GEGLU, GEGLU_TANH, SWIGLU, Activation

_FAMILY_OF_MODEL_TYPE = {
    "qwen2_moe": "qwen",
    "qwen3_moe": "qwen",
    "qwen3_next": "qwen",
    "mixtral": "mixtral",
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
    "glm4_moe": "deepseek_v3",
    "gpt_oss": "gpt_oss",
    "deepseek_v4": "deepseek_v4",
}
_ACTIVATIONS = {"silu": SWIGLU, "swish": SWIGLU, "gelu": GEGLU, "gelu_pytorch_tanh": GEGLU_TANH, "gelu_new": GEGLU_TANH}
_EXPERTS = re.compile(r"^((?:.*\.)?layers)\.\d+\.(mlp|block_sparse_moe|ffn)\.experts\.")


@dataclass(frozen=True)
class RoutingRule:
    """How logits become experts and weights: the arguments of `halfbyte.route`. `method` "deepseek_v4" scores with sqrt(softplus(logit))."""

    method: str
    top_k: int
    num_groups: int = 1
    top_k_groups: int = 1
    scale: float = 1.0


@dataclass(frozen=True)
class MoEConfig:
    """The MoE layers of a model, whatever its family calls things.

    Attributes:
        family: model_type of config.json.
        num_layers: decoder layers; moe_layers: indices of those with routed experts.
        num_experts, hidden, intermediate: E, H and the I of one routed expert.
        routing, activation: what `route` and the experts compute.
        block: name of a layer's MoE module, `{layer}` left open: "model.layers.{layer}.mlp".
        interleaved: stacked gate and up rows alternate (gpt-oss).
    """

    family: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    hidden: int
    intermediate: int
    routing: RoutingRule
    activation: Activation
    block: str
    interleaved: bool = False

    @property
    def top_k(self) -> int:
        return self.routing.top_k

    def block_of(self, layer: int) -> str:
        """The module name of one MoE layer.

        Raises:
            CheckpointError: the layer does not exist or has no routed experts.
        """
        if layer not in self.moe_layers:
            problem = f"layer {layer} has no routed experts" if 0 <= layer < self.num_layers else f"there is no layer {layer}"
            raise CheckpointError(problem, given=layer, needed=f"one of the MoE layers {format_range(self.moe_layers)}")
        return self.block.format(layer=layer)


def describe_moe(config: Mapping[str, Any], names: Iterable[str], *, where: str = "config.json") -> MoEConfig:
    """Read the MoE geometry and routing from a config.json and find the experts among the tensor `names`.

    Raises:
        UnsupportedError: an unknown model_type, activation or scoring function.
        CheckpointError: a missing configuration value, or no expert tensors.
    """
    config = {**config, **config.get("text_config", {})}
    model_type = config.get("model_type")
    family = _FAMILY_OF_MODEL_TYPE.get(str(model_type))
    if family is None:
        raise UnsupportedError("unknown model family", where=where, given=f"model_type {model_type!r}", needed=", ".join(_FAMILY_OF_MODEL_TYPE))

    def value(*keys: str, default: Any = None) -> Any:
        for key in keys:
            if config.get(key) is not None:
                return config[key]
        if default is None:
            raise CheckpointError("missing value", where=where, needed=" or ".join(keys))
        return default

    num_layers = value("num_hidden_layers")
    activation = _ACTIVATIONS.get(value("hidden_act", default="silu"))
    if activation is None:
        raise UnsupportedError("unknown activation", where=where, given=f"hidden_act {config['hidden_act']!r}", needed=", ".join(_ACTIVATIONS))
    if family == "gpt_oss":
        activation = Activation("swiglu", alpha=value("swiglu_alpha", default=1.702), beta=1.0, limit=value("swiglu_limit", default=7.0))
    elif family == "deepseek_v4":
        activation = replace(activation, limit=value("swiglu_limit", default=10.0))
    return MoEConfig(
        family=str(model_type),
        num_layers=num_layers,
        moe_layers=tuple(layer for layer in range(num_layers) if _has_experts(config, family, layer)),
        num_experts=value("num_experts", "num_local_experts", "n_routed_experts"),
        hidden=value("hidden_size"),
        intermediate=value("moe_intermediate_size", "intermediate_size"),
        routing=_routing(config, family, value("num_experts_per_tok", "experts_per_token"), where),
        activation=activation,
        block=_find_block(names, where),
        interleaved=family == "gpt_oss",
    )


def format_range(numbers: Iterable[int]) -> str:
    """Write sorted integers with runs abbreviated.

    >>> format_range([0, 1, 2, 3, 5])
    '0..3, 5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in runs) or "(none)"


def _has_experts(config: Mapping[str, Any], family: str, layer: int) -> bool:
    if config.get("mlp_layer_types"):
        return config["mlp_layer_types"][layer] != "dense"
    if family == "qwen":
        return layer not in (config.get("mlp_only_layers") or ()) and (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0
    if family == "deepseek_v3":
        return layer >= (config.get("first_k_dense_replace") or 0) and layer % (config.get("moe_layer_freq") or 1) == 0
    return True


def _routing(config: Mapping[str, Any], family: str, top_k: int, where: str) -> RoutingRule:
    if family == "qwen":
        return RoutingRule("renormalize" if config.get("norm_topk_prob", False) else "default", top_k)
    if family in ("mixtral", "gpt_oss"):
        return RoutingRule("renormalize", top_k)
    scoring = "sigmoid" if family == "deepseek_v3" else "sqrtsoftplus"
    if config.get("scoring_func", scoring) != scoring or not config.get("norm_topk_prob", True):
        raise UnsupportedError(
            "unknown router",
            where=where,
            given=f"scoring_func {config.get('scoring_func')!r}, norm_topk_prob {config.get('norm_topk_prob')}",
            needed=f"scoring_func {scoring!r}, norm_topk_prob true",
        )
    scale = float(config.get("routed_scaling_factor") or 1.0)
    if family == "deepseek_v4":
        return RoutingRule("deepseek_v4", top_k, scale=scale)
    return RoutingRule("deepseek_v3", top_k, config.get("n_group") or 1, config.get("topk_group") or 1, scale)


def _find_block(names: Iterable[str], where: str) -> str:
    # A multi-token-prediction head (mtp.layers.0...) has experts of its own, which are not layers of the model.
    found = {match.groups() for name in names if not name.startswith("mtp.") and (match := _EXPERTS.match(name))}
    if len(found) != 1:
        given = ", ".join(sorted(f"{layers}.N.{block}" for layers, block in found)) or "none"
        raise CheckpointError(
            "no single place of expert tensors", where=where, given=given, needed="layers.N.(mlp|block_sparse_moe|ffn).experts tensors"
        )
    layers, block = found.pop()
    return f"{layers}.{{layer}}.{block}"
