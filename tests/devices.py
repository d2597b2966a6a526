"""Tests that need a GPU of one kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = [pytest.mark.gpu, pytest.mark.skipif(not HAS_HOPPER, reason="no GPU of compute capability 9.0")]


def on_hopper(test: Callable) -> Callable:
    for mark in hopper:
        test = mark(test)
    return test
