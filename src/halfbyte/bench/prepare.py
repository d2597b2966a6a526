"""`prepare` against the copy bandwidth of the machine: for each way to pack a layer all bytes compared, then a time and the memory it took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

import halfbyte
from halfbyte.bench.prepare_peers import naive_hopper, torch_hopper
from halfbyte.bench.records import Column, Status
from halfbyte.bench.room import check_room
from halfbyte.checkpoint.typed_json import typed
from halfbyte.experts import ExpertWeights


@dataclass(frozen=True)
class PrepareRow:
    """One way to pack one layer: a `records.Row`.

    Attributes:
        method: the way, which is what is compared.
        num_experts: how many were packed: those of the layer, or the first few where a way is too slow for all.
        layers: how many such layers were packed one after another.
        ms: median time for the experts of one layer, the host's time included.
        gbps: bytes read and bytes written together over that time; copy_fraction: this over the copy bandwidth.
        extra_bytes: peak memory beside the weights and the result, by torch's own count on a GPU; on a CPU what the process grew by, where memory
            that it had kept from an earlier call counts as nothing. None where it is not known.
        speedup: over "naive", per expert; None where that was refused.
    """

    shape: str
    format: str
    layout: str
    method: str
    num_experts: int
    status: Status
    layers: int = 1
    reason: str = ""
    ms: float | None = None
    gbps: float | None = None
    copy_fraction: float | None = None
    extra_bytes: int | None = None
    speedup: float | None = None

    unit: ClassVar[str] = "layers"
    remark: ClassVar[str] = ""
    columns: ClassVar[tuple[Column, ...]] = (
        Column("ms per layer", "ms", ".2f"),
        Column("experts", "num_experts"),
        Column("GB/s", "gbps", ".4g"),
        Column("of copy", "copy_fraction", ".1%"),
        Column("extra MiB", "extra_bytes", ".1f", 2**20),
        Column("speed-up", "speedup", ".1f"),
    )

    @property
    def system(self) -> str:
        return self.method

    @property
    def size(self) -> int:
        return self.layers

    @property
    def subject(self) -> str:
        return f"{self.shape} {self.format.upper()}, layout {self.layout}"

    @property
    def result(self) -> str:
        return f"{self.ms:.2f} ms per layer of {self.num_experts} experts, {self.copy_fraction:.1%} of the copy bandwidth"


def row_of(fields: object) -> PrepareRow:
    """The row that a results file kept. Raises ValueError where it is something else."""
    return typed(PrepareRow, fields, "row")


@dataclass(frozen=True)
class _Method:
    """`pack` returns storage of the layout; `in_place`: it consumes what it is given; `few`: so slow that a few experts must do; `samples`: how often
    it is timed."""

    name: str
    pack: Callable[[ExpertWeights], Any]
    in_place: bool = False
    few: bool = False
    samples: int = 5


# What `prepare` is measured against, by layout.
PEERS = {"hopper": (_Method("naive", naive_hopper, few=True, samples=1), _Method("torch", torch_hopper, samples=1))}


def bench_prepare(name: str, weights: ExpertWeights, layout: str, copy_gbps: float, *, few_experts: int = 4, layers: int = 1) -> Iterator[PrepareRow]:
    """Measure the peers of `layout`, `prepare` into new storage, and `prepare` in place; the fastest of them last.

    Every result must have the bytes of the others. Memory: the weights, on their device, and twice those of all `layers`.

    Args:
        name: of the shape.
        weights: the experts of one layer, in FP4.
        copy_gbps: what the device copies, each byte counted twice.
        few_experts: how many experts the naive way packs.
        layers: how many layers `prepare` packs one after another, as when a model is loaded: the host works ahead of the GPU.

    Raises:
        UnsupportedError: there is no memory for so many layers.
    """
    check_room(layers * weights.nbytes, weights.device, f"{layers} layers")
    methods = (
        *PEERS[layout],
        _Method("halfbyte", lambda w: halfbyte.prepare(w, layout).storage),
        _Method("halfbyte, in place", lambda w: halfbyte.prepare(w, layout, in_place=True).storage, in_place=True),
    )
    naive_s: float | None = None
    expected: dict[int, dict[str, torch.Tensor]] = {}
    for method in methods:
        part = _first(weights, few_experts) if method.few else weights
        count = 1 if method in PEERS[layout] else layers
        row = PrepareRow(name, weights.format.name if weights.format else "", layout, method.name, part.num_experts, "refused", count)
        given = [_copy_of(part) if method.in_place else part for _ in range(count)]
        (result, *others) = [method.pack(w) for w in given]  # compiles, too
        del others
        if part.num_experts not in expected:
            expected[part.num_experts] = halfbyte.prepare(part, layout).storage.tensors if method.few else result.tensors
        if not _same_bytes(result.tensors, expected[part.num_experts]):
            yield replace(row, reason="its bytes differ from those of the other ways")
            continue
        result_bytes = count * _bytes_outside(result.tensors, given[0].tensors)
        moved_bytes = part.nbytes + sum(tensor.nbytes for tensor in result.tensors.values())
        del result
        samples, peaks = [], []
        for _ in range(method.samples):
            if method.in_place:
                for w in given:
                    for key, tensor in part.tensors.items():
                        w.tensors[key].copy_(tensor)
            seconds, peak = _measure(method.pack, given)
            samples.append(seconds / count)
            peaks.append(peak)
        seconds = statistics.median(samples)
        naive_s = seconds / part.num_experts if method.name == "naive" else naive_s
        extra = [peak - result_bytes for peak in peaks if peak is not None]
        gbps = moved_bytes / seconds / 1e9
        yield replace(
            row,
            status="ok",
            ms=1e3 * seconds,
            gbps=gbps,
            copy_fraction=gbps / copy_gbps,
            extra_bytes=max(0, *extra) if extra else None,
            speedup=None if naive_s is None else naive_s * part.num_experts / seconds,
        )
        del given


def _first(w: ExpertWeights, count: int) -> ExpertWeights:
    scales_of_all = ("w13_input_scale", "w2_input_scale")  # of the whole layer, not of the experts held here
    return w.with_tensors({name: tensor if name in scales_of_all else tensor[:count] for name, tensor in w.tensors.items()})


def _copy_of(w: ExpertWeights) -> ExpertWeights:
    return w.with_tensors({name: tensor.clone() for name, tensor in w.tensors.items()})


def _same_bytes(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    if ours.keys() != theirs.keys():
        return False
    return all(torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)) for name, tensor in ours.items())


def _bytes_outside(tensors: dict[str, torch.Tensor], sources: dict[str, torch.Tensor]) -> int:
    """Bytes of the tensors that do not lie in storage of the sources."""
    known = {tensor.untyped_storage().data_ptr() for tensor in sources.values()}
    return sum(tensor.nbytes for tensor in tensors.values() if tensor.untyped_storage().data_ptr() not in known)


def _measure(pack: Callable[[ExpertWeights], Any], layers: Sequence[ExpertWeights]) -> tuple[float, int | None]:
    """Seconds, and peak memory beside what was there before, the results included."""
    device = layers[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        start = time.perf_counter()
        result = [pack(w) for w in layers]
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        del result
        return seconds, torch.cuda.max_memory_allocated(device) - before
    resident = _reset_peak_resident_bytes()
    start = time.perf_counter()
    result = [pack(w) for w in layers]
    seconds = time.perf_counter() - start
    del result
    return seconds, None if resident is None else _status_bytes("VmHWM") - resident


def _reset_peak_resident_bytes() -> int | None:
    """Start counting the peak of this process anew and return its resident memory; None where the system has no such counter."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
