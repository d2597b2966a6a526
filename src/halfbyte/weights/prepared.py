"""`PreparedExperts`: experts in the arrangement that a kernel reads, and `arrange`, which makes them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from halfbyte.device import Target
from halfbyte.errors import UnsupportedError
from halfbyte.experts import Activation, ExpertWeights
from halfbyte.formats import BlockFormat
from halfbyte.weights.checks import check_same_kind, check_scales
from halfbyte.weights.description import describe
from halfbyte.weights.layouts import LAYOUTS, Storage


@dataclass(frozen=True)
class PreparedExperts:
    """The experts of one layer, ready for `fused_moe`.

    Attributes:
        storage: the tensors, arranged as `layout` says.
        layout: "canonical" (`storage` is an ExpertWeights), "hopper" or "hopper_fp8" (a `hopper.layout.HopperExperts`), "trtllm_gen" or "cutlass"
            (an `engines.common.EngineExperts`).
        policy: how the weights reside in memory; "packed" keeps 4 bits.
        target: the hardware they lie on.
        reason: why this layout was taken.
        description: what `fused_moe` passes to its op under torch.compile beside the tensors; see `weights.description`.
    """

    storage: Storage
    layout: str
    policy: str
    target: Target
    reason: str
    description: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "description", describe(self.storage))
        for tensor in self.storage.tensors.values():
            keep_address(tensor)

    @property
    def activation(self) -> Activation:
        return self.storage.activation

    @property
    def format(self) -> BlockFormat | None:
        """NVFP4, MXFP4, or None for dense weights."""
        return self.storage.format

    @property
    def num_experts(self) -> int:
        return self.storage.num_experts

    @property
    def hidden(self) -> int:
        return self.storage.hidden

    @property
    def intermediate(self) -> int:
        return self.storage.intermediate

    @property
    def device(self) -> torch.device:
        return self.storage.device

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    def to(self, device: torch.device | str) -> PreparedExperts:
        """Copy every tensor to `device`, in the same layout: prepare again for a device of another kind."""
        moved = {name: tensor.to(device) for name, tensor in self.storage.tensors.items()}
        return replace(self, storage=self.storage.with_tensors(moved), target=Target.of(device))

    def unprepare(self) -> ExpertWeights:
        """Return the canonical experts: every value exactly."""
        return self.storage if isinstance(self.storage, ExpertWeights) else LAYOUTS[self.layout].unpack(self.storage)

    @torch.no_grad()
    def update_(self, w: ExpertWeights) -> None:
        """Replace the weights by those of `w`, in place: no address changes, so CUDA graphs captured with these experts go on with the new ones.

        The work is queued on the current stream of the device, like any kernel. `w` may lie on another device, and may have been loaded in any format
        of file; it must be what these experts were prepared from in all but the values.

        Raises:
            InputError: another format, size, activation, range of experts or set of tensors, or unusable scales; nothing was written.

        >>> w = halfbyte.ExpertWeights(*(halfbyte.quantize(torch.randn(4, n, 32), halfbyte.MXFP4) for n in (64, 32)))
        >>> prepared = halfbyte.prepare(w, "hopper")
        >>> prepared.update_(w)
        """
        layout = LAYOUTS.get(self.layout)
        check_same_kind(self.storage, w if layout is None else layout.allocate(w, "meta"))
        if layout is not None:
            layout.pack(w, self.storage, 0)
            return
        check_scales(w)
        for name, tensor in self.storage.tensors.items():
            tensor.copy_(w.tensors[name])


def keep_address(tensor: torch.Tensor) -> None:
    """Promise torch.compile that `tensor` stays where it is: CUDA graphs then read it in place instead of copying it at every replay.

    The same as torch._dynamo.mark_static_address, whose import takes seconds.
    """
    tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]


def arrange(w: ExpertWeights, layout: str, policy: str, reason: str, *, in_place: bool, device: torch.device) -> PreparedExperts:
    """Arrange `w` in a layout that has been chosen; arguments and errors as `loading.prepare`."""
    target = Target.of(device)
    if layout == "canonical":
        check_scales(w)
        return PreparedExperts(w if device == w.device else w.to(device), layout, policy, target, reason)
    storage = _storage_within(w, layout) if in_place else LAYOUTS[layout].allocate(w, device)
    LAYOUTS[layout].pack(w, storage, 0)
    return PreparedExperts(storage, layout, policy, target, reason)


def _storage_within(w: ExpertWeights, layout: str) -> Any:
    """Storage of the layout that lies in the tensors of `w` where those have the right size."""
    reused, sources = LAYOUTS[layout].reused, w.tensors
    if not reused:
        raise UnsupportedError(f"layout {layout!r} is not arranged in place", where="prepare", needed="in_place=False")
    wanted = LAYOUTS[layout].allocate(w, "meta")

    def storage(name: str, meta: torch.Tensor) -> torch.Tensor:
        source = sources.get(reused.get(name, ""))
        if source is None or source.nbytes != meta.nbytes or not source.is_contiguous() or source.data_ptr() % 16:  # kernels read 16 bytes at a time
            return torch.empty(meta.shape, dtype=meta.dtype, device=w.device)
        return source.view(torch.uint8).flatten().view(meta.dtype).view(meta.shape)

    return wanted.with_tensors({name: storage(name, meta) for name, meta in wanted.tensors.items()})
