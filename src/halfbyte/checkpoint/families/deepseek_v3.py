"""DeepSeek-V3, Kimi-K2, GLM-4-MoE: sigmoid scores with a correction bias, groups of experts, a scale. Shared experts are not MoE weights."""

from __future__ import annotations

from halfbyte.checkpoint.families.description import Config, Family, RoutingRule, TensorNames
from halfbyte.errors import UnsupportedError

MODEL_TYPES = dict.fromkeys(("deepseek_v3", "kimi_k2", "glm4_moe"), TensorNames())


def describe(config: Config) -> Family:
    """The first `first_k_dense_replace` layers are dense, then every `moe_layer_freq`-th has experts."""
    check_scoring(config, "sigmoid")
    first, step = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1, low=1)
    groups, top_k_groups = (config.get(key, 1, low=1) for key in ("n_group", "topk_group"))
    return Family(
        RoutingRule("deepseek_v3", config.top_k, groups, top_k_groups, config.get("routed_scaling_factor", 1.0)),
        moe_layers=tuple(layer for layer in range(config.num_layers) if layer >= first and layer % step == 0),
    )


def check_scoring(config: Config, function: str) -> None:
    """Raise UnsupportedError unless the router scores with `function` and renormalises its weights, as the routing methods of DeepSeek do."""
    given, renormalised = config.get("scoring_func", function), config.get("norm_topk_prob", True)
    if given != function or not renormalised:
        raise UnsupportedError(
            "unknown router",
            where=config.where,
            given=f"scoring_func {given!r}, norm_topk_prob {renormalised}",
            needed=f"scoring_func {function!r}, norm_topk_prob true",
        )
