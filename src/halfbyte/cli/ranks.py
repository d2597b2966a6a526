"""Commands that run on every rank: `torchrun --nproc-per-node N -m halfbyte ...`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist


def is_torchrun() -> bool:
    """Whether torchrun, or something that sets its variables, started this process as one of several."""
    return "RANK" in os.environ


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """torch.distributed among the ranks of torchrun, unless it is initialised already: the device of this rank, its own GPU where `device` is one."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    is_ours = not dist.is_initialized()
    if is_ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if is_ours:
            dist.destroy_process_group()
