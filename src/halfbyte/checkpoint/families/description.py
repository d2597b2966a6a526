"""What each `families/<family>.py` is made of: the reading of a configuration, and the few things that set a family apart.

A family module has MODEL_TYPES, which says for every model_type what it calls its tensors, and describe(config), which says what they compute.
A model that differs from another in names alone is one more entry of MODEL_TYPES.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.experts import GEGLU, GEGLU_TANH, SWIGLU, Activation

ACTIVATIONS = {"silu": SWIGLU, "swish": SWIGLU, "gelu": GEGLU, "gelu_pytorch_tanh": GEGLU_TANH, "gelu_new": GEGLU_TANH}


@dataclass(frozen=True)
class RoutingRule:
    """How logits become experts and weights: the arguments of `halfbyte.route`. `method` "deepseek_v4" scores with sqrt(softplus(logit))."""

    method: str
    top_k: int
    num_groups: int = 1
    top_k_groups: int = 1
    scale: float = 1.0


@dataclass(frozen=True)
class TensorNames:
    """What a family calls the tensors of a router, below the MoE module of the layer; "" or () where it has none.

    Expert tensors need no entry: they are found by name in every family (`checkpoint.projections`).

    Attributes:
        router: [E, H], whose product with the hidden states are the logits.
        logit_bias: [E], added to them.
        correction_bias: [E], added to the scores for selection only; the first of these names that is there.
        token_experts: [vocabulary, k], the experts of every token id.
    """

    router: str = "gate.weight"
    logit_bias: str = "gate.bias"
    correction_bias: tuple[str, ...] = ("gate.e_score_correction_bias",)
    token_experts: str = ""


@dataclass(frozen=True)
class Family:
    """How the MoE layers of a model compute.

    Attributes:
        routing: of every MoE layer.
        activation: of the experts; None: what hidden_act says.
        moe_layers: layers with routed experts; None: all. `mlp_layer_types` in the configuration goes before it.
        interleaved: stacked gate and up rows alternate.
    """

    routing: RoutingRule
    activation: Activation | None = None
    moe_layers: tuple[int, ...] | None = None
    interleaved: bool = False


class Config:
    """config.json read with clear errors; what its text_config says goes first.

    >>> config = Config({"model_type": "a", "text_config": {"hidden_size": 64}}, "config.json")
    >>> config.value("d_model", "hidden_size"), config.get("n_group", 1)
    (64, 1)
    """

    def __init__(self, document: Mapping[str, Any], where: str):
        """`where`: named by errors."""
        self._values = {**document, **(document.get("text_config") or {})}
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        """A value, `default` where it is absent or null."""
        value = self._values.get(key)
        return default if value is None else value

    def value(self, *keys: str) -> Any:
        """The value of the first key that has one.

        Raises:
            CheckpointError: none has.
        """
        value = next((self._values[key] for key in keys if self._values.get(key) is not None), None)
        if value is None:
            raise CheckpointError("missing value", where=self.where, needed=" or ".join(keys))
        return value

    def mentions(self, word: str) -> bool:
        """Whether a key with `word` in it has a value."""
        return any(word in key and value is not None for key, value in self._values.items())

    @property
    def model_type(self) -> str:
        return str(self.get("model_type"))

    @property
    def num_layers(self) -> int:
        return self.value("num_hidden_layers")

    @property
    def top_k(self) -> int:
        return self.value("num_experts_per_tok", "experts_per_token")

    @property
    def activation(self) -> Activation:
        """What hidden_act says, SwiGLU where it says nothing.

        Raises:
            UnsupportedError: a function halfbyte does not compute.
        """
        name = self.get("hidden_act", "silu")
        if name not in ACTIVATIONS:
            raise UnsupportedError("unknown activation", where=self.where, given=f"hidden_act {name!r}", needed=", ".join(ACTIVATIONS))
        return ACTIVATIONS[name]
