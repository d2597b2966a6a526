"""Whether there is memory for what a benchmark is about to make. Linux gives out more than it has, and then kills whoever uses it."""

from __future__ import annotations

import torch

from halfbyte.device import free_bytes
from halfbyte.errors import UnsupportedError


def check_room(nbytes: int, device: torch.device, what: str) -> None:
    """Raise UnsupportedError where `device` has less memory left than `what` takes at least."""
    free = free_bytes(device)
    if free is not None and nbytes > free:
        given, needed = f"{free / 1e9:.1f} GB free on {device}", f"{nbytes / 1e9:.1f} GB"
        raise UnsupportedError(f"no memory for {what}", given=given, needed=needed, next_step="ask for less at a time")
