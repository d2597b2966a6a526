"""`prepare`: canonical experts to the arrangement a kernel reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from halfbyte.checkpoint.experts import Activation, ExpertWeights
from halfbyte.device import Target
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.formats import BlockFormat

# Each layout that can be built here, and each that is planned but not built, with what it is for.
LAYOUTS = {"canonical": "the checkpoint's own arrangement, read by the reference kernels on any device"}
PLANNED_LAYOUTS = ("hopper", "trtllm_gen", "cutlass", "triton")
POLICIES = {"packed": "weights stay in 4 bits"}


@dataclass(frozen=True)
class PreparedExperts:
    """The experts of one layer, ready for `fused_moe`.

    Attributes:
        experts: the tensors, arranged as `layout` says.
        layout: "canonical".
        policy: how the weights reside in memory; "packed" keeps 4 bits.
        target: the hardware they lie on.
        reason: why this layout was taken.
    """

    experts: ExpertWeights
    layout: str
    policy: str
    target: Target
    reason: str

    @property
    def activation(self) -> Activation:
        return self.experts.activation

    @property
    def format(self) -> BlockFormat | None:
        """NVFP4, MXFP4, or None for dense weights."""
        return self.experts.format

    @property
    def num_experts(self) -> int:
        return self.experts.num_experts

    @property
    def hidden(self) -> int:
        return self.experts.hidden

    @property
    def intermediate(self) -> int:
        return self.experts.intermediate

    @property
    def device(self) -> torch.device:
        return self.experts.device

    @property
    def nbytes(self) -> int:
        return self.experts.nbytes

    def to(self, device: torch.device | str) -> PreparedExperts:
        """Copy every tensor to `device`. The canonical layout is the same on all of them."""
        return replace(self, experts=self.experts.to(device), target=Target.of(device))


def prepare(w: ExpertWeights, layout: str = "auto", policy: str = "packed") -> PreparedExperts:
    """Arrange expert weights for the kernels of the device they are on.

    Args:
        w: the experts of one layer (NVFP4, MXFP4 or dense).
        layout: "auto" or "canonical" (no copy: the result shares storage with `w`).
        policy: "packed".

    Raises:
        InputError: no such layout or policy.
        UnsupportedError: a layout that is known but cannot be built by this version.

    >>> w13, w2 = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
    >>> w = halfbyte.ExpertWeights(halfbyte.quantize(w13, halfbyte.NVFP4), halfbyte.quantize(w2, halfbyte.NVFP4))
    >>> halfbyte.prepare(w).layout
    'canonical'
    """
    if policy not in POLICIES:
        raise InputError("unknown residency policy", where="prepare", given=repr(policy), needed=" or ".join(map(repr, POLICIES)))
    available = ", ".join(f"{name!r} ({purpose})" for name, purpose in LAYOUTS.items())
    if layout in PLANNED_LAYOUTS:
        raise UnsupportedError(f"layout {layout!r} is not built by this version", where="prepare", needed=available)
    if layout != "auto" and layout not in LAYOUTS:
        raise InputError("unknown layout", where="prepare", given=repr(layout), needed=f"'auto' or {available}")
    target = Target.of(w.device)
    reason = f"the only layout there is for {target.arch}" if layout == "auto" else "asked for"
    return PreparedExperts(w, "canonical", policy, target, reason)
