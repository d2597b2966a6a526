"""`prepare`: canonical experts to the arrangement a kernel reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from halfbyte.checkpoint.experts import Activation, ExpertWeights
from halfbyte.device import Target
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.formats import BlockFormat
from halfbyte.weights.layouts import hopper

# Each layout that can be built here, and each that is planned but not built, with what it is for.
LAYOUTS = {
    "canonical": "the checkpoint's own arrangement, read by the portable kernels on any device",
    "hopper": "register fragments in 64 x 64 tiles, read by the sm_90 kernels",
}
PLANNED_LAYOUTS = ("trtllm_gen", "cutlass", "triton")
POLICIES = {"packed": "weights stay in 4 bits"}


@dataclass(frozen=True)
class PreparedExperts:
    """The experts of one layer, ready for `fused_moe`.

    Attributes:
        experts: the tensors, arranged as `layout` says.
        layout: "canonical" (`experts` is an ExpertWeights) or "hopper" (a `layouts.hopper.HopperExperts`).
        policy: how the weights reside in memory; "packed" keeps 4 bits.
        target: the hardware they lie on.
        reason: why this layout was taken.
    """

    experts: ExpertWeights | hopper.HopperExperts
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
        """Copy every tensor to `device`, in the same layout: prepare again for a device of another kind."""
        return replace(self, experts=self.experts.to(device), target=Target.of(device))


def prepare(w: ExpertWeights, layout: str = "auto", policy: str = "packed") -> PreparedExperts:
    """Arrange expert weights for the kernels of the device they are on.

    Args:
        w: the experts of one layer (NVFP4, MXFP4 or dense).
        layout: "canonical" (no copy: the result shares storage with `w`); "hopper" (FP4 only; packed one expert at a time, with room for a second
            copy while `w` is alive); or "auto": hopper for FP4 experts on a GPU of compute capability 9.0, else canonical.
        policy: "packed".

    Raises:
        InputError: no such layout or policy; the layout does not hold these weights.
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
    is_hopper = target.arch == "sm_90" and w.format is not None
    reason = "asked for"
    if layout == "auto":
        layout = "hopper" if is_hopper else "canonical"
        reason = "FP4 experts on a Hopper GPU" if is_hopper else f"read by every kernel for {'FP4' if w.format else 'dense'} experts on {target.arch}"
    return PreparedExperts(hopper.pack(w) if layout == "hopper" else w, layout, policy, target, reason)
