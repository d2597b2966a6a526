"""The quantising kernels, interpreted on the CPU (the interpreter has to be chosen before Triton is imported, so in a process of its own)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_interpreted_kernels_agree_with_the_format_bit_for_bit() -> None:
    script = Path(__file__).with_name("interpreted_activations_fp8.py")
    result = subprocess.run([sys.executable, script], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stdout.strip() == "ok", result.stderr[-2000:]
