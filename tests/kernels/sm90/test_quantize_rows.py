"""The quantising kernels, interpreted on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreted import run_interpreted_script

pytest.importorskip("triton")


def test_interpreted_kernels_agree_with_the_format_bit_for_bit() -> None:
    run_interpreted_script(Path(__file__).with_name("interpreted_quantize_rows.py"))
