"""What models call the three matrices of an expert, and what engines fuse: the names that decide a tensor's part, whatever the family.

One by one   {experts}.{expert}.{leaf}   [I, H] of gate and up, [H, I] of down
stacked      {experts}.{name}            [E, 2I, H] of gate and up, [E, H, I] of down, or both transposed

A name here is that of a module. What follows it says how the matrix is encoded: see `checkpoint.dialects`.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Literal, NamedTuple

from halfbyte.checkpoint.dialects import DIALECTS

Projection = Literal["gate", "up", "down"]
GATE: Projection = "gate"
UP: Projection = "up"
DOWN: Projection = "down"
PROJECTIONS: tuple[Projection, ...] = (GATE, UP, DOWN)

LEAVES: tuple[dict[Projection, str], ...] = (
    {GATE: "gate_proj", UP: "up_proj", DOWN: "down_proj"},
    {GATE: "w1", UP: "w3", DOWN: "w2"},
)
PROJECTION_OF: dict[str, Projection] = {leaf: projection for leaves in LEAVES for projection, leaf in leaves.items()}
STACKED: dict[Projection, str] = {GATE: "gate_up_proj", UP: "gate_up_proj", DOWN: "down_proj"}

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


def find_leaves(names: Container[str], experts: str) -> dict[Projection, str]:
    """What the projections are called in the module `experts` of a checkpoint, where they lie one by one; the usual names where they do not.

    >>> find_leaves({"mlp.experts.0.w2.weight"}, "mlp.experts")["gate"]
    'w1'
    """
    suffixes = {dialect.codes for dialect in DIALECTS if not dialect.stacked}
    for leaves in LEAVES:
        if any(f"{experts}.0.{leaf}{suffix}" in names for leaf in leaves.values() for suffix in suffixes):
            return leaves
    return LEAVES[0]


class StackedSizes(NamedTuple):
    """Sizes of stacked experts, and whether their matrices are transposed."""

    num_experts: int
    hidden: int
    intermediate: int
    transposed: bool


def stacked_sizes(gate_up: Sequence[int], down: Sequence[int]) -> StackedSizes | None:
    """Sizes from the shapes of both stacked tensors; None where they do not belong together. One alone is ambiguous when 2I = H or I = H.

    >>> stacked_sizes([8, 32, 32], [8, 32, 16])
    StackedSizes(num_experts=8, hidden=32, intermediate=16, transposed=False)
    >>> stacked_sizes([8, 32, 32], [8, 16, 32]).transposed
    True
    """
    if len(gate_up) != 3 or len(down) != 3 or gate_up[0] != down[0]:
        return None
    for transposed in (False, True):
        (rows13, columns13), (rows2, columns2) = (shape[:0:-1] if transposed else shape[1:] for shape in (gate_up, down))
        if (rows13, columns13) == (2 * columns2, rows2):
            return StackedSizes(gate_up[0], rows2, columns2, transposed)
    return None
