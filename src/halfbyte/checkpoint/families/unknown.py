"""A model of a family that halfbyte does not know: what the names and shapes of its tensors decide, and nothing else.

Sizes and layers follow from the tensors, the activation from hidden_act where nothing modifies it. How tokens are routed is not in the tensors, nor
whether stacked gate and up rows alternate where they come as gpt-oss stores them, with biases or in blocks. Such experts are refused, and those
with tensors that a known family would have to explain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.checkpoint.dialects import GPT_OSS, MATRIX_SUFFIXES, STACKED_FORM
from halfbyte.checkpoint.families import KNOWN_MODEL_TYPES, Found, MoEConfig, first_of_experts, format_range, only_block
from halfbyte.checkpoint.families.description import ACTIVATIONS, Config
from halfbyte.checkpoint.projections import DOWN, GATE, UP, Layout, Projection, expert_digits, find_layout, stacked_sizes
from halfbyte.checkpoint.quantization import Quantization
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.experts import Activation

Shapes = Mapping[str, tuple[int, ...]]
Parts = set[str]  # names of tensors below the MoE module
_KNOWN_FAMILIES = f"a known family: {', '.join(KNOWN_MODEL_TYPES)}"


def describe_unknown(config: Mapping[str, Any], found: Found, shapes: Shapes, quantization: Quantization, *, where: str = "config.json") -> MoEConfig:
    """The MoE layers of a model from the shapes of its tensors by name, and what `find_experts` found; routing, and perhaps activation, are None.

    Raises:
        UnsupportedError: no experts that can be found by name, layers that differ in size, stacked experts as gpt-oss stores them.
        CheckpointError: experts in several places, missing ones, another number than config.json gives, shapes that do not belong together.
    """
    values = Config(config, where)
    if not found:
        raise UnsupportedError(
            "unknown model family, and no experts that can be found by name",
            where=where,
            given=f"model_type {values.model_type!r}",
            needed=f"tensors layers.N.*.experts.*, or {_KNOWN_FAMILIES}",
        )
    block = only_block(found, where)
    num_layers, parts_of = _find_layers(shapes, found, block, values.num_layers if "num_hidden_layers" in values else None)
    activation = _find_activation(values)
    gated = activation is None or activation.gated
    sizes_of = {layer: _measure(shapes, block.format(layer=layer), parts, gated, quantization, where) for layer, parts in parts_of.items()}
    first = next(iter(sizes_of))
    last_of = {layer: _last(names, block.format(layer=layer)) for layer, names in found[block].items()}
    for layer, sizes in sizes_of.items():
        if sizes != sizes_of[first]:
            raise UnsupportedError(
                f"layer {layer} has experts of another number or size than layer {first}",
                where=where,
                given=f"(experts, hidden, intermediate) {sizes}, up to {last_of[layer]}",
                needed=sizes_of[first],
            )
    num_experts, hidden, intermediate = sizes_of[first]
    values.check_num_experts(num_experts, last_of[first])
    return MoEConfig(
        family=values.model_type,
        num_layers=num_layers,
        moe_layers=tuple(layer for layer in parts_of if layer < num_layers),
        num_experts=num_experts,
        hidden=hidden,
        intermediate=intermediate,
        routing=None,
        activation=activation,
        block=block,
        predicting_layers=tuple(layer for layer in parts_of if layer >= num_layers),
    )


def _find_layers(shapes: Shapes, found: Found, block: str, declared: int | None) -> tuple[int, dict[int, Parts]]:
    """The number of layers; and the tensors of the experts by layer, in order, named below the MoE module.

    Layers behind the `declared` number predict further tokens, where there are experts before it.
    """
    in_layer = re.compile(re.escape(block.partition("{layer}")[0]) + r"(\d+)\.")
    num_layers = max(1 + int(match[1]) for name in shapes if (match := in_layer.match(name)))
    layers = sorted(layer for layer, names in found[block].items() if first_of_experts(names, shapes)) or sorted(found[block])
    if declared is not None and layers[0] < declared:
        num_layers = min(num_layers, declared)
    below = {layer: f"{block.format(layer=layer)}." for layer in layers}
    return num_layers, {layer: {name.removeprefix(prefix) for name in found[block][layer]} for layer, prefix in below.items()}


def _measure(shapes: Shapes, block: str, parts: Parts, gated: bool, quantization: Quantization, where: str) -> tuple[int, int, int]:
    """Number, hidden and intermediate size of the experts in the MoE module `block`."""
    for suffix in (GPT_OSS.codes, GPT_OSS.bias):
        name = f"{block}.experts.gate_up_proj{suffix}"
        if name in shapes:
            raise UnsupportedError(
                f"stacked experts whose gate and up rows may alternate, which nothing tells in an unknown family: {name}",
                where=where,
                needed=f"one tensor per matrix, or {_KNOWN_FAMILIES}",
            )
    layout = find_layout(shapes, block, gated=gated)
    modules = {projection: f"{block}.{layout.module(0, projection)}" for projection in layout.projections}
    if layout.stacked:
        return _measure_stacked(shapes, modules, layout, parts, quantization, where)
    leaf_of = re.compile(re.escape(layout.pattern).replace(r"\{expert\}", r"(\d+)").replace(r"\{leaf\}", rf"(?:{'|'.join(layout.leaves.values())})"))
    ids = {int(match[1]) for part in parts if (match := leaf_of.match(part))}
    _check_parts(block, parts, {layout.module(expert, part) for expert in ids for part in layout.projections}, where)
    names = {projection: module + quantization.dialect_of(module).codes for projection, module in modules.items()}
    _check_present(shapes, names, block, parts, where)
    matrices = {projection: _matrix_shape(shapes[name], modules[projection], quantization) for projection, name in names.items()}
    up, down = matrices[UP], matrices[DOWN]
    if matrices.get(GATE, up) != up or down != up[::-1]:
        given = ", ".join(f"{names[projection]} {shape}" for projection, shape in matrices.items())
        raise CheckpointError("matrices do not belong together", where=where, given=given, needed="[I, H] of gate and up, [H, I] of down")
    if ids != set(range(len(ids))):
        given = f"{format_range(sorted(ids))}, up to {_last([f'{block}.{part}' for part in parts], block)}"
        raise CheckpointError("missing experts", where=where, given=given, needed="all from 0 on")
    return len(ids), up[1], up[0]


def _measure_stacked(
    shapes: Shapes, modules: Mapping[Projection, str], layout: Layout, parts: Parts, quantization: Quantization, where: str
) -> tuple[int, int, int]:
    """The same of stacked experts; `modules` are the names of their matrices."""
    dialect = quantization.dialect_of(modules[DOWN])
    if modules[DOWN] + dialect.codes not in shapes:
        dialect = STACKED_FORM.get(dialect, dialect)
    block = modules[DOWN].removesuffix(f".{layout.module(0, DOWN)}")
    _check_parts(block, parts, {layout.module(0, part) for part in layout.projections}, where)
    names = {projection: module + dialect.codes for projection, module in modules.items()}
    up, down = (shapes.get(names[projection], ()) for projection in (UP, DOWN))
    sizes = stacked_sizes(up, down, halves=2 if layout.fused else 1, packed=1 if dialect.format is None else 2)
    if sizes is None:
        raise CheckpointError(
            "stacked experts do not belong together",
            where=where,
            given=", ".join(f"{name} {shapes.get(name, 'missing')}" for name in dict.fromkeys(names.values())),
            needed="[E, 2I, H] of gate and up, [E, H, I] of down",
        )
    return sizes.num_experts, sizes.hidden, sizes.intermediate


def _check_parts(block: str, parts: Parts, known: set[str], where: str) -> None:
    """Biases, norms and the like change what experts compute, and nothing says how. `known` are the matrices, below `block`."""
    suffixes = ("", *MATRIX_SUFFIXES)
    unknown = sorted(part for part in parts if not any(part.removesuffix(suffix) in known for suffix in suffixes))
    if unknown:
        raise UnsupportedError(
            "experts with tensors that nothing explains in an unknown family",
            where=where,
            given=f"{block}.{unknown[0]}",
            needed=f"gate, up and down alone, or {_KNOWN_FAMILIES}",
        )


def _check_present(shapes: Shapes, names: Mapping[Projection, str], block: str, parts: Parts, where: str) -> None:
    """Each of these matrices is there, and has two dimensions."""
    for name in names.values():
        if len(shapes.get(name, ())) != 2:
            raise UnsupportedError(
                f"experts of an unknown family that lack a matrix: {name}",
                where=where,
                given=shapes.get(name, f"{len(parts)} tensors in this layer, {block}.{min(parts)} among them"),
                needed=f"one for each of gate, up and down, or {_KNOWN_FAMILIES}",
            )


def _matrix_shape(stored: tuple[int, ...], module: str, quantization: Quantization) -> tuple[int, int]:
    """Rows and columns of the matrix in `module`, whose codes have the shape `stored`."""
    return stored[0], quantization.dialect_of(module).columns(*stored[1:])


def _last(names: Sequence[str], block: str) -> str:
    """The tensor with the highest number of an expert, where they have numbers."""
    return max(names, key=lambda name: int(expert_digits(name, len(block)) or -1))


def _find_activation(values: Config) -> Activation | None:
    """What hidden_act says; None where that is nothing known, or the configuration has constants that change it."""
    return None if values.mentions("swiglu") else ACTIVATIONS.get(values.get("hidden_act", ""))
