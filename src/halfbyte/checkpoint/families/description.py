"""What each `families/<family>.py` is made of: the reading of a configuration, and the few things that set a family apart.

A family module has MODEL_TYPES, which says for every model_type what sets it apart from the others of the family, and describe(config, model), which
says what they compute. A model that differs from another in names alone is one more entry of MODEL_TYPES.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from halfbyte.checkpoint.document import LARGEST, Document
from halfbyte.errors import UnsupportedError
from halfbyte.experts import GEGLU, GEGLU_TANH, RELU2, SWIGLU, Activation

ACTIVATIONS = {"silu": SWIGLU, "swish": SWIGLU, "gelu": GEGLU, "gelu_pytorch_tanh": GEGLU_TANH, "gelu_new": GEGLU_TANH, "relu2": RELU2}
TOP_K = (
    "num_experts_per_tok",
    "experts_per_token",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
)  # keys that may say it
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # the keys that may say it, the first goes first
NUM_PREDICTING = ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_hidden_layers")  # likewise
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

    Of several names the first that is there counts. Expert tensors need no entry: they are found by name (`checkpoint.projections`).

    Attributes:
        router: [E, H], whose product with the hidden states are the logits.
        logit_bias: [E], added to them.
        correction_bias: [E], added to the scores for selection only.
        token_experts: [vocabulary, k], the experts of every token id.
    """

    router: tuple[str, ...] = ("gate.weight", "router.weight", "router.gate.weight", "router.layer.weight", "gate.wg.weight")
    logit_bias: str = ""
    correction_bias: tuple[str, ...] = (
        "gate.e_score_correction_bias",
        "e_score_correction_bias",
        "experts.e_score_correction_bias",
        "gate.expert_bias",
        "expert_bias",
        "router_bias",
    )
    token_experts: str = ""


LayerRule = Literal["all", "first dense", "sparse step", "dense layers", "span", "period", "interleaved", "pattern", "enumerated"]


@dataclass(frozen=True)
class Model:
    """What sets a model_type apart from the others of its family.

    Attributes:
        defaults: what values mean that the configuration leaves out, as transformers has them.
        renormalised: whether the weights of the chosen experts are made to sum to 1; or the key that says so.
        scale: the key of the factor of all weights; "" where there is none.
        layers: which layers have experts (`families.layers`).
        activation: the key that names it; "" where it is SwiGLU whatever the configuration says.
        names: of its router's tensors.
        section: a part of the configuration whose values count, too.
        refusal: why `halfbyte.route` and `MoE` cannot compute its router, whatever the configuration says; "" where they can.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    renormalised: bool | str = "norm_topk_prob"
    scale: str = ""
    layers: LayerRule = "all"
    activation: str = "hidden_act"
    names: TensorNames = TensorNames()
    section: str = ""
    refusal: str = ""


@dataclass(frozen=True)
class Router:
    """The routing of a model, or why `halfbyte.route` cannot express it. `top_k` is known in any case.

    Attributes:
        corrected: scores have a bias added for selection, so that a router without is damaged.
        hashed_layers: layers that look the experts of a token up by its id instead.
    """

    top_k: int
    rule: RoutingRule | None = None
    refusal: str = ""
    corrected: bool = False
    hashed_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Family:
    """How the MoE layers of a model compute.

    Attributes:
        router: of every MoE layer.
        activation: of the experts; None: what the configuration names.
        interleaved: stacked gate and up rows alternate.
        biased: every matrix has a bias, so that one without is damaged.
        hidden: the width of the experts where it is not that of the model.
        refused_layers: layers whose experts compute something that `Activation` cannot say, and what.
    """

    router: Router
    activation: Activation | None = None
    interleaved: bool = False
    biased: bool = False
    hidden: int | None = None
    refused_layers: Mapping[int, str] = field(default_factory=dict)


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

    def with_defaults(self, defaults: Mapping[str, Any]) -> Config:
        """The same, and `defaults` where a value is absent or null; that of `TOP_K` where none of its names has a value."""
        own = {key: value for key, value in self.values.items() if value is not None and key != "text_config"}
        if own.keys() & set(TOP_K):
            defaults = {key: value for key, value in defaults.items() if key not in TOP_K}
        return Config({**defaults, **own}, self.where)

    def mentions(self, word: str) -> bool:
        """Whether a key with `word` in it has a value."""
        return any(word in key and value is not None for key, value in self.values.items())

    @property
    def model_type(self) -> str:
        """What the model is; "None" where nothing says."""
        return self.get("model_type", "None")

    @property
    def num_layers(self) -> int:
        kinds = self.words("layers_block_type")  # Nemotron-H counts its layers by them
        layers = len(kinds) or self.value("num_hidden_layers", "num_layers", "n_layers")
        if layers > MAX_LAYERS:
            raise self.misfit("num_hidden_layers", f"an integer from 1 to {MAX_LAYERS}")
        return layers

    @property
    def num_predicting(self) -> int:
        """Layers behind the model's that predict further tokens."""
        return next((self.get(key, 0, high=MAX_LAYERS) for key in NUM_PREDICTING if key in self), 0)

    @property
    def top_k(self) -> int:
        return self.everywhere(*TOP_K)

    def check_num_experts(self, found: int, last: str) -> None:
        """Raise CheckpointError where a number of experts is given, for all layers, that is not the one that was `found`; `last`: what says so."""
        key = next((key for key in NUM_EXPERTS if key in self), None)
        if key and not isinstance(self.values[key], list) and self.value(key) != found:
            raise self.misfit(key, f"{found}, as the files go as far as {last}")

    def everywhere(self, *keys: str) -> int:
        """The positive integer of the first key that has one; of a list with one for every layer, the one that they share.

        Raises:
            CheckpointError: none has, or it is something else.
            UnsupportedError: layers differ.
        """
        key = next((key for key in keys if isinstance(self.values.get(key), list)), None)
        if key is None or next(given for given in keys if given in self) != key:
            return self.value(*keys)
        values = self.integers(key)
        if any(value != values[0] for value in values):
            raise UnsupportedError("layers differ", where=self.where, given=f"{key} {list(values)}", needed="one value for all layers")
        if len(values) < self.num_layers or not values[0]:
            raise self.misfit(key, f"an integer from 1 to {LARGEST}, or a list with one for each layer")
        return values[0]

    def activation_of(self, key: str) -> Activation:
        """What `key` says, SwiGLU where it says nothing.

        Raises:
            UnsupportedError: a function halfbyte does not compute.
        """
        named = isinstance(self.values.get(key), Mapping)  # {"name": "silu"} of DBRX
        name = self.section(key).get("name", "silu") if named else self.get(key, "silu")
        if name not in ACTIVATIONS:
            raise UnsupportedError("unknown activation", where=self.where, given=f"{key} {name!r}", needed=", ".join(ACTIVATIONS))
        return ACTIVATIONS[name]
