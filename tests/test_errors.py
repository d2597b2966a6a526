"""What another package raises: the fault of a model's files, unless the machine is to blame."""

from __future__ import annotations

import errno

import pytest
import torch

from halfbyte.errors import CheckpointError, InputError, foreign


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("a size does not fit"), FileNotFoundError(errno.ENOENT, "No such file", "x"), OSError("y")]
)
def test_what_another_package_raises_is_about_the_files(error: Exception) -> None:
    with pytest.raises(CheckpointError, match=r"DIR: it fails: .* Try again"), foreign("it fails", where="DIR", next_step="try again"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        *(MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        *(BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.ENOSPC, "No space left on device"), InputError("ours")),
    ],
)
def test_the_machine_is_not_the_files(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, foreign("it fails", where="DIR", next_step="try again"):
        raise error
    assert raised.value is error
