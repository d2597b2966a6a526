"""One line after the tests about those that were skipped because there is no GPU."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())]
    without_gpu = sum("GPU" in reason for reason in reasons)
    if without_gpu:
        terminalreporter.write_line(
            f"{without_gpu} tests need a GPU, which is not here: to skip them is right. `make test-gpu` runs them where there is one."
        )
