"""DeepSeek-V4: sqrt(softplus) scores with a correction bias, clamped SwiGLU. The first layers look the experts of a token up by its id."""

from __future__ import annotations

from dataclasses import replace

from halfbyte.checkpoint.families.deepseek_v3 import check_scoring
from halfbyte.checkpoint.families.description import Config, Family, RoutingRule, TensorNames

# Its own files call the correction bias gate.bias.
MODEL_TYPES = {"deepseek_v4": TensorNames(logit_bias="", correction_bias=("gate.e_score_correction_bias", "gate.bias"), token_experts="gate.tid2eid")}


def describe(config: Config) -> Family:
    """Experts in every layer."""
    check_scoring(config, "sqrtsoftplus")
    return Family(
        RoutingRule("deepseek_v4", config.top_k, scale=config.get("routed_scaling_factor", 1.0)),
        activation=replace(config.activation, limit=config.get("swiglu_limit", 10.0)),
    )
