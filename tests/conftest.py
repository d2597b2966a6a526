"""In what order tests run, lines after them about those that need a GPU or are slow, and a fixture."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch

# The longest files of `make test` and `make test-slow`, the longest first, so that none of them runs alone at the end.
FIRST = [
    "kernels/sm90/test_compile.py",
    "cli/test_serve.py",
    "fuzz/test_fuzz.py",
    "kernels/portable/test_gemm.py",
    "eval/test_evaluate.py",
    "integrations/test_transformers_parallel.py",
    "moe/test_compile.py",
    "distributed/test_symmetric.py",
    "checkpoint/families/test_support_table.py",
    "kernels/quantizers/test_fp4.py",
    "weights/hopper/test_pack_kernels.py",
    "moe/test_parallel.py",
    "moe/test_warm.py",
    "integrations/test_transformers_compile.py",
    "test_documents.py",
]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr == "gpu":  # neighbours need the same kernels: shuffled, processes do not compile them all at the same time
        items.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
    else:
        place = {f"tests/{file}": number for number, file in enumerate(FIRST)}
        items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(FIRST)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())]
    without_gpu = sum("GPU" in reason for reason in reasons)
    if without_gpu:
        terminalreporter.write_line(
            f"{without_gpu} tests need a GPU, which is not here: to skip them is right. `make test-gpu` runs them where there is one."
        )
    if terminalreporter.config.option.markexpr == "not slow":
        terminalreporter.write_line("Slow tests were left out: `make test-slow` runs them.")


@pytest.fixture
def uninitialised_memory_shows() -> Iterator[None]:
    """It is NaN, or the largest integer: what a kernel forgets to write, between two kernels too, is not zero by luck."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # `use_deterministic_algorithms` would import the compiler of torch, for seconds
    yield
    torch.set_deterministic_debug_mode(before)
