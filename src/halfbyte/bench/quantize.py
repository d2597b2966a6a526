"""Quantisation against the copy bandwidth of the same run: for each case the codec's bits first, then a time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

import halfbyte
from halfbyte.bench.ceilings import Ceilings
from halfbyte.bench.records import Column, Status
from halfbyte.bench.room import check_room
from halfbyte.bench.timing import calls_of, time_calls, weight_sets_of
from halfbyte.checkpoint.typed_json import typed
from halfbyte.device import Target
from halfbyte.errors import HalfbyteError, UnsupportedError
from halfbyte.formats import FORMATS, BlockFormat, QuantTensor
from halfbyte.formats import quantize as codec
from halfbyte.formats.scale_layout import ScaleLayout, tile_rows

OF_EXPERTS = frozenset({"scan", "search"})  # systems that sort rows by expert
SYSTEMS = ("halfbyte", "naive", "scan", "search")
_GLOBAL_SCALE = 1e-3


@dataclass(frozen=True)
class QuantizeCase:
    """Rows of bf16; `num_experts` 0 is one matrix with one global scale, else that many experts of about equal size."""

    num_rows: int
    width: int
    format: str
    layout: ScaleLayout
    num_experts: int = 0

    @property
    def block_format(self) -> BlockFormat:
        return FORMATS[self.format]

    @property
    def nbytes(self) -> int:
        """Bytes that must move: x read, codes and block scales written, padding and global scales not counted.

        >>> QuantizeCase(2, 64, "nvfp4", "128x4").nbytes
        328
        """
        elements = self.num_rows * self.width
        return 2 * elements + elements // 2 + elements // self.block_format.block


@dataclass(frozen=True)
class QuantizeRow:
    """One system on one case: a `records.Row`, refused when a bit is wrong.

    `gbps` counts `nbytes`; `fraction` is gbps / copy bandwidth, which counts bytes read and written too. Inputs that together exceed the L2 take
    turns.
    """

    case: QuantizeCase
    system: str
    status: Status
    nbytes: int
    reason: str = ""
    calls: int | None = None
    median_us: float | None = None
    spread: float | None = None
    samples: int | None = None
    timer: str | None = None
    gbps: float | None = None
    fraction: float | None = None

    unit: ClassVar[str] = "rows"
    remark: ClassVar[str] = ""
    columns: ClassVar[tuple[Column, ...]] = (
        Column("us", "median_us", ".1f"),
        Column("spread", "spread", ".1%"),
        Column("GB/s", "gbps", ".0f"),
        Column("of copy", "fraction", ".1%"),
    )

    @property
    def size(self) -> int:
        return self.case.num_rows

    @property
    def subject(self) -> str:
        case = self.case
        experts = f", {case.num_experts} experts" if case.num_experts else ""
        return f"K {case.width} to {case.format.upper()}, scales {case.layout}{experts}"

    @property
    def result(self) -> str:
        return f"{self.median_us:.1f} us, {self.gbps:.0f} GB/s, {self.fraction:.1%} of the copy bandwidth"


def row_of(fields: object) -> QuantizeRow:
    """The row that a results file kept. Raises ValueError where it is something else."""
    return typed(QuantizeRow, fields, "row")


Quantized = tuple[torch.Tensor, torch.Tensor]  # codes and scales


def bench_quantize(
    cases: Sequence[QuantizeCase], systems: Sequence[str], device: torch.device, ceilings: Ceilings, seed: int = 0
) -> Iterator[QuantizeRow]:
    """Measure `systems` on every case they apply to. Memory: the inputs of a case, and two results beside the codec's working set."""
    for case in cases:
        inputs = _inputs(case, device, seed)
        expected: Quantized | None = None
        for system in systems:
            if case.num_experts == 0 and system in OF_EXPERTS:
                continue
            row = QuantizeRow(case, system, "skipped", case.nbytes)
            try:
                call = _call_of(system, case, device, seed)
                if expected is None:
                    expected = _expected(case, inputs[0], device, seed)
                yield _measure(row, call, inputs, expected, device, ceilings)
            except (HalfbyteError, torch.OutOfMemoryError) as error:
                yield replace(row, reason=str(error).splitlines()[0])


