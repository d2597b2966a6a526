"""What models call the three matrices of an expert, and what engines fuse: the names that decide a tensor's part, whatever the family.

One by one   {block}.experts.{expert}.{leaf}   [I, H] of gate and up, [H, I] of down
stacked      {block}.experts.{name}            [E, 2I, H] of gate and up, [E, H, I] of down, or both transposed

`LAYOUTS` has every such pattern. A name here is that of a module. What follows it says how the matrix is encoded: see `checkpoint.dialects`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from halfbyte.checkpoint.dialects import DIALECTS

Projection = Literal["gate", "up", "down"]
GATE: Projection = "gate"
UP: Projection = "up"
DOWN: Projection = "down"
PROJECTIONS: tuple[Projection, ...] = (GATE, UP, DOWN)


@dataclass(frozen=True)
class Layout:
    """Where the matrices of the experts of a layer lie.

    Attributes:
        pattern: the module of a matrix below the MoE module, with `{leaf}` and, where every expert has its own, `{expert}`.
        leaves: what each projection is called; gate and up may be one; without gate where the experts have none.
        flat: stacked without a dimension of its own, down transposed: [E * I, H] for all three.
        written: names of single matrices that `quantize` makes of stacked ones.
    """

    pattern: str
    leaves: Mapping[Projection, str]
    flat: bool = False
    written: str = "experts.{expert}.{leaf}"

    @property
    def stacked(self) -> bool:
        return "{expert}" not in self.pattern

    @property
    def fused(self) -> bool:
        """Gate and up are one matrix."""
        return self.leaves.get(GATE) == self.leaves[UP]

    @property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(self.leaves)

    def module(self, expert: int, projection: Projection) -> str:
        """The name of a matrix below the MoE module.

        >>> LAYOUTS[0].module(3, UP), GATE_UP.module(3, UP)
        ('experts.3.up_proj', 'experts.gate_up_proj')
        """
        return self.pattern.format(expert=expert, leaf=self.leaves[projection])


_PROJ: dict[Projection, str] = {GATE: "gate_proj", UP: "up_proj", DOWN: "down_proj"}
_NUMBERED: dict[Projection, str] = {GATE: "w1", UP: "w3", DOWN: "w2"}
_WITHOUT_GATE: dict[Projection, str] = {UP: "up_proj", DOWN: "down_proj"}
_GATE_UP: dict[Projection, str] = {GATE: "gate_up_proj", UP: "gate_up_proj", DOWN: "down_proj"}
GATE_UP = Layout("experts.{leaf}", _GATE_UP)
LAYOUTS = (
    Layout("experts.{expert}.{leaf}", _PROJ),
    Layout("experts.{expert}.{leaf}", _NUMBERED),
    Layout("experts.{expert}.{leaf}", _WITHOUT_GATE),
    Layout("experts.{leaf}.{expert}", _PROJ),  # Qwen3-VL-MoE as ModelOpt 0.43 takes it apart
    Layout("experts.mlp.{leaf}.{expert}", {GATE: "w1_linear", UP: "v1_linear", DOWN: "w2_linear"}),  # DBRX as ModelOpt takes it apart
    GATE_UP,
    Layout("experts.{leaf}", _PROJ),
    Layout("experts.{leaf}", _WITHOUT_GATE),
    Layout("{leaf}", {GATE: "input_linear", UP: "input_linear", DOWN: "output_linear"}),  # Granite
    Layout("{leaf}", _GATE_UP),  # Gemma 4
    Layout("{leaf}", _PROJ),  # Step-3.5
    Layout("experts.mlp.{leaf}", {GATE: "w1", UP: "v1", DOWN: "w2"}, flat=True, written="experts.mlp.{leaf}_linear.{expert}"),  # DBRX
)
LEAVES: tuple[dict[Projection, str], ...] = (_PROJ, _NUMBERED)
PROJECTION_OF: dict[str, Projection] = {leaf: projection for leaves in LEAVES for projection, leaf in leaves.items()}
STACKED: dict[Projection, str] = _GATE_UP

# A layer's experts in names: a module `experts`, or matrices right in a module that is called after its mixture of experts.
_IN_PLACE = sorted({leaf for layout in LAYOUTS if layout.pattern == "{leaf}" for leaf in layout.leaves.values()})
_OF_EXPERTS = re.compile(
    rf"^((?:.*\.)?(?:layers|blocks))\.(0|[1-9]\d{{0,8}})((?:\.\w+)*?)(?:\.experts\.|(?<=moe)\.(?:{'|'.join(_IN_PLACE)})(?:[._]|$))"
)


_NUMBER = re.compile(r"\.(\d+)(?:\.|$)")


class Place(NamedTuple):
    """Whose expert a tensor belongs to: the MoE module with `{layer}` left open, the layer, and the rest of the name below the MoE module."""

    block: str
    layer: int
    rest: str


def place_of(name: str) -> Place | None:
    """Where an expert's tensor lies; None for another. A multi-token-prediction head (mtp.layers.0...) is no layer of the model.

    >>> place_of("model.layers.3.mlp.experts.0.up_proj.weight")
    Place(block='model.layers.{layer}.mlp', layer=3, rest='experts.0.up_proj.weight')
    >>> place_of("model.layers.3.block_sparse_moe.input_linear.weight").block, place_of("mtp.layers.0.mlp.experts.0.up_proj.weight")
    ('model.layers.{layer}.block_sparse_moe', None)
    """
    match = _OF_EXPERTS.match(name)
    if not match or name.startswith("mtp.") or ".mtp." in name:
        return None
    layers, layer, block = match.groups()
    return Place(f"{layers}.{{layer}}{block}", int(layer), name[match.end(3) + 1 :])


def expert_digits(name: str, start: int) -> str | None:
    """The digits that stand for the expert in the name of a tensor, from `start` on; None where experts are stacked.

    >>> expert_digits("model.layers.3.mlp.experts.12.up_proj.weight", len("model.layers.3.mlp"))
    '12'
    """
    match = _NUMBER.search(name, start)
    return match and match[1]


# What vLLM and SGLang call a matrix that they fuse from several modules of a checkpoint. Several engines keep one global scale for it.
FUSED: dict[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "in_proj_qkvzba": ("in_proj_qkvz", "in_proj_ba"),
}


def fused_with(leaf: str) -> tuple[str, ...]:
    """The leaves that engines fuse with `leaf`, itself among them.

    >>> fused_with("v_proj"), fused_with("o_proj")
    (('q_proj', 'k_proj', 'v_proj'), ('o_proj',))
    """
    return next((parts for parts in FUSED.values() if leaf in parts), (leaf,))


_SUFFIXES = {stacked: tuple({dialect.codes for dialect in DIALECTS if stacked or not dialect.stacked}) for stacked in (False, True)}


def find_layout(names: Container[str], block: str, *, gated: bool = True) -> Layout:
    """How the experts of the MoE module `block` are stored; the usual layout where there are none.

    >>> find_layout({"mlp.experts.0.w2.weight"}, "mlp").leaves["gate"]
    'w1'
    """
    known = [layout for layout in LAYOUTS if (GATE in layout.leaves) == gated]
    return max(known, key=lambda layout: sum(_has_matrix(names, f"{block}.{layout.module(0, part)}", layout) for part in layout.projections))


def _has_matrix(names: Container[str], module: str, layout: Layout) -> bool:
    return any(module + suffix in names for suffix in _SUFFIXES[layout.stacked])


class StackedSizes(NamedTuple):
    """Sizes of stacked experts, and whether their matrices are transposed."""

    num_experts: int
    hidden: int
    intermediate: int
    transposed: bool


def stacked_sizes(gate_up: Sequence[int], down: Sequence[int], *, halves: int = 2, packed: int = 1) -> StackedSizes | None:
    """Sizes from the shapes of both stacked tensors; None where they do not belong together. One alone is ambiguous when 2I = H or I = H.

    Args:
        gate_up, down: the shapes.
        halves: matrices in the first tensor: gate and up, or 1 of them.
        packed: elements of a row that lie in one element of the tensor.

    >>> stacked_sizes([8, 32, 32], [8, 32, 16])
    StackedSizes(num_experts=8, hidden=32, intermediate=16, transposed=False)
    >>> stacked_sizes([8, 32, 32], [8, 16, 32]).transposed
    True
    """
    if len(gate_up) != 3 or len(down) != 3 or gate_up[0] != down[0]:
        return None
    for transposed in (False, True):
        (rows13, columns13), (rows2, columns2) = (shape[:0:-1] if transposed else shape[1:] for shape in (gate_up, down))
        if (rows13, packed * columns13) == (halves * packed * columns2, rows2):
            return StackedSizes(gate_up[0], rows2, packed * columns2, transposed)
    return None
