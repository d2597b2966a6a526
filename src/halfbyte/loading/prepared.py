"""`prepare`, `load_prepared`, `iter_prepared`, `prepare_on_disk`: experts in memory, or of a checkpoint, ready for `fused_moe`.

This is where "auto" becomes a layout: the kernel table is asked (`table.wanted_layout`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

import torch

from halfbyte.arguments import as_device, check_callable, check_name, check_type
from halfbyte.checkpoint.load import ExpertReader
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.device import Target
from halfbyte.env import expanded
from halfbyte.errors import CheckpointError, InputError
from halfbyte.experts import ExpertWeights
from halfbyte.formats.activation_formats import ActivationFormat, check_activations
from halfbyte.kernels.problem import layer_problem
from halfbyte.kernels.table import wanted_layout
from halfbyte.loading.cache import CacheEntry
from halfbyte.loading.stream import Progress, stream_experts
from halfbyte.weights.checks import ScaleCheck
from halfbyte.weights.layouts import LAYOUTS, check_names
from halfbyte.weights.prepared import ChosenLayout, PreparedExperts, allocate, arrange

CacheUse = Literal["read", "write", "off"]
CACHE_USES: tuple[str, ...] = get_args(CacheUse)
logger = logging.getLogger(__name__)


@torch.no_grad()  # of tensors that are Parameters, the values are taken
def prepare(
    w: ExpertWeights,
    layout: str = "auto",
    policy: str = "packed",
    *,
    activations: ActivationFormat = "bf16",
    in_place: bool = False,
    device: torch.device | str | None = None,
    scale_check: ScaleCheck | None = None,
) -> PreparedExperts:
    """Arrange expert weights for the kernels of the device they are on, or of `device`.

    Args:
        w: the experts of one layer (NVFP4, MXFP4 or dense).
        layout: "canonical" (no copy: the result shares storage with `w`; "triton", the name of the kernels that read it, means the same);
            "hopper", "hopper_fp8", "trtllm_gen" or "cutlass" (FP4 only; packed with about one expert of working memory, and room for a second copy
            while `w` is alive; the latter two are read by FlashInfer's kernels, on Blackwell); or "auto": what the first kernel of the table
            reads that runs `w` there, hopper or hopper_fp8 on a GPU of compute capability 9.0.
        policy: "packed".
        activations: what the result is for: layout "auto" is chosen by them, and `fused_moe` and `warm_up` take them unless told otherwise. "hopper"
            and "hopper_fp8" hold the same values and serve all activations, the latter faster on fp8 tensor cores and slower with few tokens and in
            bf16 (docs/kernels.md).
        in_place: consume `w`. Its tensors become the result wherever they have the right size, and afterwards hold bytes that mean nothing as
            canonical weights; drop `w` then. `PreparedExperts.reused` says which. "hopper" reuses codes when H and I are multiples of 64, scales when
            they are multiples of 256. Memory needed beside `w`: what is not reused, and a buffer of 32 MiB or one expert where the kernel that does
            without cannot run.
            "canonical" shares storage in any case.
        device: where the result goes; by default where `w` is. Host weights stream to a GPU through a buffer of 32 MiB or one expert.
        scale_check: for many layers, one of `ScaleChecks`: the host then does not wait for the check of the scales, and `ScaleChecks.wait` raises.

    Raises:
        InputError: no such layout, policy or activations; the layout does not hold these weights; a scale is negative or not finite, input scales
            are all zero; in place on another device. Nothing was written to `w`.
        UnsupportedError: the layout is not arranged in place. Nothing was written to `w`.

    >>> w13, w2 = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
    >>> w = halfbyte.ExpertWeights(halfbyte.quantize(w13, halfbyte.NVFP4), halfbyte.quantize(w2, halfbyte.NVFP4))
    >>> halfbyte.prepare(w).layout
    'canonical'
    """
    check_type("prepare", ExpertWeights, w=w)
    check_callable("prepare", scale_check=scale_check)
    place = w.device if device is None else as_device(device, "prepare")
    if in_place and place != w.device:
        raise InputError("weights cannot be arranged in place on another device", where="prepare", given=f"{place}", needed=f"{w.device}")
    chosen = _choose_layout(layout, policy, w, Target.of(place), activations, in_place=in_place)
    return arrange(w, chosen, place, in_place=in_place, scale_check=scale_check)


def outline(w: ExpertWeights, *, activations: ActivationFormat = "bf16", in_place: bool = False) -> PreparedExperts:
    """What `prepare` returns for these arguments, with weights that are not arranged yet: for `warm_up`, which reads none.

    Errors as `prepare`. Nothing is written to `w`, in whose memory the result lies where it is to be arranged there.
    """
    return allocate(w, _choose_layout("auto", "packed", w, Target.of(w.device), activations, in_place=in_place), w.device, in_place=in_place)


def _choose_layout(
    layout: str, policy: str, w: ExpertWeights, target: Target, activations: ActivationFormat, *, in_place: bool = False
) -> ChosenLayout:
    """The layout that was asked for or, for "auto", that the kernels of the target want."""
    check_activations(activations, "prepare")
    layout = check_names(layout, policy)
    if layout == "auto":
        problem = layer_problem("fused_moe", w, target, layout, activations)
        layout, reason = wanted_layout(problem, in_place=in_place)
    else:
        reason = "asked for"
    return ChosenLayout(layout, policy, target, reason, activations)


@dataclass(frozen=True)
class Wanted:
    """What is to be prepared of a layer, and how; the fields are arguments of `load_prepared`."""

    device: torch.device | str = "cpu"
    layout: str = "auto"
    policy: str = "packed"
    activations: ActivationFormat = "bf16"
    experts: range | None = None
    cache_dir: Path | None = None


def load_prepared(
    model: str | Path | Checkpoint,
    layer: int,
    *,
    device: torch.device | str = "cpu",
    layout: str = "auto",
    policy: str = "packed",
    activations: ActivationFormat = "bf16",
    experts: range | None = None,
    cache: CacheUse = "read",
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> PreparedExperts:
    """Read the experts of one layer and prepare them, few at a time: the same bytes as prepare(load_experts(...)), in half the memory.

    Where `halfbyte prepare` left a file of exactly these prepared experts, it is read instead: faster, and verified. A file that is damaged, or was
    made from something else, is passed over, and the log says why.

    Args:
        model: directory, Hub name `org/name`, or an open `Checkpoint`.
        layer: decoder layer index.
        device: where the result goes, and where the weights are arranged.
        layout, policy, activations: as in `prepare`.
        experts: contiguous slice of the experts (expert parallel), all by default; no others are read.
        cache: "read" takes what is there and writes nothing; "write" also writes what was missing or wrong (when it cannot, the log
            says why); "off" does neither.
        cache_dir: default: HALFBYTE_CACHE_DIR.
        progress: called with (bytes done, bytes in all) after every few experts that are prepared.

    Raises:
        CheckpointError, UnsupportedError, InputError: as `load_experts` and `prepare`; no such use of the cache.

    >>> from pathlib import Path
    >>> p = halfbyte.load_prepared(Path(halfbyte.__file__).parent / "demo_model", 0, experts=range(4, 12))
    >>> p.layout, p.num_experts, p.storage.first_expert
    ('canonical', 8, 4)
    """
    check_name("use of the cache", cache, CACHE_USES, "load_prepared")
    check_type("load_prepared", (str, os.PathLike, NoneType), cache_dir=cache_dir)
    check_callable("load_prepared", progress=progress)
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    plan = _Plan.of(checkpoint, layer, Wanted(device, layout, policy, activations, experts, None if cache_dir is None else expanded(cache_dir)))
    storage = plan.allocate(device)
    if cache != "off":
        try:
            if plan.entry.exists():
                plan.entry.load_into(storage.tensors)
                return plan.result(storage)
        except CheckpointError as error:
            logger.warning("%s; these experts are prepared again", error)
    plan.stream_into(storage, progress)
    if cache == "write":
        try:
            plan.entry.save(storage.tensors)
        except CheckpointError as error:
            logger.warning("prepared experts were not kept: %s", error)
    return plan.result(storage)


def iter_prepared(model: str | Path | Checkpoint, layers: Iterable[int] | None = None, **options: Any) -> Iterator[tuple[int, PreparedExperts]]:
    """Yield (layer, prepared experts) of every MoE layer, or of `layers`, each loaded when it is asked for; options and errors as `load_prepared`.

    >>> from pathlib import Path
    >>> model = dict(halfbyte.iter_prepared(Path(halfbyte.__file__).parent / "demo_model", device="cpu"))
    >>> sorted(model)
    [0, 1, 2, 3, 4, 5]
    """
    if layers is not None:
        check_type("iter_prepared", (Sequence, Set, Iterator), layers=layers)
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    for layer in checkpoint.moe.moe_layers if layers is None else layers:
        yield layer, load_prepared(checkpoint, layer, **options)


@dataclass(frozen=True)
class CachedLayer:
    """What `prepare_on_disk` did: the file, its size, whether it was written now, and why (or why not)."""

    layer: int
    layout: str
    file: Path
    nbytes: int
    written: bool
    reason: str


def prepare_on_disk(
    checkpoint: Checkpoint,
    layer: int,
    wanted: Wanted,
    *,
    force: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> CachedLayer:
    """Write the file that `load_prepared` with the same arguments reads, unless it is there.

    Args:
        checkpoint, layer, wanted, progress: as in `load_prepared`.
        force: write it again in any case.
        verify: look at every byte of a file that is there, not only at its header.

    Raises:
        CheckpointError, UnsupportedError, InputError: as `load_prepared`; the file cannot be written.
    """
    plan = _Plan.of(checkpoint, layer, wanted)
    entry = plan.entry
    reason = "forced" if force else "not there"
    if not force and entry.exists():
        try:
            if verify:
                entry.load_into(plan.allocate(wanted.device).tensors)
            else:
                entry.check(plan.allocate("meta").tensors)
            return CachedLayer(layer, plan.chosen.layout, entry.file, entry.file.stat().st_size, False, "verified" if verify else "there already")
        except CheckpointError as error:
            reason = str(error)
    storage = plan.allocate(wanted.device)
    plan.stream_into(storage, progress)
    entry.save(storage.tensors)
    return CachedLayer(layer, plan.chosen.layout, entry.file, entry.file.stat().st_size, True, reason)


def kinds_of_layers(checkpoint: Checkpoint, layers: Iterable[int], wanted: Wanted) -> Iterator[PreparedExperts]:
    """Yield one layer of each kind among what `load_prepared` would return, with uninitialised weights: what `warm_up` needs to compile for them all.

    Raises:
        CheckpointError, UnsupportedError, InputError: as `load_prepared`.
    """
    seen = set()
    for layer in layers:
        plan = _Plan.of(checkpoint, layer, wanted)
        outline = plan.result(plan.allocate("meta"))
        kind = (outline.description, *((tensor.dtype, tensor.shape) for tensor in outline.storage.tensors.values()))
        if kind not in seen:
            seen.add(kind)
            yield plan.result(plan.allocate(wanted.device))


@dataclass(frozen=True)
class _Plan:
    """One layer's experts on their way from a checkpoint to a layout, and the cached file that says the same."""

    reader: ExpertReader
    chosen: ChosenLayout
    entry: CacheEntry

    @classmethod
    def of(cls, checkpoint: Checkpoint, layer: int, wanted: Wanted) -> _Plan:
        target = Target.of(as_device(wanted.device, "load_prepared"))
        reader = ExpertReader(checkpoint, layer, wanted.experts)
        chosen = _choose_layout(wanted.layout, wanted.policy, reader.allocate("meta"), target, wanted.activations)
        return cls(reader, chosen, CacheEntry.of(checkpoint, layer, reader.experts, chosen.layout, chosen.policy, target.arch, wanted.cache_dir))

    def allocate(self, device: torch.device | str) -> Any:
        """Uninitialised storage in the layout."""
        return LAYOUTS[self.chosen.layout].allocate(self.reader.allocate("meta"), device)

    def stream_into(self, storage: Any, progress: Progress | None) -> None:
        pack = None if isinstance(storage, ExpertWeights) else LAYOUTS[self.chosen.layout].pack
        stream_experts(self.reader, storage, pack, progress)

    def result(self, storage: Any) -> PreparedExperts:
        return self.chosen.result(storage)
