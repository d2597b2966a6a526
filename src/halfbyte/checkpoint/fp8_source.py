"""fp8-block weights of a checkpoint, e4m3 with the scales of their tiles beside them: everything that can be wrong with one is an error by name."""

from __future__ import annotations

import torch

from halfbyte.checkpoint.dialects import FP8_BLOCK, fp8_scales_of
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.errors import CheckpointError
from halfbyte.formats import e4m3, fp8_block


def read_fp8_block(checkpoint: Checkpoint, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The e4m3 weight [N, K] called `name`, which has no NaN, and its fp32 scales, which are usable.

    Raises:
        CheckpointError: see `read_fp8_scales`; a NaN weight.
    """
    scales, weight = read_fp8_scales(checkpoint, name), checkpoint.read(name)
    if e4m3.has_nan(weight):
        raise _broken(checkpoint, name, "NaN weights", given="byte 0x7f or 0xff", needed="finite weights")
    return weight, scales


def read_fp8_scales(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """The fp32 scales of the tiles of the e4m3 weight called `name`. No weight is read.

    Raises:
        CheckpointError: the weight is no e4m3 matrix; its scales are missing, of another dtype or shape, or not positive finite numbers.
    """
    dtype, shape = checkpoint.dtype_shape(name)
    if dtype != torch.float8_e4m3fn or len(shape) != 2:
        raise _broken(checkpoint, name, "no fp8-block weight", given=f"{dtype} {shape}", needed="e4m3 [N, K]")
    scales = fp8_scales_of(name)
    tiles = fp8_block.scale_shape(*shape)
    needed = f"{' or '.join(str(known).removeprefix('torch.') for known in FP8_BLOCK.scale_dtypes)} {tiles}"
    if scales not in checkpoint:
        raise _broken(checkpoint, scales, "missing tensor", given=f"{name} in e4m3", needed=needed)
    dtype, given = checkpoint.dtype_shape(scales)
    if dtype not in FP8_BLOCK.scale_dtypes or given != tiles:
        raise _broken(checkpoint, scales, "fp8 block scales do not cover their weight", given=f"{dtype} {given}", needed=needed)
    values = checkpoint.read(scales).float()
    if not bool(((values > 0) & values.isfinite()).all()):
        raise _broken(checkpoint, scales, "fp8 block scales are not positive finite numbers", given=f"smallest {values.min().item()}")
    return values


def _broken(checkpoint: Checkpoint, name: str, problem: str, *, given: str, needed: str | None = None) -> CheckpointError:
    file = checkpoint.file_of(name) if name in checkpoint else checkpoint.path
    return CheckpointError(f"{problem}: {name}", where=str(file), given=given, needed=needed, next_step="download or export the model again")
