"""Mixtral: softmax over the top k, experts in every layer."""

from __future__ import annotations

from halfbyte.checkpoint.families.description import Config, Family, RoutingRule, TensorNames

MODEL_TYPES = {"mixtral": TensorNames()}


def describe(config: Config) -> Family:
    """Nothing but the number of experts chosen is up to the configuration."""
    return Family(RoutingRule("renormalize", config.top_k))
