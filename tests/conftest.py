"""In what order tests run; and one line after them about those that were skipped because there is no GPU."""

from __future__ import annotations

import zlib

import pytest

# The longest files, so that none of them runs alone at the end.
FIRST = [
    "kernels/sm90/test_compile.py",
    "kernels/quantizers/test_fp4.py",
    "kernels/portable/test_gemm.py",
    "cli/test_serve.py",
    "eval/test_evaluate.py",
    "moe/test_compile.py",
    "fuzz/test_fuzz.py",
]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr == "gpu":  # neighbours need the same kernels: shuffled, processes do not compile them all at the same time
        items.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
    else:
        items.sort(key=lambda item: not item.nodeid.startswith(tuple(f"tests/{file}" for file in FIRST)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())]
    without_gpu = sum("GPU" in reason for reason in reasons)
    if without_gpu:
        terminalreporter.write_line(
            f"{without_gpu} tests need a GPU, which is not here: to skip them is right. `make test-gpu` runs them where there is one."
        )
