"""Softmax over the logits of all experts, the k largest, perhaps renormalised: Qwen, Mixtral, OLMoE, Granite, Jamba, DBRX and others.

Renormalised over the k is softmax over their logits alone. Shared experts are not MoE weights.
"""

from __future__ import annotations

from halfbyte.checkpoint.families.description import Config, Family, Model, Router, RoutingRule
from halfbyte.errors import CheckpointError

_SCALE = "routed_scaling_factor"
_MISTRAL_LARGE_4 = Model({"num_experts_per_tok": 4, "first_k_dense_replace": 1}, renormalised=True, scale=_SCALE, layers="first dense")
MODEL_TYPES = {
    "qwen2_moe": Model({"num_experts_per_tok": 4, "norm_topk_prob": False}, layers="sparse step"),
    "qwen3_moe": Model({"num_experts_per_tok": 8, "norm_topk_prob": False}, layers="sparse step"),
    "qwen3_next": Model({"num_experts_per_tok": 10, "norm_topk_prob": True}, layers="sparse step"),
    **dict.fromkeys(("qwen3_vl_moe", "qwen3_vl_moe_text"), Model({"num_experts_per_tok": 4}, renormalised=True, layers="sparse step")),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_5_moe_text"), Model({"num_experts_per_tok": 8}, renormalised=True)),
    **dict.fromkeys(
        ("mixtral", "minimax", "granitemoe", "granitemoeshared", "granitemoehybrid"), Model({"num_experts_per_tok": 2}, renormalised=True)
    ),
    "olmoe": Model({"num_experts_per_tok": 8, "norm_topk_prob": False}),
    "flex_olmo": Model({"num_experts_per_tok": 5, "norm_topk_prob": False}),
    "jamba": Model({"num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}, renormalised=False, layers="period"),
    "hunyuan_v1_moe": Model({"moe_topk": 1}, renormalised=True),
    "dbrx": Model(
        {"moe_top_k": 1, "moe_normalize_expert_weights": 1.0},
        renormalised="moe_normalize_expert_weights",
        activation="ffn_act_fn",
        section="ffn_config",
    ),
    "cohere2_moe": Model({"num_experts_per_tok": 2, "norm_topk_prob": True, "expert_selection_fn": "softmax"}, layers="first dense"),
    "deepseek_v2": Model(renormalised=False, scale=_SCALE, layers="first dense"),
    "mistral4": Model({"num_experts_per_tok": 4, "norm_topk_prob": True}, scale=_SCALE, layers="first dense"),
    **dict.fromkeys(("mistral_large4", "mistral_large4_text"), _MISTRAL_LARGE_4),
}


def describe(config: Config, model: Model) -> Family:
    """DeepSeek-V2 and Mistral 4 have a scale; Cohere may choose sigmoid, which DeepSeek-V2 and Mistral do not."""
    return Family(softmax_router(config, model))


def softmax_router(config: Config, model: Model) -> Router:
    """The routing of a softmax router."""
    order, top_k = renormalisation(config, model), config.top_k
    function = config.get("expert_selection_fn", "softmax")
    groups, kept = (config.get(key, 1, low=1) for key in ("n_group", "topk_group"))
    if groups > 1 and kept < groups and config.get("topk_method", "") != "greedy":
        return Router(top_k, refusal=f"it chooses {kept} of {groups} groups of experts by softmax scores")
    if order not in (0, 1):
        return Router(top_k, refusal=f"it renormalises weights by their {order}-norm")
    if function == "sigmoid":
        return Router(top_k, RoutingRule("sigmoid_renorm" if order else "topk_sigmoid", top_k))
    if function != "softmax":
        return Router(top_k, refusal=f"its scores are expert_selection_fn {function!r}")
    scale = config.get(model.scale, 1.0) if model.scale else 1.0
    # Cohere's softmax is over the k, whatever norm_topk_prob says.
    over_k = order or "expert_selection_fn" in config
    return Router(top_k, RoutingRule("renormalize" if over_k else "default", top_k, scale=scale))


def renormalisation(config: Config, model: Model) -> float:
    """0: the weights of the chosen experts are as they are; otherwise the order of the norm by which they are divided.

    Raises:
        CheckpointError: the configuration has to say it and does not, or says something else than its default is: a bool, or a number (DBRX).
    """
    key = model.renormalised
    if not isinstance(key, str):
        return float(key)
    if key not in config:
        raise CheckpointError("missing value", where=config.where, needed=key)
    return float(config.get(key, model.defaults.get(key, True)))
