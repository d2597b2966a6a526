"""Whether a configuration and the tensors agree on how many layers and experts there are, and where: looked at before anything counts up to them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from halfbyte.checkpoint.families import Found, MoEConfig, first_of_experts, format_range
from halfbyte.checkpoint.families.description import NUM_EXPERTS
from halfbyte.checkpoint.projections import UP, expert_digits, find_layout
from halfbyte.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


def check_counts(moe: MoEConfig, found: Found, shapes: Shapes, where: str) -> None:
    """Compare `moe` with what `find_experts` found, and the shapes of all tensors by name.

    Raises:
        CheckpointError: layers of which there is no tensor; experts in a layer that should have none; more or fewer of them than the tensors are of.
    """
    in_layer = re.compile(re.escape(moe.block.partition("{layer}")[0]) + r"(\d+)\.")
    num_layers = max((1 + _number(match[1], where, name) for name in shapes if (match := in_layer.match(name))), default=0)
    if moe.num_layers > num_layers:
        raise _contradiction("there are fewer layers in the files", where, f"num_hidden_layers {moe.num_layers}", f"at most {num_layers}")
    for layer, names in found[moe.block].items():
        if layer not in moe.expert_layers:
            if (superfluous := first_of_experts(names, shapes)) is None:
                continue
            needed = f"experts in layers {format_range(moe.expert_layers)}"
            raise _contradiction("config.json gives this layer no experts", where, superfluous, needed)
        num_experts, last = _count(moe, layer, names, shapes, where)
        if num_experts != moe.num_experts:
            given = f"{' or '.join(NUM_EXPERTS)} {moe.num_experts}; the files go as far as {last}"
            raise _contradiction("another number of experts in the files", where, given, num_experts)


def _count(moe: MoEConfig, layer: int, names: Sequence[str], shapes: Shapes, where: str) -> tuple[int, str]:
    """The number of experts in a layer with these tensors, and the one of them that says so."""
    block = moe.block_of(layer)
    numbered = {digits: name for name in names if (digits := expert_digits(name, len(block)))}
    if numbered:
        last, name = max((_number(digits, where, name), name) for digits, name in numbered.items())
        return last + 1, name
    layout = find_layout(shapes, block, gated=moe.activation is None or moe.activation.gated)
    module = f"{block}.{layout.module(0, UP)}"
    stacked = [(shapes[name][0], name) for name in names if name.startswith(module) and len(shapes[name]) > 1]
    if not stacked:  # who reads the layer says what is missing
        return moe.num_experts, ""
    rows, name = max(stacked)
    return (-(-rows // moe.intermediate) if layout.flat else rows), name


def _number(digits: str, where: str, name: str) -> int:
    if len(digits) > 9 or str(int(digits)) != digits:
        raise _contradiction("no number of a layer or an expert", where, name, "0, 1, 2, ...")
    return int(digits)


def _contradiction(problem: str, where: str, given: str, needed: object) -> CheckpointError:
    return CheckpointError(problem, where=where, given=given, needed=needed, next_step="correct the file, or download the model again")
