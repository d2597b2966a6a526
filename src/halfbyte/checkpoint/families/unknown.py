"""A model of a family that halfbyte does not know: what the names and shapes of its tensors decide, and nothing else.

Sizes and layers follow from the tensors, the activation from hidden_act where nothing modifies it. How tokens are routed is not in the tensors, nor
whether stacked gate and up rows alternate where they come as gpt-oss stores them, with biases or in blocks. Such experts are refused, and those
with tensors that a known family would have to explain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from halfbyte.checkpoint.dialects import GPT_OSS, MATRIX_SUFFIXES
from halfbyte.checkpoint.families import KNOWN_MODEL_TYPES, MoEConfig, find_blocks, format_range, only_block
from halfbyte.checkpoint.families.description import ACTIVATIONS, Config
from halfbyte.checkpoint.projections import DOWN, GATE, PROJECTIONS, STACKED, find_leaves, stacked_sizes
from halfbyte.checkpoint.quantization import Quantization
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.experts import Activation

Shapes = Mapping[str, tuple[int, ...]]
Parts = dict[str, set[int]]  # what follows the number of an expert in the names of its tensors: of which experts; no number where stacked
_KNOWN_FAMILIES = f"a known family: {', '.join(KNOWN_MODEL_TYPES)}"


def describe_unknown(config: Mapping[str, Any], shapes: Shapes, quantization: Quantization, *, where: str = "config.json") -> MoEConfig:
    """The MoE layers of a model from the shapes of its tensors by name; routing, and perhaps activation, are None.

    Raises:
        UnsupportedError: no experts that can be found by name, layers that differ in size, stacked experts as gpt-oss stores them.
        CheckpointError: experts in several places, missing ones, shapes that do not belong together.
    """
    values = Config(config, where)
    blocks = find_blocks(shapes)
    if not blocks:
        raise UnsupportedError(
            "unknown model family, and no experts that can be found by name",
            where=where,
            given=f"model_type {values.model_type!r}",
            needed=f"tensors layers.N.*.experts.*, or {_KNOWN_FAMILIES}",
        )
    block = only_block(blocks, where)
    num_layers, parts_of = _find_layers(shapes, block, values.num_layers if "num_hidden_layers" in values else None)
    sizes_of = {layer: _measure(shapes, f"{block.format(layer=layer)}.experts", parts, quantization, where) for layer, parts in parts_of.items()}
    first = next(iter(sizes_of))
    for layer, sizes in sizes_of.items():
        if sizes != sizes_of[first]:
            raise UnsupportedError(
                f"layer {layer} has experts of another number or size than layer {first}",
                where=where,
                given=f"(experts, hidden, intermediate) {sizes}",
                needed=sizes_of[first],
            )
    num_experts, hidden, intermediate = sizes_of[first]
    return MoEConfig(
        family=values.model_type,
        num_layers=num_layers,
        moe_layers=tuple(parts_of),
        num_experts=num_experts,
        hidden=hidden,
        intermediate=intermediate,
        routing=None,
        activation=_find_activation(values),
        block=block,
    )


def _find_layers(shapes: Shapes, block: str, declared: int | None) -> tuple[int, dict[int, Parts]]:
    """The number of layers; and the tensors of the experts by layer, in order.

    Layers behind the `declared` number predict further tokens, where there are experts before it.
    """
    before, _, after = map(re.escape, block.partition("{layer}"))
    in_layer, in_experts = re.compile(rf"{before}(\d+)\."), re.compile(rf"{before}(\d+){after}\.experts\.(?:(\d+)\.)?(.+)")
    num_layers, found = 0, dict[int, Parts]()
    for name in shapes:
        if match := in_layer.match(name):
            num_layers = max(num_layers, 1 + int(match[1]))
        if match := in_experts.match(name):
            ids = found.setdefault(int(match[1]), {}).setdefault(match[3], set())
            if match[2] is not None:
                ids.add(int(match[2]))
    if declared is not None and min(found) < declared:
        num_layers = min(num_layers, declared)
    return num_layers, {layer: found[layer] for layer in sorted(found) if layer < num_layers}


def _measure(shapes: Shapes, experts: str, parts: Parts, quantization: Quantization, where: str) -> tuple[int, int, int]:
    """Number, hidden and intermediate size of the experts in the module `experts`."""
    stacked = {projection: f"{experts}.{STACKED[projection]}" for projection in (GATE, DOWN)}
    for suffix in (GPT_OSS.codes, GPT_OSS.bias):
        if stacked[GATE] + suffix in shapes:
            raise UnsupportedError(
                f"stacked experts whose gate and up rows may alternate, which nothing tells in an unknown family: {stacked[GATE]}{suffix}",
                where=where,
                needed=f"one tensor per matrix, or {_KNOWN_FAMILIES}",
            )
    if stacked[GATE] in shapes:
        _check_parts(experts, parts, set(STACKED.values()), where)
        gate_up, down = shapes[stacked[GATE]], shapes.get(stacked[DOWN], ())
        sizes = stacked_sizes(gate_up, down)
        if sizes is None:
            raise CheckpointError(
                "stacked experts do not belong together",
                where=f"{where}, {experts}",
                given=f"gate_up {gate_up}, down {down}",
                needed="[E, 2I, H] and [E, H, I]",
            )
        return sizes.num_experts, sizes.hidden, sizes.intermediate
    leaves = find_leaves(shapes, experts).values()
    _check_parts(experts, parts, {leaf + suffix for leaf in leaves for suffix in MATRIX_SUFFIXES}, where)
    gate, up, down = (_matrix_shape(shapes, f"{experts}.0.{leaf}", quantization, where) for leaf in leaves)
    if gate != up or down != gate[::-1]:
        given = f"gate {gate}, up {up}, down {down}"
        raise CheckpointError("matrices do not belong together", where=f"{where}, {experts}.0", given=given, needed="[I, H], [I, H] and [H, I]")
    ids = set[int]().union(*parts.values())
    if ids != set(range(len(ids))):
        raise CheckpointError("missing experts", where=f"{where}, {experts}", given=format_range(sorted(ids)), needed="all from 0 on")
    return len(ids), gate[1], gate[0]


def _check_parts(experts: str, parts: Parts, known: set[str], where: str) -> None:
    """Biases, norms and the like change what experts compute, and nothing says how."""
    unknown = sorted(parts.keys() - known)
    if unknown:
        raise UnsupportedError(
            "experts with tensors that nothing explains in an unknown family",
            where=where,
            given=f"{experts}.*.{unknown[0]}" if parts[unknown[0]] else f"{experts}.{unknown[0]}",
            needed=f"gate, up and down alone, or {_KNOWN_FAMILIES}",
        )


def _matrix_shape(shapes: Shapes, module: str, quantization: Quantization, where: str) -> tuple[int, int]:
    """Rows and columns of the matrix in `module`."""
    dialect = quantization.dialect_of(module)
    name = module + dialect.codes
    if len(shapes.get(name, ())) != 2:
        raise UnsupportedError(
            f"experts of an unknown family that lack a matrix: {name}",
            where=where,
            given=shapes.get(name, "no such tensor"),
            needed=f"one for each of {', '.join(PROJECTIONS)}, or {_KNOWN_FAMILIES}",
        )
    rows, *stored = shapes[name]
    return rows, dialect.columns(*stored)


def _find_activation(values: Config) -> Activation | None:
    """What hidden_act says; None where that is nothing known, or the configuration has constants that change it."""
    return None if values.mentions("swiglu") else ACTIVATIONS.get(values.get("hidden_act", ""))
