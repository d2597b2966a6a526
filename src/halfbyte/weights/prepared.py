"""`PreparedExperts`: experts in the arrangement that a kernel reads, and `arrange`, which makes them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from halfbyte.arguments import as_device, check_callable, check_type, same_bits
from halfbyte.device import Target
from halfbyte.errors import UnsupportedError
from halfbyte.experts import Activation, ExpertWeights
from halfbyte.formats import BlockFormat
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.weights import canonical
from halfbyte.weights.checks import ScaleCheck, check_same_kind
from halfbyte.weights.description import describe
from halfbyte.weights.layouts import LAYOUTS, Storage, is_arranged_in_place


@dataclass(frozen=True, eq=False)
class PreparedExperts:
    """The experts of one layer, ready for `fused_moe`.

    Attributes:
        storage: the tensors, arranged as `layout` says.
        layout: "canonical" (`storage` is an ExpertWeights), "hopper" or "hopper_fp8" (a `hopper.layout.HopperExperts`), "trtllm_gen" or "cutlass"
            (an `engines.common.EngineExperts`).
        policy: how the weights reside in memory; "packed" keeps 4 bits.
        target: the hardware they lie on.
        reason: why this layout was taken.
        activations: what calls compute on unless they say otherwise; the layout was taken for them.
        reused: canonical tensors ("w13.codes", ...) whose memory `storage` lies in, where it was made in place; all of them for "canonical".
        description: what `fused_moe` passes to its op under torch.compile beside the tensors; see `weights.description`.
    """

    storage: Storage
    layout: str
    policy: str
    target: Target
    reason: str
    activations: ActivationFormat = "bf16"
    reused: tuple[str, ...] = ()
    description: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "description", describe(self.storage))
        for tensor in self.storage.tensors.values():
            keep_address(tensor)

    def __repr__(self) -> str:
        sizes = f"{self.num_experts} experts {self.format or 'dense'!r}, hidden {self.hidden}, intermediate {self.intermediate}, {self.activation}"
        place = f"layout {self.layout!r} ({self.reason}), for {self.activations} activations, {self.nbytes / 2**20:.1f} MiB, {self.device}"
        return f"PreparedExperts(\n  {sizes},\n  {place},\n)"

    def __eq__(self, other: object) -> bool:
        """Whether layout, activations, description and every bit are the same."""
        if not isinstance(other, PreparedExperts):
            return NotImplemented

        def tags(p: PreparedExperts) -> tuple[object, ...]:
            return p.layout, p.policy, p.target, p.activations, p.description

        return tags(self) == tags(other) and same_bits(self.storage.tensors, other.storage.tensors)

    __hash__ = None  # type: ignore[assignment]  # tensors can change

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return PreparedExperts, tuple(getattr(self, part.name) for part in fields(self) if part.init)  # constructed, so that addresses are kept

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
        place = as_device(device, "PreparedExperts.to")
        moved = {name: tensor.to(place) for name, tensor in self.storage.tensors.items()}
        return replace(self, storage=self.storage.with_tensors(moved), target=Target.of(place), reused=())

    def unprepare(self) -> ExpertWeights:
        """Return the canonical experts: every value exactly."""
        return LAYOUTS[self.layout].unpack(self.storage)

    @torch.no_grad()
    def update_(self, w: ExpertWeights, *, scale_check: ScaleCheck | None = None) -> None:
        """Replace the weights by those of `w`, in place: no address changes, so CUDA graphs captured with these experts go on with the new ones.

        The work is queued on the current stream of the device, like any kernel. `w` may lie on another device, and may have been loaded in any format
        of file; it must be what these experts were prepared from in all but the values. `scale_check`: as in `prepare`.

        Raises:
            InputError: another format, size, activation, range of experts or set of tensors, or unusable scales; nothing was written.

        >>> w = halfbyte.ExpertWeights(*(halfbyte.quantize(torch.randn(4, n, 32), halfbyte.MXFP4) for n in (64, 32)))
        >>> prepared = halfbyte.prepare(w, "hopper")
        >>> prepared.update_(w)
        """
        check_type("PreparedExperts.update_", ExpertWeights, w=w)
        check_callable("PreparedExperts.update_", scale_check=scale_check)
        layout = LAYOUTS[self.layout]
        check_same_kind(self.storage, layout.allocate(w, "meta"))
        layout.pack(w, self.storage, 0, scale_check)


def keep_address(tensor: torch.Tensor) -> None:
    """Promise torch.compile that `tensor` stays where it is: CUDA graphs then read it in place instead of copying it at every replay.

    The same as torch._dynamo.mark_static_address, whose import takes seconds.
    """
    tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ChosenLayout:
    """How experts are to lie and why: what `PreparedExperts` says of itself beside its storage."""

    layout: str
    policy: str
    target: Target
    reason: str
    activations: ActivationFormat

    def result(self, storage: Storage, reused: tuple[str, ...] = ()) -> PreparedExperts:
        return PreparedExperts(storage, self.layout, self.policy, self.target, self.reason, self.activations, reused)


def arrange(
    w: ExpertWeights, chosen: ChosenLayout, device: torch.device, *, in_place: bool, scale_check: ScaleCheck | None = None
) -> PreparedExperts:
    """Arrange `w` in a layout that has been chosen; the other arguments and errors as `loading.prepare`."""
    prepared = allocate(w, chosen, device, in_place=in_place)
    if prepared.storage is w:
        canonical.check(w, scale_check)
    else:
        LAYOUTS[chosen.layout].pack(w, prepared.storage, 0, scale_check)
    return prepared


def allocate(w: ExpertWeights, chosen: ChosenLayout, device: torch.device, *, in_place: bool) -> PreparedExperts:
    """What `arrange` returns, before it writes to it; canonical weights that stay where they are need no writing."""
    if chosen.layout == "canonical" and device == w.device:
        return chosen.result(w, tuple(w.tensors))
    storage, reused = _storage_within(w, chosen.layout) if in_place else (LAYOUTS[chosen.layout].allocate(w, device), ())
    return chosen.result(storage, reused)


def _storage_within(w: ExpertWeights, layout: str) -> tuple[Any, tuple[str, ...]]:
    """Storage of the layout that lies in the tensors of `w` where those have the right size, and which these are."""
    places, sources = LAYOUTS[layout].reused, w.tensors
    if not is_arranged_in_place(layout):
        raise UnsupportedError(f"layout {layout!r} is not arranged in place", where="prepare", needed="in_place=False")
    wanted = LAYOUTS[layout].allocate(w, "meta")
    tensors, reused = {}, []
    for name, meta in wanted.tensors.items():
        source = sources.get(places.get(name, ""))
        if source is None or source.nbytes != meta.nbytes or not source.is_contiguous() or source.data_ptr() % 16:  # kernels read 16 bytes at a time
            tensors[name] = torch.empty(meta.shape, dtype=meta.dtype, device=w.device)
        else:
            tensors[name] = source.view(torch.uint8).flatten().view(meta.dtype).view(meta.shape)
            reused.append(places[name])
    return wanted.with_tensors(tensors), tuple(reused)
