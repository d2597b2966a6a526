"""Families whose experts are read, but whose routers `halfbyte.route` and `MoE` cannot express: they are refused there with the reason."""

from __future__ import annotations

from halfbyte.checkpoint.families.description import Config, Family, Model, Router

_LLAMA_4 = Model({"num_experts_per_tok": 1}, layers="interleaved", refusal="it scales the input of the experts")
_GEMMA_4 = Model(
    {"hidden_activation": "gelu_pytorch_tanh"},
    activation="hidden_activation",
    refusal="it sees hidden states with a norm and a scale of its own, and scales the output of each expert",
)
MODEL_TYPES = {
    **dict.fromkeys(("llama4", "llama4_text"), _LLAMA_4),
    **dict.fromkeys(("gemma4", "gemma4_text"), _GEMMA_4),
    "phimoe": Model({"num_experts_per_tok": 2}, refusal="it masks logits by their distance from the largest (sparse mixer)"),
    "ernie4_5_moe": Model(
        {"moe_k": 6, "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
        layers="span",
        refusal="it adds a correction bias to softmax scores",
    ),
    "longcat_flash": Model({"moe_topk": 12}, refusal="it also chooses zero experts, which hand the token through"),
}


def describe(config: Config, model: Model) -> Family:
    """Nothing but the number of experts chosen is known of the router."""
    return Family(Router(config.top_k, refusal=model.refusal))
