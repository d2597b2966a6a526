"""An independent reader of written checkpoints: safetensors, json and a table of sixteen numbers, nothing of halfbyte."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

ELEMENTS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor the index names, from the file it names."""
    weight_map = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_file(path / name) for name in set(weight_map.values())}
    assert sum(map(len, files.values())) == len(weight_map)
    return {name: files[file][name] for name, file in weight_map.items()}


def dequantize(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """(element * block scale) * global scale in fp32."""
    codes = tensors[f"{module}.weight_packed" if f"{module}.weight_packed" in tensors else f"{module}.weight"].long()
    elements = ELEMENTS[torch.stack([codes & 15, codes >> 4], dim=-1)].flatten(1)
    scale = tensors[f"{module}.weight_scale"]
    scale = scale.float() if scale.dtype == torch.float8_e4m3fn else 2.0 ** (scale.float() - 127)
    factor = tensors.get(f"{module}.weight_scale_2", torch.tensor(1.0))
    if f"{module}.weight_global_scale" in tensors:
        factor = 1 / tensors[f"{module}.weight_global_scale"]
    return (elements.unflatten(1, (scale.shape[1], -1)) * scale[..., None] * factor).flatten(1)
