"""Model families: from config.json and tensor names to one `MoEConfig`. Each family is one file of this folder, listed in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from halfbyte.checkpoint.families import deepseek_v4, experts_only, gpt_oss, sigmoid, softmax
from halfbyte.checkpoint.families.description import ACTIVATIONS, NUM_EXPERTS, Config, Family, Model, RoutingRule, TensorNames
from halfbyte.checkpoint.families.layers import moe_layers
from halfbyte.checkpoint.projections import place_of
from halfbyte.errors import CheckpointError, InputError, UnsupportedError
from halfbyte.experts import Activation

__all__ = [
    "FAMILIES",
    "KNOWN_MODEL_TYPES",
    "MoEConfig",
    "RoutingRule",
    "describe_moe",
    "find_experts",
    "format_range",
    "is_known",
    "only_block",
    "tensor_names",
]


class _FamilyModule(Protocol):
    @property
    def MODEL_TYPES(self) -> Mapping[str, Model]: ...  # noqa: N802

    def describe(self, config: Config, model: Model, /) -> Family: ...


FAMILIES: tuple[_FamilyModule, ...] = (softmax, sigmoid, gpt_oss, deepseek_v4, experts_only)
_FAMILY_OF = {model_type: family for family in FAMILIES for model_type in family.MODEL_TYPES}
KNOWN_MODEL_TYPES = tuple(_FAMILY_OF)
Found = dict[str, dict[int, list[str]]]  # names of the tensors of experts, by place (`{layer}` left open) and layer


@dataclass(frozen=True)
class MoEConfig:
    """The MoE layers of a model, whatever its family calls things.

    Attributes:
        family: model_type of config.json.
        num_layers: decoder layers; moe_layers: indices of those with routed experts.
        num_experts, hidden, intermediate: E, H and the I of one routed expert.
        routing, activation: what `route` and the experts compute; None where only a family that halfbyte does not know could tell.
        biased: every matrix has a bias.
        router_refusal: of a known family, why `route` cannot compute its router; routing is None then.
        known_top_k: experts of a token, also where the routing is None.
        refused_layers: layers whose experts compute something that `Activation` cannot say, and what.
        block: name of a layer's MoE module, `{layer}` left open: "model.layers.{layer}.mlp".
        interleaved: stacked gate and up rows alternate (gpt-oss).
        predicting_layers: layers with routed experts behind those of the model, which predict further tokens (DeepSeek-V3's is 61).
        corrected, hashed_layers: as in `Router`.
    """

    family: str
    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    hidden: int
    intermediate: int
    routing: RoutingRule | None
    activation: Activation | None
    block: str
    interleaved: bool = False
    biased: bool = False
    router_refusal: str = ""
    known_top_k: int | None = None
    refused_layers: Mapping[int, str] = field(default_factory=dict)
    predicting_layers: tuple[int, ...] = ()
    corrected: bool = False
    hashed_layers: tuple[int, ...] = ()

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """All layers with routed experts: those of the model, and those behind it."""
        return (*self.moe_layers, *self.predicting_layers)

    @property
    def top_k(self) -> int:
        """Experts of a token; errors as `known_routing`."""
        return self.known_routing().top_k if self.known_top_k is None else self.known_top_k

    def known_routing(self, where: str = "config.json") -> RoutingRule:
        """The routing.

        Raises:
            UnsupportedError: it is unknown, as the family is; or `route` cannot compute it.
        """
        if self.router_refusal:
            raise UnsupportedError(
                f"the router of this model is none that halfbyte computes: {self.router_refusal}",
                where=where,
                given=f"model_type {self.family!r}",
                next_step="load the experts alone with halfbyte.load_prepared, and route outside halfbyte",
            )
        if self.routing is None:
            raise UnsupportedError(
                "routing unknown: this model family is not one halfbyte knows",
                where=where,
                given=f"model_type {self.family!r}",
                needed=", ".join(KNOWN_MODEL_TYPES),
                next_step="load the experts alone with halfbyte.load_prepared, and route outside halfbyte",
            )
        return self.routing

    def known_activation(self, where: str = "config.json") -> Activation:
        """The activation.

        Raises:
            UnsupportedError: it is unknown, as the family is, and the configuration does not tell.
        """
        if self.activation is None:
            raise UnsupportedError(
                "activation unknown: this model family is not one halfbyte knows, and hidden_act does not tell",
                where=where,
                given=f"model_type {self.family!r}",
                needed=f"hidden_act {', '.join(ACTIVATIONS)} and no swiglu constants; or a known model_type: {', '.join(KNOWN_MODEL_TYPES)}",
            )
        return self.activation

    def check_layer(self, layer: int, where: str = "config.json") -> None:
        """Raise UnsupportedError where the experts of a layer compute something that `Activation` cannot say."""
        self._check_integer(layer)
        if layer in self.refused_layers:
            raise UnsupportedError(
                f"the experts of layer {layer} compute what halfbyte does not: {self.refused_layers[layer]}",
                where=where,
                given=f"model_type {self.family!r}",
                needed="an activation of halfbyte.Activation",
            )

    def _check_integer(self, layer: object) -> None:
        if not isinstance(layer, int):
            raise InputError("a layer is an integer", given=repr(layer), needed=f"one of the MoE layers {format_range(self.expert_layers)}")

    def block_of(self, layer: int) -> str:
        """The module name of one MoE layer.

        Raises:
            CheckpointError: the layer does not exist or has no routed experts.
        """
        self._check_integer(layer)
        if layer not in self.expert_layers:
            problem = f"layer {layer} has no routed experts" if 0 <= layer < self.num_layers else f"there is no layer {layer}"
            raise CheckpointError(problem, given=layer, needed=f"one of the MoE layers {format_range(self.expert_layers)}")
        return self.block.format(layer=layer)


def describe_moe(config: Mapping[str, Any], found: Found, *, where: str = "config.json") -> MoEConfig:
    """Read the MoE geometry and routing from the config.json of a known family; `found`: what `find_experts` found among its tensors.

    Raises:
        UnsupportedError: an unknown model_type, activation or scoring function.
        CheckpointError: a missing configuration value, or no expert tensors.
    """
    values = Config(config, where)
    module = _family_of(values.model_type, where)
    model = module.MODEL_TYPES[values.model_type]
    values = values.with_defaults(_defaults(values, model))
    family = module.describe(values, model)
    block = only_block(found, where)
    behind = range(values.num_layers, values.num_layers + values.num_predicting)
    num_experts, top_k = values.everywhere(*NUM_EXPERTS), family.router.top_k
    if top_k > num_experts:
        problem = "more experts per token than there are"
        raise CheckpointError(problem, where=where, given=f"num_experts_per_tok {top_k}", needed=f"1 to {num_experts}")
    return MoEConfig(
        family=values.model_type,
        num_layers=values.num_layers,
        moe_layers=moe_layers(values, model.layers),
        num_experts=num_experts,
        hidden=family.hidden or values.value("hidden_size", "d_model"),
        intermediate=values.everywhere("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size"),
        routing=family.router.rule,
        activation=family.activation or values.activation_of(model.activation),
        block=block,
        interleaved=family.interleaved,
        biased=family.biased,
        router_refusal=family.router.refusal,
        known_top_k=top_k,
        refused_layers=family.refused_layers,
        predicting_layers=tuple(layer for layer in behind if layer in found[block]),
        corrected=family.router.corrected,
        hashed_layers=family.router.hashed_layers,
    )


def _defaults(config: Config, model: Model) -> dict[str, Any]:
    """What stands in for values that are absent or null. A null for whether weights are renormalised is no: transformers tests it, as engines do."""
    section = config.section(model.section).values
    values = {**model.defaults, **{key: value for key, value in section.items() if value is not None}}
    key = model.renormalised
    if isinstance(key, str) and {**config.values, **section}.get(key, ...) is None:
        values[key] = type(model.defaults.get(key, True))(0)
    return values


def is_known(config: Mapping[str, Any], where: str = "config.json") -> bool:
    """Whether `describe_moe` knows the family of a config.json."""
    return Config(config, where).model_type in _FAMILY_OF


def tensor_names(model_type: str) -> TensorNames:
    """What a known family calls its tensors; UnsupportedError for another."""
    return _family_of(model_type, "config.json").MODEL_TYPES[model_type].names


def _family_of(model_type: str, where: str) -> _FamilyModule:
    if model_type not in _FAMILY_OF:
        raise UnsupportedError("unknown model family", where=where, given=f"model_type {model_type!r}", needed=", ".join(KNOWN_MODEL_TYPES))
    return _FAMILY_OF[model_type]


def find_experts(names: Iterable[str]) -> Found:
    """The tensors of experts. A multi-token-prediction head (mtp.layers.0...) is no layer of the model.

    >>> find_experts(["model.layers.3.mlp.experts.0.up_proj.weight", "mtp.layers.0.mlp.experts.0.up_proj.weight"])
    {'model.layers.{layer}.mlp': {3: ['model.layers.3.mlp.experts.0.up_proj.weight']}}
    """
    found: Found = {}
    for name in names:
        if place := place_of(name):
            found.setdefault(place.block, {}).setdefault(place.layer, []).append(name)
    return found


def first_of_experts(names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first of these tensors of a layer that really is one of experts: Kimi-Linear calls a dense MLP, too, after the mixture of experts."""
    return next((name for name in names if ".experts." in name or len(shapes[name]) > 2), None)


def only_block(found: Found, where: str) -> str:
    """The only place, or CheckpointError with a tensor of each."""
    if len(found) != 1:
        given = ", ".join(sorted(min(map(min, layers.values())) for layers in found.values())) or "none"
        raise CheckpointError("no single place of expert tensors", where=where, given=given, needed="tensors layers.N.*.experts.* in one place")
    return next(iter(found))


def format_range(numbers: Iterable[int]) -> str:
    """Write sorted integers with runs abbreviated.

    >>> format_range([0, 1, 2, 3, 5])
    '0..3, 5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last in runs) or "(none)"
