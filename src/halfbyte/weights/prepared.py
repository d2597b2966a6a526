"""`prepare`: canonical experts to the arrangement a kernel reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from halfbyte.device import Target
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.experts import Activation, ExpertWeights
from halfbyte.formats import BlockFormat
from halfbyte.formats.activation_formats import ACTIVATION_FORMATS, ActivationFormat
from halfbyte.weights.checks import check_same_kind, check_scales
from halfbyte.weights.description import describe
from halfbyte.weights.engines.common import EngineExperts
from halfbyte.weights.engines.cutlass import CUTLASS
from halfbyte.weights.engines.trtllm_gen import TRTLLM_GEN
from halfbyte.weights.hopper import layout as hopper
from halfbyte.weights.hopper.pack import pack, unpack

Experts: TypeAlias = ExpertWeights | hopper.HopperExperts | EngineExperts


@dataclass(frozen=True)
class Layout:
    """An arrangement of experts in storage of its own, a dataclass with `tensors` and `with_tensors`.

    Attributes:
        purpose: what it is, and who reads it.
        allocate: (w, device) to uninitialised storage for the experts of w.
        pack: (w, storage, first) arranges the experts of w, one at a time, as experts `first` and following of the storage.
        unpack: storage to canonical experts.
        reused: canonical tensor in whose storage each tensor may lie while `pack` runs, where the sizes are the same.
        foreign: no kernel of halfbyte reads it, only the engine it is named after.
    """

    purpose: str
    allocate: Callable[[ExpertWeights, torch.device | str], Any]
    pack: Callable[[ExpertWeights, Any, int], None]
    unpack: Callable[[Any], ExpertWeights]
    reused: Mapping[str, str] = field(default_factory=dict)
    foreign: bool = False


# What is built here. "canonical" is the checkpoint's own arrangement, which needs no building; "triton" names the kernels that read it.
CANONICAL = "the checkpoint's own arrangement, read by the portable kernels on any device"
LAYOUTS = {
    "hopper": Layout("register fragments in 64 x 64 tiles, read by the sm_90 kernels", hopper.allocate, pack, unpack, hopper.REUSED),
    "hopper_fp8": Layout(
        "hopper with codes arranged for fp8 tensor cores, for layers called with activations='fp8'",
        partial(hopper.allocate, words_for="fp8"),
        pack,
        unpack,
        hopper.REUSED,
    ),
    "trtllm_gen": Layout(
        "shuffled rows and 128x4 scales, for the trtllm-gen kernels of Blackwell engines",
        TRTLLM_GEN.allocate,
        TRTLLM_GEN.pack,
        TRTLLM_GEN.unpack,
        foreign=True,
    ),
    "cutlass": Layout(
        "rows in order and 128x4 scales, for the CUTLASS kernels of Blackwell engines", CUTLASS.allocate, CUTLASS.pack, CUTLASS.unpack, foreign=True
    ),
}
POLICIES = {"packed": "weights stay in 4 bits"}


@dataclass(frozen=True)
class PreparedExperts:
    """The experts of one layer, ready for `fused_moe`.

    Attributes:
        experts: the tensors, arranged as `layout` says.
        layout: "canonical" (`experts` is an ExpertWeights), "hopper" or "hopper_fp8" (a `hopper.layout.HopperExperts`), "trtllm_gen" or "cutlass"
            (an `engines.common.EngineExperts`).
        policy: how the weights reside in memory; "packed" keeps 4 bits.
        target: the hardware they lie on.
        reason: why this layout was taken.
        description: what `fused_moe` passes to its op under torch.compile beside the tensors; see `weights.description`.
    """

    experts: Experts
    layout: str
    policy: str
    target: Target
    reason: str
    description: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "description", describe(self.experts))
        for tensor in self.experts.tensors.values():
            keep_address(tensor)

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
        moved = {name: tensor.to(device) for name, tensor in self.experts.tensors.items()}
        return replace(self, experts=self.experts.with_tensors(moved), target=Target.of(device))

    def unprepare(self) -> ExpertWeights:
        """Return the canonical experts: every value exactly."""
        return self.experts if isinstance(self.experts, ExpertWeights) else LAYOUTS[self.layout].unpack(self.experts)

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
        check_same_kind(self.experts, w if layout is None else layout.allocate(w, "meta"))
        if layout is not None:
            layout.pack(w, self.experts, 0)
            return
        check_scales(w)
        for name, tensor in self.experts.tensors.items():
            tensor.copy_(w.tensors[name])


def keep_address(tensor: torch.Tensor) -> None:
    """Promise torch.compile that `tensor` stays where it is: CUDA graphs then read it in place instead of copying it at every replay.

    The same as torch._dynamo.mark_static_address, whose import takes seconds.
    """
    tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]


def hopper_layout(activations: ActivationFormat) -> str:
    """The layout of the Hopper kernels that is fastest with these activations."""
    return "hopper_fp8" if activations == "fp8" else "hopper"


def resolve_layout(layout: str, policy: str, format: BlockFormat | None, target: Target, activations: ActivationFormat = "bf16") -> tuple[str, str]:
    """Return the layout that "auto" means for experts in `format` on `target` called with `activations`, any other as it is, and why.

    Raises:
        InputError: as `prepare`.
    """
    if policy not in POLICIES:
        raise InputError("unknown residency policy", where="prepare", given=repr(policy), needed=" or ".join(map(repr, POLICIES)))
    if activations not in ACTIVATION_FORMATS:
        raise InputError("unknown activation format", where="prepare", given=repr(activations), needed=" or ".join(map(repr, ACTIVATION_FORMATS)))
    available = ", ".join([f"'canonical' ({CANONICAL})", *(f"{name!r} ({known.purpose})" for name, known in LAYOUTS.items())])
    if layout not in ("auto", "canonical", "triton", *LAYOUTS):
        raise InputError("unknown layout", where="prepare", given=repr(layout), needed=f"'auto' or {available}")
    is_hopper = target.arch == "sm_90" and format is not None
    reason = "asked for"
    if layout == "auto":
        layout = hopper_layout(activations) if is_hopper else "canonical"
        reason = (
            f"FP4 experts on a Hopper GPU, {activations} activations"
            if is_hopper
            else f"read by every kernel for {'FP4' if format else 'dense'} experts on {target.arch}"
        )
    elif layout == "triton":
        layout, reason = "canonical", "asked for as 'triton', whose kernels read the checkpoint's own arrangement"
    return layout, reason


def prepare(
    w: ExpertWeights,
    layout: str = "auto",
    policy: str = "packed",
    *,
    activations: ActivationFormat = "bf16",
    in_place: bool = False,
    device: torch.device | str | None = None,
) -> PreparedExperts:
    """Arrange expert weights for the kernels of the device they are on, or of `device`.

    Args:
        w: the experts of one layer (NVFP4, MXFP4 or dense).
        layout: "canonical" (no copy: the result shares storage with `w`; "triton", the name of the kernels that read it, means the same);
            "hopper", "hopper_fp8", "trtllm_gen" or "cutlass" (FP4 only; packed with about one expert of working memory, and room for a second copy
            while `w` is alive; the latter two are read by the engines they are named after, not by `fused_moe`); or "auto": for FP4 experts on a
            GPU of compute capability 9.0 hopper, or hopper_fp8 where `activations` are, else canonical.
        policy: "packed".
        activations: what `fused_moe` will mostly be called with; for layout "auto". "hopper" and "hopper_fp8" hold the same values and serve all
            activations, the latter faster on fp8 tensor cores and slower with few tokens and in bf16 (docs/kernels.md).
        in_place: consume `w`. Its tensors become the result wherever they have the right size, and afterwards hold bytes that mean nothing as
            canonical weights; drop `w` then. "hopper" reuses codes when H and I are multiples of 64, scales when they are multiples of 256. Memory
            needed beside `w`: what is not reused, and a buffer of 32 MiB or one expert where the kernel that does without cannot run.
            "canonical" shares storage in any case.
        device: where the result goes; by default where `w` is. Host weights stream to a GPU through a buffer of 32 MiB or one expert.

    Raises:
        InputError: no such layout, policy or activations; the layout does not hold these weights; in place on another device. Nothing was written to
            `w`.
        UnsupportedError: the layout is not arranged in place. Nothing was written to `w`.

    >>> w13, w2 = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
    >>> w = halfbyte.ExpertWeights(halfbyte.quantize(w13, halfbyte.NVFP4), halfbyte.quantize(w2, halfbyte.NVFP4))
    >>> halfbyte.prepare(w).layout
    'canonical'
    """
    place = w.device if device is None else torch.empty(0, device=device).device
    if in_place and place != w.device:
        raise InputError("weights cannot be arranged in place on another device", where="prepare", given=f"{place}", needed=f"{w.device}")
    target = Target.of(place)
    layout, reason = resolve_layout(layout, policy, w.format, target, activations)
    if layout == "canonical":
        return PreparedExperts(w if place == w.device else w.to(place), layout, policy, target, reason)
    packed = _storage_within(w, layout) if in_place else LAYOUTS[layout].allocate(w, place)
    LAYOUTS[layout].pack(w, packed, 0)
    return PreparedExperts(packed, layout, policy, target, reason)


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