def _measure(
    row: QuantizeRow,
    call: Callable[[torch.Tensor], Quantized],
    inputs: list[torch.Tensor],
    expected: Quantized,
    device: torch.device,
    ceilings: Ceilings,
) -> QuantizeRow:
    wrong = _differing_bytes(row.case, call(inputs[0]), expected)
    if wrong:
        return replace(row, status="refused", reason=f"{wrong} bytes differ from the codec's")
    timing = time_calls([functools.partial(call, x) for x in inputs], device)
    gbps = row.nbytes / timing.median_us / 1e3
    return replace(
        row,
        status="ok",
        calls=len(inputs),
        median_us=timing.median_us,
        spread=timing.spread,
        samples=timing.samples,
        timer=timing.timer,
        gbps=gbps,
        fraction=gbps / ceilings.copy_gbps,
    )


def _differing_bytes(case: QuantizeCase, actual: Quantized, expected: Quantized) -> int:
    count = 0
    for ours, theirs in zip(actual, expected, strict=True):
        rows = theirs.shape[0]  # a grouped scale buffer may end in rows that nobody writes
        count += int((ours.view(torch.uint8)[:rows] != theirs.view(torch.uint8)).sum())
    return count


def _inputs(case: QuantizeCase, device: torch.device, seed: int) -> list[torch.Tensor]:
    count = max(calls_of(case.num_rows), weight_sets_of(case.nbytes, Target.of(device).l2))
    check_room(2 * count * case.num_rows * case.width, device, f"{count} x {case.num_rows} rows of {case.width}")
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(case.num_rows, case.width, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(count)]


def _experts(case: QuantizeCase, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Offsets of experts drawn at random for every row, and their global scales."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(case.num_experts, (case.num_rows,), dtype=torch.int64, generator=generator).bincount(minlength=case.num_experts)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).int()
    scales = (1 + torch.rand(case.num_experts, dtype=torch.float32, generator=generator)) * _GLOBAL_SCALE
    return offsets.to(device), scales.to(device) if case.block_format.has_global_scale else None


def _call_of(system: str, case: QuantizeCase, device: torch.device, seed: int) -> Callable[[torch.Tensor], Quantized]:
    """Raises UnsupportedError when `system` cannot run the case."""
    format, layout = case.block_format, case.layout
    if system != "halfbyte" and device.type != "cuda":
        raise UnsupportedError(f"{system} is a GPU kernel", given=device.type, needed="a CUDA GPU")
    if case.num_experts:
        if system == "naive":
            raise UnsupportedError("naive has no experts", needed="--experts 0")
        offsets, scales = _experts(case, device, seed)
        if system == "halfbyte":
            return lambda x: halfbyte.quantize_experts(x, offsets, scales, format, scale_layout=layout)[:2]
        return _grouped_kernel(offsets, scales, format, layout, "scan" if system == "scan" else "search")
    scale = torch.tensor(_GLOBAL_SCALE, dtype=torch.float32, device=device) if format.has_global_scale else None
    if system == "halfbyte":
        return lambda x: _parts(halfbyte.quantize(x, format, scale, scale_layout=layout))
    if scale is None or layout == "8x4" or torch.cuda.get_device_capability(device) < (8, 9):
        raise UnsupportedError("naive does NVFP4 in linear and 128x4", given=f"{format!r} {layout}", needed="compute capability 8.9 or newer")
    from halfbyte.bench.naive_quantize import naive_quantize

    return lambda x: _parts(naive_quantize(x, scale, layout))


def _grouped_kernel(
    offsets: torch.Tensor, scales: torch.Tensor | None, format: BlockFormat, layout: ScaleLayout, lookup: Literal["scan", "search"]
) -> Callable[[torch.Tensor], Quantized]:
    from halfbyte.kernels.quantize import allocate_experts
    from halfbyte.kernels.quantizers.fp4_experts import run as quantize_experts

    def call(x: torch.Tensor) -> Quantized:
        out = allocate_experts(x, offsets, format, layout)
        quantize_experts(x, offsets, scales, format, layout, *out, lookup=lookup)
        return out[:2]

    return call


def _expected(case: QuantizeCase, x: torch.Tensor, device: torch.device, seed: int) -> Quantized:
    format, layout = case.block_format, case.layout
    if not case.num_experts:
        return _parts(codec(x, format, _GLOBAL_SCALE if format.has_global_scale else None, scale_layout=layout))
    offsets, scales = _experts(case, device, seed)
    q = halfbyte.quantize_experts(x, offsets, scales, format, scale_layout=layout, backend="reference")
    used = sum(-(-(end - first) // tile_rows(layout)) * tile_rows(layout) for first, end in itertools.pairwise(offsets.tolist()))
    return q.codes, q.scales[:used]


def _parts(q: QuantTensor) -> Quantized:
    return q.codes, q.scales
