"""gpt-oss: softmax over the top k of biased logits, clamped SwiGLU, biases; stacked experts whose gate and up rows alternate."""

from __future__ import annotations

from dataclasses import replace

from halfbyte.checkpoint.families.description import Config, Family, Model, Router, RoutingRule, TensorNames
from halfbyte.experts import SWIGLU

MODEL_TYPES = {"gpt_oss": Model({"num_experts_per_tok": 4}, names=TensorNames(logit_bias="router.bias", correction_bias=()))}


def describe(config: Config, _: Model) -> Family:
    """Experts in every layer. Their function does not depend on hidden_act."""
    return Family(
        Router(config.top_k, RoutingRule("renormalize", config.top_k)),
        activation=replace(SWIGLU, alpha=config.get("swiglu_alpha", 1.702), beta=1.0, limit=config.get("swiglu_limit", 7.0)),
        interleaved=True,
        biased=True,
    )
