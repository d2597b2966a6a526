"""Comparison helpers of the test suite. Tolerances are relative, always: see tests/test_helpers.py for what absolute ones let through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def relative_errors(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Worst per-token relative L2 error and global relative L2 error of actual [T, H] against expected [T, H]; NaN counts as infinite.

    A token whose expected row is zero must be exactly zero.
    """
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    actual64, expected64 = actual.double().flatten(0, -2), expected.double().flatten(0, -2)
    if actual64.numel() == 0:
        return 0.0, 0.0
    difference = (actual64 - expected64).nan_to_num(nan=torch.inf).norm(dim=-1)
    norm = expected64.norm(dim=-1)
    token = torch.where(difference == 0, 0.0, difference / norm)  # x/0 is inf: an error where nothing was expected
    total = difference.norm()
    return token.max().item(), 0.0 if total == 0 else (total / norm.norm()).item()


def assert_close_rel(actual: torch.Tensor, expected: torch.Tensor, *, token: float = 1e-2, overall: float = 5e-3) -> None:
    """Assert every token within `token` and the whole within `overall` relative L2 error (defaults: the rule for bf16 kernels)."""
    worst, total = relative_errors(actual, expected)
    assert worst <= token and total <= overall, f"relative L2: worst token {worst:.3e} (limit {token:.0e}), overall {total:.3e} (limit {overall:.0e})"


def assert_equal_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert the same shape, dtype and bytes (so NaN equals NaN, and -0 differs from 0)."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype} != {expected.dtype}"
    different = actual.contiguous().view(torch.uint8) != expected.contiguous().view(torch.uint8)
    assert not different.any(), f"{int(different.sum())} of {different.numel()} bytes differ"


def peak_bytes(function: Callable[[], object], folder: Path) -> int:
    """Largest sum of live CPU tensors during a call of `function`, over what was live before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    trace = folder / "trace.json"
    recorded.export_chrome_trace(str(trace))
    events = [event["args"] for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    before = events[0]["Total Allocated"] - events[0]["Bytes"]
    return max(event["Total Allocated"] for event in events) - before
