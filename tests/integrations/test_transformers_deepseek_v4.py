"""DeepSeek-V4 as it is published: FP4 experts with e8m0 scales, or NVFP4 ones, beside FP8 layers, in its own names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close_rel
from plug_in import EXACT, outputs
from safetensors.torch import load_file, save_file
from saved_models import read_tensors
from tiny_models import COMMON, FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

import halfbyte as hb
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.integrations.packing import is_attached

Tensors = dict[str, torch.Tensor]
EXPERT = re.compile(r"\.ffn\.experts\.\d+\.w[123]\.weight$")
# Linear layers; wo_a is multiplied group by group.
LINEAR = re.compile(r"\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|shared_experts\.w[123])\.weight$")
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}
GROUPS = {"group_0": {"targets": ["re:.*experts.*"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": GROUPS}
FORMS: dict[str, tuple[str, dict, dict]] = {
    "fp4, in the configuration": ("fp4", {"expert_dtype": "fp4"}, FP8),
    "fp4, in its quantisation": ("fp4", {}, {**FP8, "expert_dtype": "fp4"}),
    "fp4, scales in fp32": ("fp4 fp32", {"expert_dtype": "fp4"}, FP8),
    "nvfp4, of the experts": ("modelopt", {"expert_dtype": "fp4"}, {**FP8, "moe_quant_algo": "NVFP4"}),
    "nvfp4, modelopt": ("modelopt", {}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "nvfp4, compressed-tensors": ("nvfp4-pack-quantized", {"expert_dtype": "fp4"}, COMPRESSED),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model in the names of the published files."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v4", **COMMON | FAMILIES["deepseek_v4"]), dtype=torch.float32).eval()
    for name, tensor in model.named_parameters():
        if tensor.ndim >= 2:
            tensor.data.normal_(0, 0.15)
        if name.endswith("gate_up_proj"):
            tensor.data[:, 32:] *= 5
    directory = tmp_path_factory.mktemp("v4")
    model.save_pretrained(directory)
    saved = load_file(directory / "model.safetensors")  # a model that was not loaded keeps a prefix
    tensors = {re.sub(r"^model\.(embed_tokens(?=\.))?", lambda match: "embed" if match[1] else "", name): tensor for name, tensor in saved.items()}
    assert {"embed.weight", "head.weight", "layers.1.ffn.experts.3.w1.weight", "layers.0.attn.wo_a.weight"} <= tensors.keys()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def quantised(name: str, tensor: torch.Tensor, form: str) -> tuple[Tensors, torch.Tensor]:
    """The tensors of one matrix, and the value that they mean."""
    stem = name.removesuffix("weight")
    if LINEAR.search(name):
        scale = torch.tensor(2.0) ** (tensor.abs().max() / 448).log2().ceil()
        codes = (tensor / scale).to(torch.float8_e4m3fn)
        return {name: codes, f"{stem}scale": scale.reshape(1, 1).to(torch.float8_e8m0fnu)}, codes.float() * scale
    q = hb.quantize(tensor, hb.MXFP4 if form.startswith("fp4") else hb.NVFP4)
    if form.startswith("fp4"):
        scales = torch.tensor(2.0) ** (q.scales.float() - 127) if form.endswith("fp32") else q.scales.view(torch.float8_e8m0fnu)
        return {name: q.codes.view(torch.int8), f"{stem}scale": scales}, q.dequantize()
    if form == "modelopt":
        return {name: q.codes, f"{stem}weight_scale": q.scales, f"{stem}weight_scale_2": q.global_scale}, q.dequantize()
    encode = 1 / q.global_scale.reshape(1)
    value = hb.QuantTensor(q.codes, q.scales, 1 / encode[0], hb.NVFP4).dequantize()
    return {f"{stem}weight_packed": q.codes, f"{stem}weight_scale": q.scales, f"{stem}weight_global_scale": encode}, value


def write(source: Path, directory: Path, form: str) -> tuple[Path, Path]:
    """(packed, dense) directories of one published form."""
    layout, fields, quantization = FORMS[form]
    packed, dense = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if EXPERT.search(name) or LINEAR.search(name):
            tensors, dense[name] = quantised(name, tensor, layout)
            packed |= tensors
        else:
            packed[name] = dense[name] = tensor
    config = json.loads((source / "config.json").read_text())
    for name, tensors, further in (("packed", packed, {**fields, "quantization_config": quantization}), ("dense", dense, {})):
        (directory / name).mkdir()
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, directory / name / "model.safetensors", metadata={"format": "pt"})
        (directory / name / "config.json").write_text(json.dumps(config | further))
    return directory / "packed", directory / "dense"


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)


@pytest.mark.parametrize("form", FORMS)
def test_published_forms(source: Path, tmp_path: Path, form: str) -> None:
    packed, dense = write(source, tmp_path, form)
    model = load(packed)
    assert sum(is_attached(module) for module in model.modules()) == 2
    assert_close_rel(outputs(model), outputs(load(dense, experts_implementation="eager")), **EXACT)
    model.save_pretrained(tmp_path / "saved")
    before, after = read_tensors(packed), read_tensors(tmp_path / "saved")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name].float(), tensor.float()), name
    assert_close_rel(outputs(load(tmp_path / "saved")), outputs(model), token=1e-7, overall=1e-7)


def test_scales_that_are_no_powers_of_two_are_refused(source: Path, tmp_path: Path) -> None:
    packed, _ = write(source, tmp_path, "fp4, scales in fp32")
    tensors = load_file(packed / "model.safetensors")
    name = "layers.1.ffn.experts.3.w1.scale"
    tensors[name][2, 1] = 0.3
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}.*power of two.*0\.3"):
        load(packed)


def test_fp4_of_a_layer_that_uses_its_weight_in_its_own_way_is_refused(source: Path, tmp_path: Path) -> None:
    packed, _ = write(source, tmp_path, "nvfp4, modelopt")
    tensors = load_file(packed / "model.safetensors")
    name = "layers.1.attn.wo_a"
    q = hb.quantize(load_file(source / "model.safetensors")[f"{name}.weight"], hb.NVFP4)
    del tensors[f"{name}.scale"]
    tensors |= {f"{name}.weight": q.codes, f"{name}.weight_scale": q.scales, f"{name}.weight_scale_2": q.global_scale}
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(UnsupportedError, match=rf"{re.escape(name)}: DeepseekV4GroupedLinear has no place"):
        load(packed)
