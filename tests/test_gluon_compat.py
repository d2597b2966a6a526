"""The keys by which Triton finds compiled kernels on disk, whichever kernel a process launches first."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest
from forked import cache_keys, context

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


def test_keys_of_kernels_do_not_depend_on_their_order() -> None:
    """It does in Triton 3.6 and 3.7 without `fix_cache_keys`, and what one process compiled, another would compile again."""
    with ProcessPoolExecutor(mp_context=context, max_tasks_per_child=1) as processes:
        first, second = processes.map(cache_keys, (KERNELS, KERNELS[::-1]))
    assert len(first) == len(KERNELS) and first == second
