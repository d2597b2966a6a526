"""What each `families/<family>.py` is made of: the reading of a configuration, and the few things that set a family apart.

A family module has MODEL_TYPES, which says for every model_type what it calls its tensors, and describe(config), which says what they compute.
A model that differs from another in names alone is one more entry of MODEL_TYPES.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.checkpoint.document import Document
from halfbyte.errors import UnsupportedError
from halfbyte.experts import GEGLU, GEGLU_TANH, SWIGLU, Activation

ACTIVATIONS = {"silu": SWIGLU, "swish": SWIGLU, "gelu": GEGLU, "gelu_pytorch_tanh": GEGLU_TANH, "gelu_new": GEGLU_TANH}
MAX_LAYERS = 1 << 16  # far above any model, and few enough to be counted one by one


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
        biased: every matrix has a bias, so that one without is damaged.
    """

    routing: RoutingRule
    activation: Activation | None = None
    moe_layers: tuple[int, ...] | None = None
    interleaved: bool = False
    biased: bool = False


class Config(Document):
    """config.json read with clear errors; what its text_config says goes first.

    >>> config = Config({"model_type": "a", "text_config": {"hidden_size": 64}}, "config.json")
    >>> config.value("d_model", "hidden_size"), config.get("n_group", 1)
    (64, 1)
    """

    def __init__(self, document: Mapping[str, Any], where: str):
        """`where`: named by errors.

        Raises:
            CheckpointError: text_config is no object.
        """
        text = Document(document, where).section("text_config")
        super().__init__({**document, **text.values}, where)

    def mentions(self, word: str) -> bool:
        """Whether a key with `word` in it has a value."""
        return any(word in key and value is not None for key, value in self.values.items())

    @property
    def model_type(self) -> str:
        """What the model is; "None" where nothing says."""
        return self.get("model_type", "None")

    @property
    def num_layers(self) -> int:
        layers = self.value("num_hidden_layers")
        if layers > MAX_LAYERS:
            raise self.misfit("num_hidden_layers", f"an integer from 1 to {MAX_LAYERS}")
        return layers

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
