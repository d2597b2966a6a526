"""Model families: from config.json and tensor names to one `MoEConfig`. Each family is one file of this folder, listed in `FAMILIES`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from halfbyte.checkpoint.families import deepseek_v3, deepseek_v4, gpt_oss, mixtral, qwen
from halfbyte.checkpoint.families.description import ACTIVATIONS, Config, Family, RoutingRule, TensorNames
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.experts import Activation

__all__ = [
    "FAMILIES",
    "KNOWN_MODEL_TYPES",
    "MoEConfig",
    "RoutingRule",
    "describe_moe",
    "find_blocks",
    "format_range",
    "is_known",
    "only_block",
    "tensor_names",
]


class _FamilyModule(Protocol):
    @property
    def MODEL_TYPES(self) -> Mapping[str, TensorNames]: ...  # noqa: N802

    def describe(self, config: Config, /) -> Family: ...


FAMILIES: tuple[_FamilyModule, ...] = (qwen, mixtral, deepseek_v3, gpt_oss, deepseek_v4)
_FAMILY_OF = {model_type: family for family in FAMILIES for model_type in family.MODEL_TYPES}
KNOWN_MODEL_TYPES = tuple(_FAMILY_OF)
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # the keys that may say it, the first goes first
_EXPERTS = re.compile(r"^((?:.*\.)?layers)\.\d+((?:\.\w+)*?)\.experts\.")


@dataclass(frozen=True)
class MoEConfig:
    """The MoE layers of a model, whatever its family calls things.

    Attributes:
        family: model_type of config.json.
        num_layers: decoder layers; moe_layers: indices of those with routed experts.
        num_experts, hidden, intermediate: E, H and the I of one routed expert.
        routing, activation: what `route` and the experts compute; None where only a family that halfbyte does not know could tell.
        block: name of a layer's MoE module, `{layer}` left open: "model.layers.{layer}.mlp".
        interleaved: stacked gate and up rows alternate (gpt-oss).
        biased: every matrix has a bias.
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

    @property
    def top_k(self) -> int:
        """Experts of a token; errors as `known_routing`."""
        return self.known_routing().top_k

    def known_routing(self, where: str = "config.json") -> RoutingRule:
        """The routing.

        Raises:
            UnsupportedError: it is unknown, as the family is.
        """
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

    def block_of(self, layer: int) -> str:
        """The module name of one MoE layer.

        Raises:
            CheckpointError: the layer does not exist or has no routed experts.
        """
        if layer not in self.moe_layers:
            problem = f"layer {layer} has no routed experts" if 0 <= layer < self.num_layers else f"there is no layer {layer}"
            raise CheckpointError(problem, given=layer, needed=f"one of the MoE layers {format_range(self.moe_layers)}")
        return self.block.format(layer=layer)


def describe_moe(config: Mapping[str, Any], names: Iterable[str], *, where: str = "config.json") -> MoEConfig:
    """Read the MoE geometry and routing from the config.json of a known family, and find the experts among the tensor `names`.

    Raises:
        UnsupportedError: an unknown model_type, activation or scoring function.
        CheckpointError: a missing configuration value, or no expert tensors.
    """
    values = Config(config, where)
    family = _family_of(values.model_type, where).describe(values)
    layers = range(values.num_layers)
    moe_layers = tuple(layers) if family.moe_layers is None else family.moe_layers
    if kinds := values.words("mlp_layer_types"):
        if len(kinds) < len(layers):
            raise values.misfit("mlp_layer_types", f"one string for each of {len(layers)} layers")
        moe_layers = tuple(layer for layer in layers if kinds[layer] != "dense")
    num_experts = values.value(*NUM_EXPERTS)
    if not 1 <= family.routing.top_k <= num_experts:
        problem = "more experts per token than there are"
        raise CheckpointError(problem, where=where, given=f"num_experts_per_tok {family.routing.top_k}", needed=f"1 to {num_experts}")
    return MoEConfig(
        family=values.model_type,
        num_layers=values.num_layers,
        moe_layers=moe_layers,
        num_experts=num_experts,
        hidden=values.value("hidden_size"),
        intermediate=values.value("moe_intermediate_size", "intermediate_size"),
        routing=family.routing,
        activation=family.activation or values.activation,
        block=only_block(find_blocks(names), where),
        interleaved=family.interleaved,
        biased=family.biased,
    )


def is_known(config: Mapping[str, Any], where: str = "config.json") -> bool:
    """Whether `describe_moe` knows the family of a config.json."""
    return Config(config, where).model_type in _FAMILY_OF


def tensor_names(model_type: str) -> TensorNames:
    """What a known family calls its tensors; UnsupportedError for another."""
    return _family_of(model_type, "config.json").MODEL_TYPES[model_type]


def _family_of(model_type: str, where: str) -> _FamilyModule:
    if model_type not in _FAMILY_OF:
        raise UnsupportedError("unknown model family", where=where, given=f"model_type {model_type!r}", needed=", ".join(KNOWN_MODEL_TYPES))
    return _FAMILY_OF[model_type]


def find_blocks(names: Iterable[str]) -> list[str]:
    """The places where layers have experts, `{layer}` left open. A multi-token-prediction head (mtp.layers.0...) is no layer of the model.

    >>> find_blocks(["model.layers.3.mlp.experts.0.up_proj.weight", "mtp.layers.0.mlp.experts.0.up_proj.weight"])
    ['model.layers.{layer}.mlp']
    """
    found = {match.groups() for name in names if not name.startswith("mtp.") and (match := _EXPERTS.match(name))}
    return sorted(f"{layers}.{{layer}}{block}" for layers, block in found)


def only_block(blocks: list[str], where: str) -> str:
    """The only one, or CheckpointError."""
    if len(blocks) != 1:
        given = ", ".join(block.format(layer="N") for block in blocks) or "none"
        raise CheckpointError("no single place of expert tensors", where=where, given=given, needed="tensors layers.N.*.experts.* in one place")
    return blocks[0]


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
