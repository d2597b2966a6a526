"""Whether a configuration and the tensors agree on how many layers and experts there are: looked at before anything counts up to either number."""

from __future__ import annotations

import re
from collections.abc import Mapping

from halfbyte.checkpoint.families import NUM_EXPERTS, MoEConfig
from halfbyte.errors import CheckpointError


def check_counts(moe: MoEConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare `moe` with the shapes of all tensors by name.

    Raises:
        CheckpointError: layers of which there is no tensor; more or fewer experts than the tensors are of.
    """
    before, _, after = map(re.escape, moe.block.partition("{layer}"))
    in_layer, in_experts = re.compile(rf"{before}(\d+)\."), re.compile(rf"{before}\d+{after}\.experts\.(?:(\d+)\.)?")
    num_layers, num_experts, last = 0, 0, ""
    for name, shape in shapes.items():
        if match := in_layer.match(name):
            num_layers = max(num_layers, 1 + _number(match[1], where, name))
        if match := in_experts.match(name):
            count = 1 + _number(match[1], where, name) if match[1] else shape[0] if len(shape) > 2 else 0
            if count > num_experts:
                num_experts, last = count, name
    if moe.num_layers > num_layers:
        raise _contradiction("there are fewer layers in the files", where, f"num_hidden_layers {moe.num_layers}", f"at most {num_layers}")
    if last and num_experts != moe.num_experts:
        given = f"{' or '.join(NUM_EXPERTS)} {moe.num_experts}; the files go as far as {last}"
        raise _contradiction("another number of experts in the files", where, given, num_experts)


def _number(digits: str, where: str, name: str) -> int:
    if len(digits) > 9 or str(int(digits)) != digits:
        raise _contradiction("no number of a layer or an expert", where, name, "0, 1, 2, ...")
    return int(digits)


def _contradiction(problem: str, where: str, given: str, needed: object) -> CheckpointError:
    return CheckpointError(problem, where=where, given=given, needed=needed, next_step="correct the file, or download the model again")
