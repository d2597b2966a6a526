"""The keys by which Triton finds compiled kernels on disk, whichever kernel a process launches first."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton")

# What a layer launches: the modules have functions in common.
KERNELS = [
    "distributed.kernels.pull_rows",
    "distributed.kernels.push_rows",
    "distributed.exchange.exchange_codes",
    "kernels.quantizers.fp4.quantize_kernel",
    "kernels.quantizers.fp4_experts.quantize_experts_kernel",
    "kernels.quantizers.fp8.quantize_fp8_kernel",
    "kernels.shared.decode_rows._decode",
    "kernels.shared.encode_rows._encode",
    "kernels.sm90.gather._gather",
    "kernels.sm90.expert_rows.grouped_gemm_prefill",
    "kernels.sm90.expert_rows.grouped_gemm_w4a16_decode",
    "kernels.sm90.quantize_rows._quantize_rows",
    "kernels.sm90.quantize_rows._quantize_tokens",
]
KEYS = """
import importlib, sys
for name in sys.argv[1:]:
    module, kernel = name.rsplit(".", 1)
    print(name, getattr(importlib.import_module("halfbyte." + module), kernel).cache_key)
"""


def test_keys_of_kernels_do_not_depend_on_their_order() -> None:
    """It does in Triton 3.6 and 3.7 without `fix_cache_keys`, and what one process compiled, another would compile again."""
    processes = [subprocess.Popen([sys.executable, "-c", KEYS, *names], stdout=subprocess.PIPE, text=True) for names in (KERNELS, KERNELS[::-1])]
    first, second = (process.communicate()[0].splitlines() for process in processes)
    assert all(process.returncode == 0 for process in processes)
    assert len(first) == len(KERNELS) and sorted(first) == sorted(second)
