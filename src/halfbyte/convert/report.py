"""What a conversion did: sizes and the signal-to-noise ratio of every kind of projection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from halfbyte.errors import printable
from halfbyte.formats import QuantTensor

_ROWS_AT_A_TIME = 1 << 20  # elements, so that the difference below never exists whole


def sqnr_db(weight: torch.Tensor, q: QuantTensor) -> float:
    """10 log10(sum w^2 / sum (w - dequantised)^2) of a matrix [N, K]; infinite when exact, NaN for an all-zero weight.

    >>> x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    >>> round(sqnr_db(x, halfbyte.quantize(x, halfbyte.NVFP4)))
    20
    """
    restored = q.dequantize(torch.float32)
    signal = noise = 0.0
    step = max(1, _ROWS_AT_A_TIME // weight.shape[-1])
    for original, copy in zip(weight.split(step), restored.split(step), strict=True):
        values = original.float()
        signal += values.square().sum(dtype=torch.float64).item()
        noise += copy.sub_(values).square_().sum(dtype=torch.float64).item()
    if signal == 0:
        return math.nan
    return 10 * math.log10(signal / noise) if noise else math.inf


@dataclass
class Sqnr:
    """Mean and worst SQNR of one kind of projection, in dB. All-zero and exactly represented matrices are counted, not averaged."""

    matrices: int = 0
    averaged: int = 0
    sum_db: float = 0.0
    worst_db: float | None = None
    worst: str | None = None

    @property
    def mean_db(self) -> float | None:
        return self.sum_db / self.averaged if self.averaged else None

    def add(self, module: str, db: float) -> None:
        self.matrices += 1
        if math.isfinite(db):
            self.merge(Sqnr(0, 1, db, db, module))

    def merge(self, other: Sqnr) -> None:
        self.matrices += other.matrices
        self.averaged += other.averaged
        self.sum_db += other.sum_db
        if other.worst_db is not None and (self.worst_db is None or other.worst_db < self.worst_db):
            self.worst_db, self.worst = other.worst_db, other.worst


@dataclass
class QuantizeReport:
    """The outcome of `quantize_model`.

    Attributes:
        source, destination, format, output: what was asked.
        source_bytes, output_bytes: tensor bytes of the whole model before and after.
        quantized_source_bytes, quantized_bytes: the same of the quantised matrices alone.
        shards, resumed_shards: files of the result, and how many of them an earlier run had finished.
        sqnr: by kind of projection; empty for a dry run.
        never_routed: calibration only: experts no calibration token reached, by container module; they got the layer's largest scale.
        calibration_tokens: tokens run through the model, None without calibration.
        dry_run: nothing was written.
    """

    source: str
    destination: str
    format: str
    output: str
    source_bytes: int
    output_bytes: int
    quantized_source_bytes: int
    quantized_bytes: int
    matrices: int
    shards: int
    resumed_shards: int = 0
    sqnr: dict[str, Sqnr] = field(default_factory=dict)
    never_routed: dict[str, list[int]] = field(default_factory=dict)
    calibration_tokens: int | None = None
    dry_run: bool = False

    def add_sqnr(self, by_kind: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the record of one shard (`Sqnr` as dicts, by kind)."""
        for kind, values in by_kind.items():
            self.sqnr.setdefault(kind, Sqnr()).merge(Sqnr(**values))

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; `sqnr` gains `mean_db`."""
        sqnr = {
            kind: {"matrices": s.matrices, "mean_db": s.mean_db, "worst_db": s.worst_db, "worst": s.worst} for kind, s in sorted(self.sqnr.items())
        }
        return asdict(self) | {"sqnr": sqnr}

    def __str__(self) -> str:
        verb = "would become" if self.dry_run else "became"
        lines = [
            f"{self.source} {verb} {self.destination}: {self.format}, {self.output}, {self.shards} shards"
            + (f" ({self.resumed_shards} from an earlier run)" if self.resumed_shards else ""),
            f"whole model        {_size(self.source_bytes)} -> {_size(self.output_bytes)}  ({self.output_bytes / self.source_bytes:.1%})",
            f"quantised matrices {_size(self.quantized_source_bytes)} -> {_size(self.quantized_bytes)}"
            f"  ({self.quantized_bytes / self.quantized_source_bytes:.1%}), {self.matrices} of them",
        ]
        if self.sqnr:
            lines.append(f"{'SQNR':22} {'mean dB':>8} {'worst dB':>9}  worst matrix")
        lines += [
            f"{kind:22} {decibels(s.mean_db):>8} {decibels(s.worst_db):>9}  {s.worst or 'all exact or zero'}" for kind, s in sorted(self.sqnr.items())
        ]
        if self.calibration_tokens is not None:
            lines.append(f"input scales from {self.calibration_tokens} tokens")
        lines += [f"never routed to in {experts}: experts {', '.join(map(str, ids))}" for experts, ids in self.never_routed.items()]
        return "\n".join(map(printable, lines))


def decibels(value: float | None) -> str:
    """Two decimals; "-" for what was not measured."""
    return "-" if value is None else f"{value:.2f}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:8.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:8.2f} MB"
