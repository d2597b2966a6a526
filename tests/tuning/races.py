"""A layer on a GPU that is not there, and races on it whose times follow from sizes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from halfbyte.bench.shapes import MoEShape
from halfbyte.device import Target
from halfbyte.formats import NVFP4
from halfbyte.tuning.layer import Layer
from halfbyte.tuning.times import Time

H200 = Target("NVIDIA H200", "sm_90", 132, 50 << 20, 4600.0)
H100 = Target("NVIDIA H100 80GB HBM3", "sm_90", 132, 50 << 20, 3350.0)
H20 = Target("NVIDIA H20", "sm_90", 78, 60 << 20, 4000.0)
SHAPE = MoEShape("small", 512, 256, 32, 4)


def layer(target: Target = H200, activations: str = "bf16", **sizes: Any) -> Layer:
    return Layer(replace(SHAPE, **sizes), NVFP4, activations, target)


def cost_us(config: Any, num_tokens: int) -> float:
    """Fastest are tiles of as many rows as an expert has."""
    rows = max(1.0, num_tokens * SHAPE.top_k / SHAPE.num_experts)
    return 100.0 * (1.0 + abs(math.log2(config.max_rows / rows)))


class Races:
    """What `marshal.Marshal` is to a search; `broken` configurations have no time."""

    def __init__(self, cost: Callable[[Any, int], float] = cost_us, broken: Sequence[Hashable] = ()):
        self.cost, self.broken = cost, broken
        self.raced: list[tuple[int, str]] = []

    def ceilings(self) -> dict[str, float | None]:
        return {"read_gbps": 4600.0, "copy_gbps": 4000.0, "bf16_tflops": 800.0, "fp8_tflops": 1600.0}

    def __call__(self, num_tokens: int, routing: str, configs: Sequence[Hashable]) -> dict[Hashable, Time]:
        self.raced.append((num_tokens, routing))
        return {config: Time(reason="broken") if config in self.broken else Time(self.cost(config, num_tokens), 0.001) for config in configs}


class Racing:
    """Every layer's races are `races`."""

    def __init__(self, races: Any = None):
        self.races = Races() if races is None else races

    def announce(self, layer: Layer, heats: Any) -> None: ...

    def open(self, layer: Layer, deadline: float) -> Any:
        return self.races

    def close(self) -> None: ...
