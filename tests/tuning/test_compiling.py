"""Kernels compiled in other processes are those that calls on the device look for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compile_only import compiling

pytest.importorskip("triton")

import triton
from races import SHAPE, layer

import halfbyte as hb
from halfbyte.bench.inputs import random_experts
from halfbyte.kernels.sm90.configs import DECODE, DIRECT, FP8_TINY, HUGE, MEDIUM, TINY
from halfbyte.tuning.compiling import Compilation, jobs_of, kernels_passed_over


@pytest.mark.parametrize(("activations", "calls"), [("bf16", [(DIRECT, 3), (TINY, 40), (MEDIUM, 9000)]), ("fp8", [(FP8_TINY, 5)])])
def test_the_jobs_are_what_calls_need(activations: str, calls: list[tuple[Any, int]]) -> None:
    example = layer(activations=activations)
    keys = {job.key for job in jobs_of(example, calls)}
    storage = hb.prepare(random_experts(SHAPE, hb.NVFP4, torch.device("cpu"), 0), str(example.problem.layout)).storage
    needed: set[str] = set()

    def note(key: str) -> bool:
        needed.add(key)
        return True

    with compiling(90), kernels_passed_over(note):
        for config, num_tokens in calls:
            ids = torch.zeros((num_tokens, SHAPE.top_k), dtype=torch.int32)
            hidden, weights = torch.zeros((num_tokens, SHAPE.hidden), dtype=torch.bfloat16), torch.ones(ids.shape, dtype=torch.float32)
            example.kernel.run(hidden, storage, ids, weights, activations=activations, config=config)
    assert keys == needed and len(keys) >= 3


def test_the_longest_are_compiled_first_and_each_once() -> None:
    jobs = jobs_of(layer(), [(DECODE, 40), (TINY, 40), (HUGE, 9000), (TINY, 41)])
    assert [job.config for job in jobs[:3]] == [HUGE] * 3 and len({job.key for job in jobs}) == len(jobs)


@pytest.mark.slow
def test_processes_fill_the_cache_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    compilation = Compilation(processes=1)
    try:
        futures = compilation.start(layer(), [(DIRECT, 2)])
        assert len(futures) == 3 and [future.result(timeout=600) for future in futures] == [None] * 3
    finally:
        compilation.stop()
    hits: list[bool] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **others: hits.append(cache_hit))
    from halfbyte.tuning import compiling as module

    module._call(layer(), DIRECT, 2)
    assert hits == [True] * 3
