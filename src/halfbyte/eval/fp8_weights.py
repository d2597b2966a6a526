"""What fp8 tensor cores round off the FP4 experts of a checkpoint."""

from __future__ import annotations

import torch

from halfbyte.checkpoint.load import ExpertReader
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.weights.hopper.rounding_fp8 import WeightError, weight_error


def fp8_weight_error(
    checkpoint: Checkpoint, layer: int, *, device: torch.device | str = "cpu", experts: range | None = None
) -> dict[str, WeightError]:
    """Measure what fp8 tensor cores (`activations="fp8"` on Hopper, many tokens) round off one layer's "w13" and "w2"; {} for dense experts.

    Reads one expert at a time and works on `device`.

    Raises:
        CheckpointError, UnsupportedError, InputError: as `load_experts`.
    """
    reader = ExpertReader(checkpoint, layer, experts)
    if reader.format is None:
        return {}
    total, buffer = {"w13": WeightError(), "w2": WeightError()}, reader.allocate("cpu", 1)
    for expert in reader.experts:
        reader.read(range(expert, expert + 1), buffer)
        for name, error in weight_error(buffer.to(device)).items():
            total[name] += error
    return total
