"""Which layers of a model have routed experts, by what its configuration says. `mlp_layer_types` goes before every rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from halfbyte.checkpoint.families.description import Config, LayerRule
from halfbyte.errors import CheckpointError

Layers = Sequence[int]


def moe_layers(config: Config, rule: LayerRule) -> tuple[int, ...]:
    """The layers with routed experts.

    Raises:
        CheckpointError: a list that lacks layers.

    >>> moe_layers(Config({"num_hidden_layers": 4, "first_k_dense_replace": 1}, ""), "first dense")
    (1, 2, 3)
    """
    layers = range(config.num_layers)
    kinds = config.get("mlp_layer_types")
    if kinds:
        _check_length(config, "mlp_layer_types", kinds, layers)
        return tuple(layer for layer in layers if kinds[layer] != "dense")
    return tuple(layer for layer in RULES[rule](config, layers) if layer in layers)


def _first_dense(config: Config, layers: Layers) -> Layers:
    """Dense up to `first_k_dense_replace`, then every `moe_layer_freq`-th, which may also be a list with 0 or 1 for every layer."""
    frequency = config.get("moe_layer_freq", 1)
    if isinstance(frequency, list):
        _check_length(config, "moe_layer_freq", frequency, layers)
        return [layer for layer in layers if frequency[layer]]
    first = config.get("first_k_dense_replace", 0)
    return [layer for layer in layers if layer >= first and layer % frequency == 0]


def _sparse_step(config: Config, layers: Layers) -> Layers:
    dense, step = config.get("mlp_only_layers", ()), config.get("decoder_sparse_step") or 1
    return [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]


def _dense_layers(config: Config, layers: Layers) -> Layers:
    return layers[config.get("num_dense_layers", 0) :]


def _span(config: Config, layers: Layers) -> Layers:
    first, last, step = config.get("moe_layer_start_index", 0), config.get("moe_layer_end_index", -1), config.get("moe_layer_interval", 1)
    return [layer for layer in layers if first <= layer <= (last if last >= 0 else len(layers)) and (layer + 1) % step == 0]


def _period(config: Config, layers: Layers) -> Layers:
    period, offset = config.get("expert_layer_period", 1), config.get("expert_layer_offset", 0)
    return [layer for layer in layers if layer % period == offset]


def _interleaved(config: Config, layers: Layers) -> Layers:
    step = config.get("interleave_moe_layer_step", 1)
    return config.get("moe_layers") or layers[step - 1 :: step]


def _pattern(config: Config, layers: Layers) -> Layers:
    """A list of layer kinds, or a string with a letter each: E has experts."""
    kinds = config.get("layers_block_type") or config.get("layer_types") or list(config.value("hybrid_override_pattern"))
    _check_length(config, "layers_block_type", kinds, layers)
    return [layer for layer in layers if kinds[layer] in ("moe", "E")]


def _enumerated(config: Config, layers: Layers) -> Layers:
    """`moe_layers_enum`: a list, or a string with commas; all but the first three layers where it is absent."""
    listed = config.get("moe_layers_enum")
    if listed is None:
        return layers[3:]
    return [int(item) for item in (listed.split(",") if isinstance(listed, str) else listed) if str(item).strip()]


def _check_length(config: Config, key: str, of_layers: Sequence[object], layers: Layers) -> None:
    """A list may go on behind the layers, for heads that predict further tokens."""
    if len(of_layers) < len(layers):
        raise CheckpointError("a list lacks layers", where=config.where, given=f"{key} of {len(of_layers)}", needed=f"{len(layers)} layers")


RULES: dict[LayerRule, Callable[[Config, Layers], Layers]] = {
    "all": lambda config, layers: layers,
    "first dense": _first_dense,
    "sparse step": _sparse_step,
    "dense layers": _dense_layers,
    "span": _span,
    "period": _period,
    "interleaved": _interleaved,
    "pattern": _pattern,
    "enumerated": _enumerated,
}
