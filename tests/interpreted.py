"""Kernels in Triton's interpreter, without a GPU.

Triton decides at import whether kernels are interpreted, so they are in a process of their own: it runs the tests marked `numeric` of the test file
that asks for it, which run on a GPU too, or a script.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import interpret, run_script, run_tests

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not INTERPRETED else "cpu"
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")


def numeric(test: Callable) -> Callable:
    """Runs interpreted and on a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not (INTERPRETED or HAS_GPU), reason="no CUDA GPU (test_interpreted runs these on the CPU)")(test))


def gpu_only(test: Callable) -> Callable:
    return pytest.mark.gpu(pytest.mark.skipif(INTERPRETED or not HAS_GPU, reason="no CUDA GPU")(test))


def run_interpreted(file: str) -> int:
    """Run the tests marked `numeric` of a test file, interpreted. None may fail; returns how many passed."""
    return int(re.findall(r"\b(\d+) passed", interpret(run_tests, file))[-1])


def run_interpreted_script(file: Path | str) -> None:
    """Run a script, interpreted, that asserts and at its end prints "ok"."""
    printed = interpret(run_script, str(file))
    assert printed.endswith("ok\n"), printed
