"""What `make test` leaves to `make test-slow`.

A test is slow if it takes more than about a second of CPU time while something quicker looks at the same part of halfbyte: kernels compiled for a
GPU beyond the quickest of their kind, whole models under torch.compile, servers, processes that import torch, the quality of the demo model,
damage at random. It has the mark `slow`, or is a `slow_case`. Every folder of tests has some that are quick.
"""

from __future__ import annotations

from typing import Any

import pytest


def slow_case(*values: object) -> Any:
    """A case of `pytest.mark.parametrize` that is slow, beside others that are quick."""
    return pytest.param(*values, marks=pytest.mark.slow)
