"""The package flashinfer-python: whether it is there, and its modules, imported when a layer first runs."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
from typing import Any

DISTRIBUTION = "flashinfer-python"
OLDEST = "0.6.12"  # as in pyproject.toml: the oldest release with whose functions the tests compare the calls


@functools.cache
def refusal() -> str | None:
    """Why the package cannot be used, or None. Imports nothing."""
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return f"needs the package {DISTRIBUTION}, which is not installed"
    return f"needs {DISTRIBUTION} {OLDEST} or newer, this is {version}" if _numbers(version) < _numbers(OLDEST) else None


def flashinfer() -> Any:
    """The module itself: `trtllm_fp4_block_scale_routed_moe`, `cutlass_fused_moe` and `ActivationType` are what is used of it."""
    return importlib.import_module("flashinfer")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
