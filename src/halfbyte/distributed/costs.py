"""What a dispatch and a combine take, as latency and bandwidth, and which way is shortest. All ranks hold the same numbers, so all choose alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from halfbyte.distributed.wire import Wire


@dataclass(frozen=True)
class Line:
    """microseconds = latency_us + bytes / (1000 * gbps)."""

    latency_us: float
    gbps: float

    def us(self, nbytes: float) -> float:
        return self.latency_us + nbytes / (1e3 * self.gbps)


@dataclass(frozen=True)
class Costs:
    """Lines of each step, by name of the transport; the defaults are measurements on two H200 (NVLink), in CUDA graphs (docs/distribution.md).

    Attributes:
        dispatch, combine: over the bytes that the busiest rank receives from others.
        encode: what quantising before the dispatch adds, over the bytes of the floats; what the layer then need not quantise is not counted.
    """

    dispatch: dict[str, Line] = field(default_factory=lambda: {"nccl": Line(12.0, 169.0), "gloo": Line(400.0, 1.0), "symmetric": Line(5.9, 358.0)})
    combine: dict[str, Line] = field(default_factory=lambda: {"nccl": Line(9.6, 223.0), "gloo": Line(400.0, 1.0), "symmetric": Line(5.7, 325.0)})
    encode: dict[str, Line] = field(default_factory=lambda: {"nccl": Line(4.0, 3000.0), "gloo": Line(0.0, 1.0), "symmetric": Line(0.7, 1e5)})

    def dispatch_us(self, transport: str, wire: Wire, sizes: Sequence[int]) -> float:
        """Of rows on this wire, `sizes` of them from every rank; ids and weights are not counted.

        >>> costs = Costs()
        >>> costs.dispatch_us("symmetric", Wire("fp4", 7168), [4096, 4096]) < costs.dispatch_us("symmetric", Wire("bf16", 7168), [4096, 4096])
        True
        """
        received = sum(sizes) - min(sizes)
        encoding = 0.0 if wire.payload == "bf16" else self.encode[transport].us(max(sizes) * wire.hidden * wire.dtype.itemsize)
        return self.dispatch[transport].us(received * wire.row_bytes) + encoding

    def combine_us(self, transport: str, row_bytes: int, sizes: Sequence[int]) -> float:
        """Of partial sums of `row_bytes` each: the busiest rank takes its rows from all others.

        >>> Costs().combine_us("symmetric", 14336, [0, 0])
        5.7
        """
        return self.combine[transport].us((len(sizes) - 1) * max(sizes) * row_bytes)


def cheapest(costs: Costs, ways: Sequence[tuple[str, Wire]], sizes: Sequence[int], partial_bytes: int) -> tuple[str, Wire]:
    """The transport and the wire with the least dispatch and combine together; of equals, the first.

    >>> ways = [("symmetric", Wire("bf16", 7168)), ("symmetric", Wire("fp4", 7168))]
    >>> [cheapest(Costs(), ways, [rows, rows], 14336)[1].payload for rows in (4096, 1)]
    ['fp4', 'bf16']
    """
    return min(ways, key=lambda way: costs.dispatch_us(way[0], way[1], sizes) + costs.combine_us(way[0], partial_bytes, sizes))
