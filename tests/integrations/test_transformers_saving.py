"""`save_pretrained` of packed models: the files are those that were loaded, byte for byte, or nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from helpers import assert_equal_bits
from safetensors.torch import load_file, save_file
from saved_models import assert_same_checkpoint, assert_same_state, read_tensors
from tiny_models import build, write
from transformers import AutoModelForCausalLM

import halfbyte as hb
import halfbyte.integrations.transformers  # registers halfbyte
from halfbyte.checkpoint.defects import find_defects
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.errors import CheckpointError, InputError, UnsupportedError
from halfbyte.integrations import packing

Tensors = dict[str, torch.Tensor]
CASES = [
    ("qwen3_moe", "modelopt"),
    ("qwen3_moe", "nvfp4-pack-quantized"),
    ("qwen3_moe", "mxfp4-pack-quantized"),
    ("mixtral", "modelopt"),
    ("deepseek_v3", "nvfp4-pack-quantized"),
    ("glm4_moe", "modelopt"),
    ("qwen3_next", "mxfp4-pack-quantized"),
    ("gpt_oss", "gpt-oss"),
]


def load(directory: Path, **options: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)


def edit(directory: Path, change: Callable[[Tensors], object], **quantization: object) -> Path:
    tensors, config = load_file(directory / "model.safetensors"), json.loads((directory / "config.json").read_text())
    change(tensors)
    config["quantization_config"] |= quantization
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The FP4 directory of a family and output, written once."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, output: str) -> Path:
        if (family, output) not in made:
            made[family, output] = write(build(family), output, tmp_path_factory.mktemp(family), all_linear=family != "gpt_oss")[0]
        return made[family, output]

    return get


@pytest.fixture
def source(written: Callable[[str, str], Path], tmp_path: Path) -> Path:
    """A copy of Qwen3-MoE in ModelOpt NVFP4, to be edited."""
    return Path(shutil.copytree(written("qwen3_moe", "modelopt"), tmp_path / "source"))


@pytest.mark.parametrize(("family", "output"), CASES)
def test_saved_files_are_those_that_were_loaded(written, tmp_path: Path, family: str, output: str) -> None:
    source, saved = written(family, output), tmp_path / "saved"
    model = load(source)
    model.save_pretrained(saved)
    assert_same_checkpoint(saved, source)
    assert_same_state(load(saved), model)
    checkpoint = Checkpoint.open(saved)
    assert not [defect for defect in find_defects(checkpoint) if defect.severity == "error"]
    for layer in checkpoint.moe.moe_layers:
        before, after = (hb.load_experts(path, layer, device="cpu") for path in (source, saved))
        for name, tensor in before.tensors.items():
            assert_equal_bits(torch.atleast_1d(after.tensors[name]), torch.atleast_1d(tensor))


@pytest.mark.parametrize(("family", "output"), [("qwen3_moe", "modelopt"), ("gpt_oss", "gpt-oss")])
def test_experts_packed_in_place_are_saved_as_they_came(written, tmp_path: Path, family: str, output: str) -> None:
    model = load(written(family, output))
    for module in model.modules():
        if packing.is_attached(module):
            packing.pack_in_place(module, "hopper")
    model.save_pretrained(tmp_path / "saved")
    assert any(packing.is_attached(module) and module.halfbyte.replaced for module in model.modules())
    assert_same_checkpoint(tmp_path / "saved", written(family, output))


def test_what_was_changed_is_saved_changed(written, tmp_path: Path) -> None:
    model = load(written("qwen3_moe", "modelopt"))
    model.model.layers[1].mlp.experts.gate_up_proj_scale_2[3, 1] = 0.5
    model.save_pretrained(tmp_path / "saved")
    expected, given = read_tensors(written("qwen3_moe", "modelopt")), read_tensors(tmp_path / "saved")
    assert [name for name in expected if not torch.equal(given[name], expected[name])] == ["model.layers.1.mlp.experts.3.up_proj.weight_scale_2"]
    assert given["model.layers.1.mlp.experts.3.up_proj.weight_scale_2"] == 0.5


def test_several_files(written, tmp_path: Path) -> None:
    source = written("qwen3_moe", "modelopt")
    load(source).save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3 and files == {file.name for file in (tmp_path / "saved").glob("*.safetensors")}
    assert index["weight_map"].keys() == read_tensors(source).keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read_tensors(source).values())
    assert_same_checkpoint(tmp_path / "saved", source)
    assert_same_state(load(tmp_path / "saved"), load(source))


@pytest.mark.parametrize("offloaded", ["cpu", "disk"])
def test_offloaded_layers(written, tmp_path: Path, offloaded: str) -> None:
    """accelerate keeps the tensors of such layers elsewhere; no accelerator is here, so that a layer on the CPU is hooked by hand."""
    source = written("qwen3_moe", "modelopt")
    if offloaded == "disk":
        parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
        device_map = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
        model = load(source, device_map=device_map, offload_folder=str(tmp_path / "offload"))
    else:
        model = load(source)
        cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"))
    assert model.model.layers[1].mlp.experts.down_proj.device.type == "meta"
    model.save_pretrained(tmp_path / "saved")
    assert_same_checkpoint(tmp_path / "saved", source)


@pytest.mark.parametrize("alone", [True, False])
def test_hf_quant_config(source: Path, tmp_path: Path, alone: bool) -> None:
    document = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}}
    (source / "hf_quant_config.json").write_text(json.dumps(document))
    if alone:
        config = json.loads((source / "config.json").read_text())
        del config["quantization_config"]
        (source / "config.json").write_text(json.dumps(config))
    load(source).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "hf_quant_config.json").read_text()) == document
    assert_same_checkpoint(tmp_path / "saved", source)
    assert_same_state(load(tmp_path / "saved"), load(source))


def test_scales_of_activations_and_missing_input_scales(source: Path, tmp_path: Path) -> None:
    """Those of a KV cache, which transformers has no place for, are kept; experts without an input scale have none again."""

    def change(tensors: Tensors) -> None:
        del tensors["model.layers.0.mlp.experts.2.up_proj.input_scale"]
        for part in ("k", "v"):
            tensors[f"model.layers.1.self_attn.{part}_proj.{part}_scale"] = torch.tensor(0.25, dtype=torch.bfloat16)

    edit(source, change)
    load(source).save_pretrained(tmp_path / "saved")
    assert_same_checkpoint(tmp_path / "saved", source)


@pytest.mark.parametrize("scale", ["tensor", "row", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_layers(source: Path, tmp_path: Path, scale: str, dtype: torch.dtype) -> None:
    shape = {"tensor": (), "row": (64, 1), "block": (1, 1)}[scale]

    def change(tensors: Tensors) -> None:
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"):
            for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
                del tensors[f"{name}.{suffix}"]
            tensors[f"{name}.weight"] = torch.randn(64, 64).to(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale" + ("_inv" if scale == "block" else "")] = torch.rand(shape).add(0.5).to(dtype)
            tensors[f"{name}.input_scale"] = torch.tensor(0.125)

    load(edit(source, change)).save_pretrained(tmp_path / "saved")
    assert_same_checkpoint(tmp_path / "saved", source)


def test_awq_and_scalars_of_other_shapes(source: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.1.self_attn.o_proj.pre_quant_scale"] = torch.rand(64).add(0.5).bfloat16()
        for name in [name for name in tensors if re.search(r"layers\.0.*experts\.\d+\.up_proj\.weight_scale_2$", name)]:
            tensors[name] = tensors[name].bfloat16().reshape(1, 1)

    load(edit(source, change, quant_algo="NVFP4_AWQ")).save_pretrained(tmp_path / "saved")
    assert_same_checkpoint(tmp_path / "saved", source)


def test_layers_that_predict_several_tokens_are_left_out(source: Path, tmp_path: Path) -> None:
    mtp = ("mtp.layers.0.mlp.experts.0.up_proj.weight", "mtp.layers.0.norm.weight")
    edit(source, lambda tensors: tensors.update(dict.fromkeys(mtp, torch.ones(4, 4))))
    load(source).save_pretrained(tmp_path / "saved")
    assert_same_checkpoint(tmp_path / "saved", source, absent=frozenset(mtp))


def cast_linear(model: torch.nn.Module) -> None:
    model.model.layers[0].self_attn.q_proj.half()


def cast_packed(model: torch.nn.Module) -> None:
    experts = model.model.layers[1].mlp.experts
    packing.pack_in_place(experts, "hopper")
    experts.half()


@pytest.mark.parametrize(
    ("change", "arguments", "error", "named"),
    [
        (None, {"push_to_hub": True}, UnsupportedError, r"push_to_hub=True.*model\.push_to_hub"),
        (None, {"state_dict": {}}, UnsupportedError, r"state_dict of 0 entries"),
        (None, {"save_original_format": False}, UnsupportedError, r"save_original_format=False"),
        (None, {"max_shard_size": "many"}, InputError, r"max_shard_size.*'many'"),
        (cast_linear, {}, UnsupportedError, r"layers\.0\.self_attn\.q_proj\.weight_scale\b.*float16.*float8_e4m3fn"),
        (cast_packed, {}, UnsupportedError, r"experts.*float16"),
    ],
)
def test_refused_before_anything_is_written(written, tmp_path: Path, change: Callable | None, arguments: dict, error: type, named: str) -> None:
    model = load(written("qwen3_moe", "modelopt"))
    if change is not None:
        change(model)
    with pytest.raises(error, match=named):
        model.save_pretrained(tmp_path / "saved", **arguments)
    assert not (tmp_path / "saved").exists()


def test_a_configuration_that_transformers_refuses(written, tmp_path: Path) -> None:
    model = load(written("qwen3_moe", "modelopt"))
    model.generation_config.temperature = -1.0
    model.generation_config.do_sample = False
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_model_that_was_pickled_is_saved(written, tmp_path: Path) -> None:
    model = load(written("qwen3_moe", "modelopt"))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same_state(again, model)
    again.save_pretrained(tmp_path / "saved")
    assert_same_checkpoint(tmp_path / "saved", written("qwen3_moe", "modelopt"))


def test_a_layer_that_was_dequantised_is_refused(source: Path, tmp_path: Path) -> None:
    """FP8 experts, which no module holds, became dense."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if "layers.1.mlp.experts" in name]:
            tensor = tensors.pop(name)
            if name.endswith("proj.weight"):
                tensors[name] = torch.randn(tensor.shape[0], 2 * tensor.shape[1]).to(torch.float8_e4m3fn)
                tensors[f"{name}_scale"] = torch.tensor(0.5)

    model = load(edit(source, change))
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.experts\.(gate_up|down)_proj.*FP8.*dense"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_one_scalar_that_became_several_is_refused(tmp_path: Path) -> None:
    """gpt-oss in NVFP4 has one global scale for a layer."""
    build("gpt_oss").save_pretrained(tmp_path / "dense")
    packed: Tensors = {}
    for name, tensor in load_file(tmp_path / "dense" / "model.safetensors").items():
        if re.search(r"experts\.(gate_up|down)_proj$", name):
            q = hb.quantize(tensor.mT.contiguous(), hb.NVFP4, tensor.abs().max() / 2688)
            packed |= {name: q.codes, f"{name}_weight_scale": q.scales, f"{name}_weight_scale_2": q.global_scale}
        else:
            packed[name] = tensor
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (tmp_path / "source").mkdir()
    save_file(packed, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    model = load(tmp_path / "source")
    model.model.layers[0].mlp.experts.gate_up_proj_scale_2[1, 0] *= 2
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.experts\.gate_up_proj_weight_scale_2.*several"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_weights_are_never_overwritten(source: Path) -> None:
    model, before = load(source), (source / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="never overwritten"):
        model.save_pretrained(source)
    assert (source / "model.safetensors").read_bytes() == before


def test_dense_models_are_saved_by_transformers(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
