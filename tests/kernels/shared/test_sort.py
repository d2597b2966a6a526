"""Sort, gather and combine, interpreted on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreted import run_interpreted_script

pytest.importorskip("triton")


def test_interpreted_kernels_agree_with_plain_python() -> None:
    run_interpreted_script(Path(__file__).with_name("interpreted_sort.py"))
