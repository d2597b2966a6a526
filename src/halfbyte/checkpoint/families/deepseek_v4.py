"""DeepSeek-V4: sqrt(softplus) scores with a correction bias, clamped SwiGLU. The first layers look the experts of a token up by its id."""

from __future__ import annotations

from dataclasses import replace

from halfbyte.checkpoint.families.description import Config, Family, Model, Router, RoutingRule, TensorNames

# Its own files call the correction bias gate.bias.
MODEL_TYPES = {
    "deepseek_v4": Model(
        {"num_experts_per_tok": 6},
        names=TensorNames(correction_bias=("gate.e_score_correction_bias", "gate.bias"), token_experts="gate.tid2eid"),
    )
}


def describe(config: Config, _: Model) -> Family:
    """Experts in every layer."""
    function, renormalised = config.get("scoring_func", "sqrtsoftplus"), config.get("norm_topk_prob", True)
    kinds = config.words("mlp_layer_types") or ("hash_moe",) * min(config.num_layers, config.get("num_hash_layers", 3))
    rule = RoutingRule("deepseek_v4", config.top_k, scale=config.get("routed_scaling_factor", 1.5))
    router = Router(config.top_k, rule, corrected=True, hashed_layers=tuple(layer for layer, kind in enumerate(kinds) if kind == "hash_moe"))
    if function != "sqrtsoftplus" or not renormalised:
        router = Router(config.top_k, refusal=f"its scores are {function!r}, norm_topk_prob {renormalised}")
    return Family(router, activation=replace(config.activation_of("hidden_act"), limit=config.get("swiglu_limit", 10.0)))
