"""The threads in which torch packs on a CPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_equal_bits
from random_experts import make_experts

import halfbyte as hb
from halfbyte.weights.hopper import pack_torch


def test_threads_of_the_packer_have_one_thread_each_and_leave_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    w = make_experts(5, 256, 192, hb.NVFP4)
    expected = hb.prepare(w, "hopper").storage.tensors
    before, seen, pack = torch.get_num_threads(), set(), pack_torch._pack_row_tiles

    def watched(*tensors: torch.Tensor) -> None:
        seen.add((threading.get_ident(), torch.get_num_threads()))
        pack(*tensors)

    monkeypatch.setattr(pack_torch, "_pack_row_tiles", watched)
    torch.set_num_threads(3)
    try:
        packed = hb.prepare(w, "hopper").storage.tensors
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)
    assert {num_threads for _, num_threads in seen} == {1} and threading.get_ident() not in dict(seen)
    for name, tensor in expected.items():
        assert_equal_bits(packed[name], tensor)


def test_an_error_in_a_thread_is_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*tensors: torch.Tensor) -> None:
        raise MemoryError("in a thread")

    monkeypatch.setattr(pack_torch, "_pack_row_tiles", broken)
    with pytest.raises(MemoryError, match="in a thread"):
        hb.prepare(make_experts(2, 64, 64, hb.NVFP4), "hopper")
