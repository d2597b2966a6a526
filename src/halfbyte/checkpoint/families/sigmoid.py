"""Sigmoid scores, with a correction bias for the choice, groups of experts and a scale: DeepSeek-V3, Kimi, GLM, MiniMax-M2, Nemotron and others.

Shared experts are not MoE weights.
"""

from __future__ import annotations

from dataclasses import replace

from halfbyte.checkpoint.families.description import Config, Family, Model, Router, RoutingRule
from halfbyte.checkpoint.families.softmax import renormalisation, softmax_router
from halfbyte.experts import SWIGLU

_SCALE = "routed_scaling_factor"
# Whether there is a correction bias: LFM2, Ling, MiniMax-M2, Step-3.5.
_SWITCHES = ("use_expert_bias", "moe_router_enable_expert_bias", "use_routing_bias", "use_moe_router_bias")
_TOP_8 = {"num_experts_per_tok": 8, "norm_topk_prob": True}
_DEEPSEEK_V3 = Model({**_TOP_8, "n_group": 8, "topk_group": 4, _SCALE: 2.5, "first_k_dense_replace": 3}, scale=_SCALE, layers="first dense")
_GLM_4 = Model({**_TOP_8, "first_k_dense_replace": 1}, scale=_SCALE, layers="first dense")
_NEMOTRON = Model(
    {"num_experts_per_tok": 2, "norm_topk_prob": True, "mlp_hidden_act": "relu2"}, "norm_topk_prob", _SCALE, "pattern", "mlp_hidden_act"
)
_STEP = Model({"num_experts_per_tok": 8}, True, "moe_router_scaling_factor", "enumerated")
_MINIMAX_M3 = Model({"num_experts_per_tok": 4, _SCALE: 2.0}, True, _SCALE, "first dense")
_BAILING = Model(scale=_SCALE, layers="first dense")
_BAILING_HYBRID = Model(
    {"num_experts_per_token": 8, "num_expert_group": 8, "topk_group": 4, "moe_renormalize": True, _SCALE: 2.5, "first_k_dense_replace": 2},
    "moe_renormalize",
    _SCALE,
    "first dense",
)
MODEL_TYPES = {
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "deepseek_v3_2", "kimi_k2", "kimi_k25"), _DEEPSEEK_V3),
    **dict.fromkeys(("glm4_moe", "glm4v_moe", "glm4v_moe_text"), _GLM_4),
    "glm4_moe_lite": Model({**_TOP_8, "num_experts_per_tok": 4, _SCALE: 1.8, "first_k_dense_replace": 1}, scale=_SCALE, layers="first dense"),
    "glm_moe_dsa": Model({**_TOP_8, _SCALE: 2.5, "first_k_dense_replace": 3}, scale=_SCALE, layers="first dense"),
    "kimi_linear": Model(
        {"num_experts_per_token": 8, "moe_renormalize": True, _SCALE: 2.446, "first_k_dense_replace": 1}, "moe_renormalize", _SCALE, "first dense"
    ),
    "minimax_m2": Model({"num_experts_per_tok": 8}, renormalised=True),
    **dict.fromkeys(("minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text"), _MINIMAX_M3),
    "nemotron_h": _NEMOTRON,
    "hy_v3": Model(
        {"num_experts_per_tok": 8, "router_scaling_factor": 2.826, "first_k_dense_replace": 1}, True, "router_scaling_factor", "first dense"
    ),
    "dots1": Model({"norm_topk_prob": False}, scale=_SCALE, layers="first dense"),
    "lfm2_moe": Model({"num_experts_per_tok": 4, "norm_topk_prob": True, "num_dense_layers": 2}, scale=_SCALE, layers="dense layers", activation=""),
    "afmoe": Model({"num_experts_per_tok": 6, "num_dense_layers": 1}, True, "route_scale", "dense layers"),
    **dict.fromkeys(("bailing_moe", "bailing_moe_v2", "bailing_moe_linear"), _BAILING),
    "bailing_hybrid": _BAILING_HYBRID,
    "exaone_moe": Model({**_TOP_8, _SCALE: 2.5, "first_k_dense_replace": 1}, scale=_SCALE, layers="first dense"),
    "solar_open": Model(_TOP_8, scale=_SCALE),
    "mimo_v2_flash": Model({**_TOP_8, "first_k_dense_replace": 1}, scale=_SCALE, layers="first dense"),
    "laguna": Model({"num_experts_per_tok": 8, "first_k_dense_replace": 1}, True, "moe_routed_scaling_factor", "first dense"),
    **dict.fromkeys(("step3p5", "step3p7"), _STEP),
}


def describe(config: Config, model: Model) -> Family:
    """Some differ in what their experts compute: MiniMax-M3 and Step-3.5 clamp, Nemotron works at another width."""
    router = _router(config, model)
    if model is _MINIMAX_M3:
        return Family(router, replace(SWIGLU, alpha=config.get("swiglu_alpha", 1.702), beta=1.0, limit=config.get("swiglu_limit", 7.0)))
    if model is _STEP:
        limits = config.values.get("swiglu_limits") or []
        if not isinstance(limits, list):
            raise config.misfit("swiglu_limits", "a list of numbers")
        return Family(router, refused_layers={layer: f"silu(gate) is clamped at {limit}" for layer, limit in enumerate(limits) if limit})
    latent = config.value("moe_latent_size") if model is _NEMOTRON and "moe_latent_size" in config else None
    if latent is not None:
        router = Router(router.top_k, refusal="its experts lie between two latent projections")
    return Family(router, hidden=latent)


def _router(config: Config, model: Model) -> Router:
    top_k = config.top_k
    function = config.get("scoring_func", config.get("score_function", "softmax" if model is _BAILING else "sigmoid"))
    if function == "softmax" and model is _BAILING:
        return softmax_router(config, model)
    if function != "sigmoid":
        return Router(top_k, refusal=f"its scores are {function!r}")
    if config.get("moe_router_logit_softcapping", 0.0) > 0:
        return Router(top_k, refusal="it caps its logits softly")
    if config.get("moe_apply_router_weight_on_input", False):
        return Router(top_k, refusal="it scales the input of the experts")
    if not renormalisation(config, model):
        return Router(top_k, refusal="its weights are sigmoid scores that are not renormalised")
    groups = config.get("n_group", config.get("num_expert_group", 1, low=1), low=1)
    kept = config.get("topk_group", 1, low=1)
    scale = config.get(model.scale, 1.0) if model.scale else 1.0
    corrected = config.get("topk_method", "noaux_tc") == "noaux_tc" and all(config.get(key, True) for key in _SWITCHES)
    return Router(top_k, RoutingRule("deepseek_v3", top_k, groups, kept, scale), corrected=corrected)
