"""Which layers of a model have routed experts, by what its configuration says. `mlp_layer_types` goes before every rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from halfbyte.checkpoint.families.description import Config, LayerRule

Layers = Sequence[int]


def moe_layers(config: Config, rule: LayerRule) -> tuple[int, ...]:
    """The layers with routed experts.

    Raises:
        CheckpointError: a list that lacks layers.

    >>> moe_layers(Config({"num_hidden_layers": 4, "first_k_dense_replace": 1}, ""), "first dense")
    (1, 2, 3)
    """
    layers = range(config.num_layers)
    if kinds := config.words("mlp_layer_types"):
        _check_length(config, "mlp_layer_types", kinds, layers)
        return tuple(layer for layer in layers if kinds[layer] != "dense")
    return tuple(layer for layer in RULES[rule](config, layers) if layer in layers)


def _check_length(config: Config, key: str, values: Sequence[object], layers: Layers) -> None:
    """Raise CheckpointError where a list or a string of layers ends before they do; it may go on, for heads that predict further tokens."""
    if len(values) < len(layers):
        raise config.misfit(key, f"one entry for each of {len(layers)} layers")


def _first_dense(config: Config, layers: Layers) -> Layers:
    """Dense up to `first_k_dense_replace`, then every `moe_layer_freq`-th, which may also be a list with 0 or 1 for every layer."""
    if isinstance(config.values.get("moe_layer_freq"), list):
        of_layer = config.integers("moe_layer_freq")
        _check_length(config, "moe_layer_freq", of_layer, layers)
        return [layer for layer in layers if of_layer[layer]]
    first, frequency = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1, low=1)
    return [layer for layer in layers if layer >= first and layer % frequency == 0]


def _sparse_step(config: Config, layers: Layers) -> Layers:
    dense, step = frozenset(config.integers("mlp_only_layers")), config.get("decoder_sparse_step", 1, low=1)
    return [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]


def _dense_layers(config: Config, layers: Layers) -> Layers:
    return layers[config.get("num_dense_layers", 0) :]


def _span(config: Config, layers: Layers) -> Layers:
    first, last = config.get("moe_layer_start_index", 0), config.get("moe_layer_end_index", -1, low=-1)
    step = config.get("moe_layer_interval", 1, low=1)
    return [layer for layer in layers if first <= layer <= (last if last >= 0 else len(layers)) and (layer + 1) % step == 0]


def _period(config: Config, layers: Layers) -> Layers:
    period, offset = config.get("expert_layer_period", 1, low=1), config.get("expert_layer_offset", 0)
    return [layer for layer in layers if layer % period == offset]


def _interleaved(config: Config, layers: Layers) -> Layers:
    step = config.get("interleave_moe_layer_step", 1, low=1)
    return config.integers("moe_layers") or layers[step - 1 :: step]


def _pattern(config: Config, layers: Layers) -> Layers:
    """A list of layer kinds, or a string with a letter each: E has experts."""
    key = next((key for key in ("layers_block_type", "layer_types") if config.words(key)), "hybrid_override_pattern")
    kinds = config.get(key, "") if key == "hybrid_override_pattern" else config.words(key)
    _check_length(config, key, kinds, layers)
    return [layer for layer in layers if kinds[layer] in ("moe", "E")]


def _enumerated(config: Config, layers: Layers) -> Layers:
    """`moe_layers_enum`: a list, or a string with commas; all but the first three layers where it is absent."""
    if "moe_layers_enum" not in config:
        return layers[3:] or layers  # a model of experts has some
    if not isinstance(config.values["moe_layers_enum"], str):
        return config.integers("moe_layers_enum")
    listed = [item.strip() for item in config.get("moe_layers_enum", "").split(",") if item.strip()]
    if not all(item.isdecimal() and len(item) < 10 for item in listed):
        raise config.misfit("moe_layers_enum", "integers with commas between them")
    return [int(item) for item in listed]


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
