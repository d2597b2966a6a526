"""`load_prepared`, `iter_prepared` and `prepare_on_disk`: a checkpoint's layers, ready for `fused_moe`, without a second copy on the way."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from halfbyte.checkpoint.load import ExpertReader
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.device import Target
from halfbyte.errors import CheckpointError, InputError
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.loading.cache import CacheEntry
from halfbyte.loading.stream import Progress, stream_experts
from halfbyte.weights.prepared import LAYOUTS, PreparedExperts, resolve_layout

CacheUse = Literal["read", "write", "off"]
CACHE_USES: tuple[str, ...] = get_args(CacheUse)
_log = logging.getLogger("halfbyte")


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
    cache_dir: Path | None = None,
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
    >>> p.layout, p.num_experts, p.experts.first_expert
    ('canonical', 8, 4)
    """
    if cache not in CACHE_USES:
        raise InputError("unknown use of the cache", where="load_prepared", given=repr(cache), needed=" or ".join(map(repr, CACHE_USES)))
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    plan = _Plan.of(checkpoint, layer, device, layout, policy, activations, experts, cache_dir)
    storage = plan.allocate(device)
    if cache != "off" and plan.entry.file.exists():
        try:
            plan.entry.load_into(storage.tensors)
            return plan.result(storage)
        except CheckpointError as error:
            _log.warning("%s; these experts are prepared again", error)
    plan.stream_into(storage, progress)
    if cache == "write":
        try:
            plan.entry.save(storage.tensors)
        except CheckpointError as error:
            _log.warning("prepared experts were not kept: %s", error)
    return plan.result(storage)


def iter_prepared(model: str | Path | Checkpoint, layers: Iterable[int] | None = None, **options: Any) -> Iterator[tuple[int, PreparedExperts]]:
    """Yield (layer, prepared experts) of every MoE layer, or of `layers`, each loaded when it is asked for; options and errors as `load_prepared`.

    >>> from pathlib import Path
    >>> model = dict(halfbyte.iter_prepared(Path(halfbyte.__file__).parent / "demo_model", device="cpu"))
    >>> sorted(model)
    [0, 1, 2, 3, 4, 5]
    """
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
    *,
    device: torch.device | str = "cpu",
    layout: str = "auto",
    policy: str = "packed",
    activations: ActivationFormat = "bf16",
    experts: range | None = None,
    cache_dir: Path | None = None,
    force: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> CachedLayer:
    """Write the file that `load_prepared` with the same arguments reads, unless it is there.

    Args:
        checkpoint ... cache_dir, progress: as in `load_prepared`.
        force: write it again in any case.
        verify: look at every byte of a file that is there, not only at its header.

    Raises:
        CheckpointError, UnsupportedError, InputError: as `load_prepared`; the file cannot be written.
    """
    plan = _Plan.of(checkpoint, layer, device, layout, policy, activations, experts, cache_dir)
    entry = plan.entry
    reason = "forced" if force else "not there"
    if not force and entry.file.exists():
        try:
            if verify:
                entry.load_into(plan.allocate(device).tensors)
            else:
                entry.check(plan.allocate("meta").tensors)
            return CachedLayer(layer, plan.layout, entry.file, entry.file.stat().st_size, False, "verified" if verify else "there already")
        except CheckpointError as error:
            reason = str(error)
    storage = plan.allocate(device)
    plan.stream_into(storage, progress)
    entry.save(storage.tensors)
    return CachedLayer(layer, plan.layout, entry.file, entry.file.stat().st_size, True, reason)


def kinds_of_layers(
    checkpoint: Checkpoint,
    layers: Iterable[int],
    *,
    device: torch.device | str = "cpu",
    layout: str = "auto",
    policy: str = "packed",
    activations: ActivationFormat = "bf16",
    experts: range | None = None,
) -> Iterator[PreparedExperts]:
    """Yield one layer of each kind among what `load_prepared` would return, with uninitialised weights: what `warm_up` needs to compile for them all.

    Raises:
        CheckpointError, UnsupportedError, InputError: as `load_prepared`.
    """
    seen = set()
    for layer in layers:
        plan = _Plan.of(checkpoint, layer, device, layout, policy, activations, experts, None)
        outline = plan.result(plan.allocate("meta"))
        kind = (outline.description, *((tensor.dtype, tensor.shape) for tensor in outline.experts.tensors.values()))
        if kind not in seen:
            seen.add(kind)
            yield plan.result(plan.allocate(device))


@dataclass(frozen=True)
class _Plan:
    """One layer's experts on their way from a checkpoint to a layout, and the cached file that says the same."""

    reader: ExpertReader
    layout: str
    policy: str
    target: Target
    reason: str
    entry: CacheEntry

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        layer: int,
        device: torch.device | str,
        layout: str,
        policy: str,
        activations: ActivationFormat,
        experts: range | None,
        cache_dir: Path | None,
    ) -> _Plan:
        reader, target = ExpertReader(checkpoint, layer, experts), Target.of(device)
        layout, reason = resolve_layout(layout, policy, reader.format, target, activations)
        entry = CacheEntry.of(checkpoint, layer, reader.experts, layout, policy, target.arch, cache_dir)
        return cls(reader, layout, policy, target, reason, entry)

    def allocate(self, device: torch.device | str) -> Any:
        """Uninitialised storage in the layout; canonical storage is an ExpertWeights."""
        return self.reader.allocate(device) if self.layout == "canonical" else LAYOUTS[self.layout].allocate(self.reader.allocate("meta"), device)

    def stream_into(self, storage: Any, progress: Progress | None) -> None:
        stream_experts(self.reader, storage, None if self.layout == "canonical" else LAYOUTS[self.layout].pack, progress)

    def result(self, storage: Any) -> PreparedExperts:
        return PreparedExperts(storage, self.layout, self.policy, self.target, self.reason)
