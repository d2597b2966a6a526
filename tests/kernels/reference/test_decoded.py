"""Experts that the reference decodes once for many calls."""

from __future__ import annotations

import threading

import pytest
import torch

import halfbyte as hb
from halfbyte.formats import QuantTensor
from halfbyte.kernels.reference.decoded import decoded_once

EXPERT_BYTES = 4 * 3 * 32 * 64  # both matrices, in fp32


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many experts each call of `dequantize` decoded."""
    counts: list[int] = []
    dequantize = QuantTensor.dequantize

    def counted(weight: QuantTensor, dtype: torch.dtype) -> torch.Tensor:
        counts.append(weight.shape[0])
        return dequantize(weight, dtype)

    monkeypatch.setattr(QuantTensor, "dequantize", counted)
    return counts


def layer(format: hb.BlockFormat) -> hb.PreparedExperts:
    w13, w2 = torch.randn(4, 2 * 32, 64), torch.randn(4, 64, 32)
    return hb.prepare(hb.ExpertWeights(hb.quantize(w13, format), hb.quantize(w2, format)))


def through(experts: hb.PreparedExperts, *ids: int) -> torch.Tensor:
    """A token through each of these experts."""
    hidden = torch.linspace(-1, 1, 64).expand(len(ids), 64).contiguous()
    return hb.fused_moe(hidden, experts, torch.tensor(ids)[:, None], torch.ones(len(ids), 1))


@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
def test_each_expert_is_decoded_once_and_gives_the_same_bits(format: hb.BlockFormat, decodings: list[int]) -> None:
    experts, other = layer(format), layer(format)
    expected = through(experts, 2, 1, 3), through(other, 1)
    decodings.clear()
    with decoded_once(1 << 20):
        results = [through(experts, *ids) for ids in [(1,), (2, 1, 3), (3, 2), (2, 1, 3)]]
        assert decodings == [1, 1, 2, 2]
        assert torch.equal(results[1], expected[0]) and torch.equal(results[3], expected[0])
        assert torch.equal(through(other, 1), expected[1])  # another layer has experts of its own
    through(experts, 1)
    assert decodings[-2:] == [1, 1]  # nothing is kept beyond


def test_no_more_is_kept_than_allowed(decodings: list[int]) -> None:
    experts = layer(hb.NVFP4)
    expected = through(experts, 0, 1, 2)
    decodings.clear()
    with decoded_once(2 * EXPERT_BYTES):
        results = [through(experts, *ids) for ids in [(0,), (1,), (0, 1, 2), (0, 1, 2)]]
    assert decodings == [1] * 8  # expert 2 is decoded by each of the last calls
    assert torch.equal(results[2], expected) and torch.equal(results[3], expected)


def test_other_threads_keep_nothing(decodings: list[int]) -> None:
    experts = layer(hb.MXFP4)
    with decoded_once(1 << 20):
        for _ in range(2):
            thread = threading.Thread(target=through, args=(experts, 0))
            thread.start()
            thread.join()
    assert decodings == [1] * 4
