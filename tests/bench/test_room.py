"""What there is no memory for is said before it is made, as Linux would kill the process later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from halfbyte.bench import room
from halfbyte.bench.ceilings import Ceilings
from halfbyte.bench.inputs import random_call, random_experts
from halfbyte.bench.prepare import bench_prepare
from halfbyte.bench.quantize import QuantizeCase, bench_quantize
from halfbyte.bench.shapes import MoEShape
from halfbyte.device import free_bytes
from halfbyte.errors import UnsupportedError
from halfbyte.formats import NVFP4


def test_what_is_free_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda device: 10**9)
    room.check_room(10**9, torch.device("cpu"), "it")
    with pytest.raises(UnsupportedError, match=r"no memory for it \(given 1\.0 GB free on cpu; needed 2\.5 GB\)\. Ask for less"):
        room.check_room(2_500_000_000, torch.device("cpu"), "it")
    monkeypatch.setattr(room, "free_bytes", lambda device: None)
    room.check_room(1 << 80, torch.device("cpu"), "what nobody knows")


def test_free_memory_is_some_of_the_machine() -> None:
    assert 1 << 20 < (free_bytes(torch.device("cpu")) or 0) < 1 << 50


CPU, SHAPE = torch.device("cpu"), MoEShape("tiny", 64, 32, 4, 2)
MANY = 10**12


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: random_experts(replace(SHAPE, num_experts=MANY), NVFP4, CPU, seed=0), "the experts of tiny"),
        (lambda: random_call(SHAPE, MANY, "uniform", CPU, seed=0), f"{MANY} tokens"),
        (lambda: next(bench_prepare("tiny", random_experts(SHAPE, NVFP4, CPU, seed=0), "hopper", 1.0, layers=MANY)), f"{MANY} layers"),
        (
            lambda: next(bench_quantize([QuantizeCase(MANY, 64, "nvfp4", "linear")], ["halfbyte"], CPU, Ceilings(1.0, 1.0, 1.0, None))),
            f"1 x {MANY} rows of 64",
        ),
    ],
    ids=["experts", "tokens", "layers", "rows"],
)
def test_benchmarks_ask_first(make: Callable[[], object], what: str) -> None:
    with pytest.raises(UnsupportedError, match=f"no memory for {what} "):
        make()
