"""A conversion computed on a GPU writes the files that a CPU writes."""

from __future__ import annotations

from pathlib import Path

import checkpoint_files as cf
import pytest
import torch

from halfbyte.convert import QuantizeOptions, quantize_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.mark.parametrize("options", [{}, {"four_over_six": True, "output": "compressed-tensors"}, {"format": "mxfp4"}])
def test_same_files_as_on_the_cpu(tmp_path: Path, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    source = cf.dense().write(tmp_path / "in")
    for device in ("cpu", "cuda"):
        quantize_model(source, tmp_path / device, QuantizeOptions(device=device, **options))  # type: ignore[arg-type]
    here, there = ({file.name: file.read_bytes() for file in (tmp_path / device).iterdir()} for device in ("cpu", "cuda"))
    assert here == there
