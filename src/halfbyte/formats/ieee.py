"""Arithmetic that gives the same bits on every device."""

from __future__ import annotations

import torch


def divide(x: torch.Tensor, constant: float) -> torch.Tensor:
    """x / constant, rounded once. On a GPU torch turns division by a Python number into multiplication by its rounded reciprocal.

    >>> divide(torch.tensor([3.0, 1.0]), 2.0).tolist()
    [1.5, 0.5]
    """
    return x / torch.full_like(x, constant)
