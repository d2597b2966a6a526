"""Qwen2-MoE, Qwen3-MoE, Qwen3-Next: softmax over all experts, renormalised over the top k when norm_topk_prob. Shared experts are not MoE weights."""

from __future__ import annotations

from halfbyte.checkpoint.families.description import Config, Family, RoutingRule, TensorNames

MODEL_TYPES = dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_next"), TensorNames())


def describe(config: Config) -> Family:
    """Every `decoder_sparse_step`-th layer has experts, those in `mlp_only_layers` have none."""
    dense, step = frozenset(config.integers("mlp_only_layers")), config.get("decoder_sparse_step", 1, low=1)
    layers = tuple(layer for layer in range(config.num_layers) if layer not in dense and (layer + 1) % step == 0)
    return Family(RoutingRule("renormalize" if config.get("norm_topk_prob", False) else "default", config.top_k), moe_layers=layers)
