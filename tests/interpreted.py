"""Kernels in Triton's interpreter, without a GPU.

Triton decides at import whether kernels are interpreted, so they are in a process of their own with TRITON_INTERPRET=1: it runs the tests marked
`numeric` of the test file that asks for it, which run on a GPU too, or a script.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU and not INTERPRETED else "cpu"
TIMEOUT_S = 1800  # many times what the slowest file takes alone: it ends what hangs, not what shares two cores with others
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")


def numeric(test: Callable) -> Callable:
    """Runs interpreted and on a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not (INTERPRETED or HAS_GPU), reason="no CUDA GPU (test_interpreted runs these on the CPU)")(test))


def gpu_only(test: Callable) -> Callable:
    return pytest.mark.gpu(pytest.mark.skipif(INTERPRETED or not HAS_GPU, reason="no CUDA GPU")(test))


def run_interpreted(file: str) -> int:
    """Run the tests marked `numeric` of a test file, interpreted. None may fail; returns how many passed."""
    result = _run("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:xdist", file)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    return int(re.findall(r"\b(\d+) passed", result.stdout)[-1])


def run_interpreted_script(file: Path | str) -> None:
    """Run a script, interpreted, that asserts and at its end prints "ok"."""
    result = _run(str(file))
    assert result.returncode == 0 and result.stdout.strip() == "ok", result.stdout[-2000:] + result.stderr[-2000:]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    """Python with the import path of the tests, without the settings of the pytest that runs them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
