"""The host's time of calls, measured where there is no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/host_time.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose driver would be taken")
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
def test_launches_end_in_a_driver_that_does_nothing() -> None:
    pytest.importorskip("triton")
    options = ["--tokens", "1", "--activations", "bf16", "--layers", "2", "--seconds", "0"]
    result = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| bf16")]
    assert [row[:3] for row in rows] == [["bf16", "1", "yes"], ["bf16", "1", "no"]]
    assert all(0 < float(shortest) <= float(median) for *_, shortest, median in rows)
