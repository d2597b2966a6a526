"""Step-3.7 (and 3.5, its text) as published: gate, up and down of all experts of a layer in three tensors right in a module `moe`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from plug_in import check_plug_in
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import halfbyte as hb
from halfbyte.errors import UnsupportedError

TEXT = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "share_expert_dim": 32,
    "mlp_layer_types": ["dense", "sparse"],
    "sliding_window": 8,
}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 28, "patch_size": 14}


def write(directory: Path, limits: list[float] | None = None) -> tuple[Path, Path]:
    """(packed, dense) directories: experts in ModelOpt NVFP4 with a global scale per expert."""
    torch.manual_seed(0)
    text = CONFIG_MAPPING["step3p5"](**TEXT, swiglu_limits=limits)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING["step3p7"](text_config=text.to_dict(), vision_config=VISION), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    model.save_pretrained(directory / "source")
    packed, dense = {}, {}
    for name, tensor in load_file(directory / "source" / "model.safetensors").items():
        if re.search(r"\.moe\.(gate|up|down)_proj\.weight$", name):
            q = hb.quantize(tensor, hb.NVFP4)
            packed |= {name: q.codes, f"{name}_scale": q.scales, f"{name}_scale_2": q.global_scale}
            dense[name] = q.dequantize()
        else:
            packed[name] = dense[name] = tensor
    assert len(packed) == len(dense) + 6
    config = json.loads((directory / "source" / "config.json").read_text())
    quantization = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    for path, tensors, further in ((directory / "packed", packed, quantization), (directory / "dense", dense, {})):
        path.mkdir()
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config | further))
    return directory / "packed", directory / "dense"


def test_logits_and_saved_files(tmp_path: Path) -> None:
    check_plug_in(*write(tmp_path), AutoModelForImageTextToText)


def test_a_layer_with_a_limit_is_refused(tmp_path: Path) -> None:
    """silu(gate) is clamped behind the function there."""
    packed, _ = write(tmp_path, [0.0, 7.0])
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.experts: the activation.*Step3p7Experts"):
        AutoModelForImageTextToText.from_pretrained(packed)
