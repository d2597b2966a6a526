"""Half a model is refused by name, and nothing is written; what is left alone on purpose is not missed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import checkpoint_files as cf
import pytest
import torch

from halfbyte.convert import QuantizeOptions, quantize_model
from halfbyte.errors import HalfbyteError

EXPERTS = "model.layers.1.mlp.experts"
GATE0 = f"{EXPERTS}.0.gate_proj.weight"
E, H, I = cf.E, cf.H, cf.I  # noqa: E741


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def dense(**config: object) -> cf.Files:
    return cf.dense({**cf.QWEN, **config})


def fp8() -> cf.Files:
    files = cf.dense({**cf.DEEPSEEK_V3, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    for name in [name for name in files.tensors if ".experts." in name]:
        files.tensors[name] = files.tensors[name].to(torch.float8_e4m3fn)
        files.tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.5)
    return files


def drop(word: str) -> Callable[[cf.Files], None]:
    def change(files: cf.Files) -> None:
        found = [name for name in files.tensors if word in name]
        assert found
        for name in found:
            del files.tensors[name]

    return change


def rename(old: str, new: str) -> Callable[[cf.Files], None]:
    def change(files: cf.Files) -> None:
        assert any(old in name for name in files.tensors)
        files.tensors = {name.replace(old, new): tensor for name, tensor in files.tensors.items()}

    return change


def put(name: str, tensor: torch.Tensor) -> Callable[[cf.Files], None]:
    return lambda files: files.tensors.update({name: tensor})


def transpose(files: cf.Files) -> None:
    for name in [name for name in files.tensors if ".experts." in name]:
        files.tensors[name] = files.tensors[name].T.contiguous()


def stack_too(files: cf.Files) -> None:
    stacks = {"gate_up_proj": torch.zeros(cf.E, 2 * I, H).bfloat16(), "down_proj": torch.zeros(cf.E, H, I).bfloat16()}
    files.tensors |= {f"{EXPERTS}.{leaf}": stack for leaf, stack in stacks.items()}


def configure(**values: object) -> Callable[[cf.Files], None]:
    return lambda files: files.config.update(values)


BROKEN = {
    "an expert missing": (drop("experts.1."), ["missing tensor", f"{EXPERTS}.1.gate_proj.weight"]),
    "the last expert missing": (drop("experts.2."), ["another number of experts", "experts.1.up_proj.weight", "needed 2"]),
    "all experts missing": (drop(".experts."), ["nothing to quantise"]),
    "a projection missing": (drop("experts.1.up_proj"), ["missing tensor", f"{EXPERTS}.1.up_proj.weight"]),
    "all of a projection missing": (drop("up_proj"), ["missing tensor", f"{EXPERTS}.0.up_proj.weight"]),
    "all gates missing": (drop("gate_proj"), ["missing tensor", f"{EXPERTS}.0.gate_proj.weight"]),
    "ids from 1": (rename("experts.0.", "experts.3."), ["another number of experts", f"{EXPERTS}.3.", "needed 4"]),
    "a gap": (rename("experts.2.", "experts.7."), ["another number of experts", f"{EXPERTS}.7.", "needed 8"]),
    "a number with zeros": (rename("experts.2.", "experts.02."), ["no number", "experts.02"]),
    "a number of 20 digits": (rename("experts.2.", "experts.99999999999999999999."), ["no number", "99999999999999999999"]),
    "one too many": (put(f"{EXPERTS}.3.gate_proj.weight", torch.zeros(I, H)), ["another number of experts", f"{EXPERTS}.3.gate_proj.weight"]),
    "a row less": (put(GATE0, torch.zeros(I - 1, H).bfloat16()), ["wrong shape", GATE0, "(31, 64)"]),
    "three dimensions": (put(GATE0, torch.zeros(1, I, H)), ["layout that is not read", GATE0]),
    "one dimension": (put(GATE0, torch.zeros(I * H).bfloat16()), ["wrong shape", GATE0, "(2048,)"]),
    "all transposed": (transpose, ["wrong shape", GATE0, "(64, 32)"]),
    "another dtype": (put(GATE0, torch.zeros(I, H)), ["wrong dtype", GATE0, "float32", "bfloat16, as"]),
    "stacked beside one by one": (stack_too, ["two tensors for one matrix", f"{EXPERTS}.0", "not both"]),
    "two names": (put(f"{EXPERTS}.0.w1.weight", torch.zeros(I, H).bfloat16()), ["two tensors for one matrix: gate", f"{EXPERTS}.0"]),
    "bool": (put(GATE0, torch.zeros(I, H, dtype=torch.bool)), ["cannot be quantised", GATE0, "bool"]),
    "e5m2": (put(GATE0, torch.zeros(I, H).to(torch.float8_e5m2)), ["cannot be quantised", GATE0, "float8_e5m2"]),
    "e4m3 without scales": (put(GATE0, torch.zeros(I, H).to(torch.float8_e4m3fn)), ["missing tensor", f"{GATE0}_scale_inv"]),
    "an expert packed": (put(f"{EXPERTS}.1.up_proj.weight_packed", torch.zeros(I, H // 2, dtype=torch.uint8)), ["not read", "weight_packed"]),
    "scales without a weight": (put("model.norm.weight_scale_inv", torch.ones(1, 1)), ["scales without their weight", "model.norm.weight_scale_inv"]),
    "another number of experts": (configure(num_experts=4), ["num_experts", "4"]),
    "a string": (configure(num_experts="3"), ["num_experts does not fit", "'3'"]),
    "too many experts per token": (configure(num_experts_per_tok=9), ["num_experts_per_tok 9"]),
    "another hidden size": (configure(hidden_size=128), ["wrong shape", GATE0, "(32, 64)", "(32, 128)"]),
    "another intermediate size": (configure(moe_intermediate_size=64), ["wrong shape", GATE0, "(64, 64)"]),
    "a list": (configure(hidden_size=[64]), ["hidden_size does not fit"]),
    "more layers": (configure(num_hidden_layers=3), ["num_hidden_layers 3"]),
    "fewer layers": (configure(num_hidden_layers=1, mlp_only_layers=[]), ["no experts", EXPERTS]),
    "experts in a dense layer": (configure(num_hidden_layers=2, mlp_only_layers=[0, 1]), ["no experts", EXPERTS]),
    "no model_type": (configure(model_type=None), ["model_type"]),
}


@pytest.mark.parametrize(("change", "said"), BROKEN.values(), ids=BROKEN)
def test_half_a_dense_model(tmp_path: Path, change: Callable[[cf.Files], None], said: list[str]) -> None:
    files = dense()
    change(files)
    refuse(files, tmp_path, said)


def refuse(files: cf.Files, tmp_path: Path, said: list[str], shards: int = 1) -> None:
    source = files.write(tmp_path / "in", shards)
    with pytest.raises(HalfbyteError) as caught:
        quantize_model(source, tmp_path / "out")
    for text in (*said, str(source)):
        assert text in str(caught.value)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


SCALES = f"{GATE0}_scale_inv"
BROKEN_FP8 = {
    "a scale of 0": (put(SCALES, torch.zeros(1, 1)), ["not positive finite", SCALES]),
    "a negative scale": (put(SCALES, torch.full((1, 1), -0.5)), ["not positive finite", SCALES]),
    "a NaN scale": (put(SCALES, torch.full((1, 1), torch.nan)), ["not positive finite", SCALES]),
    "no scale": (drop(SCALES), ["missing tensor", SCALES]),
    "scales of another shape": (put(SCALES, torch.ones(2, 1)), ["do not cover", SCALES, "(2, 1)"]),
    "scales in fp16": (put(SCALES, torch.ones(1, 1).half()), ["do not cover", SCALES, "float16"]),
    "scales of a bf16 weight": (put(GATE0, torch.ones(I, H).bfloat16()), ["no fp8-block weight", GATE0]),
    "a copied weight without scales": (put("model.o_proj.weight", torch.ones(4, 4).to(torch.float8_e4m3fn)), ["missing tensor", "model.o_proj"]),
}


@pytest.mark.parametrize(("change", "said"), BROKEN_FP8.values(), ids=BROKEN_FP8)
def test_half_an_fp8_model(tmp_path: Path, change: Callable[[cf.Files], None], said: list[str]) -> None:
    files = fp8()
    change(files)
    refuse(files, tmp_path, said)


@pytest.mark.parametrize("name", [GATE0, "model.o_proj.weight"])
def test_a_nan_weight_of_fp8_blocks(tmp_path: Path, name: str) -> None:
    """Found when it is read, whether quantised or decoded: the checkpoint is not finished."""
    files = fp8()
    weight = torch.ones(I, H).to(torch.float8_e4m3fn)
    weight.view(torch.uint8)[3, 1] = 0xFF
    files.tensors |= {name: weight, f"{name}_scale_inv": torch.ones(1, 1)}
    with pytest.raises(HalfbyteError, match=f"NaN weights: {name}"):
        quantize_model(files.write(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_bf16_scales(tmp_path: Path) -> None:
    files = fp8()
    expected = files.tensors[GATE0].float() * 0.5
    files.tensors = {name: tensor.bfloat16() if name.endswith("_scale_inv") else tensor for name, tensor in files.tensors.items()}
    options = QuantizeOptions(skip=("model.layers.1.mlp.experts.*", "*self_attn*"), all_linear=True)
    files.tensors["model.layers.1.mlp.shared_experts.up_proj.weight"] = torch.ones(16, 64).bfloat16()
    files.tensors["model.layers.1.self_attn.q_proj.weight"] = torch.ones(16, 64).bfloat16()
    quantize_model(files.write(tmp_path / "in"), tmp_path / "out", options)
    from safetensors.torch import load_file

    stored = load_file(next((tmp_path / "out").glob("*.safetensors")))[GATE0]
    assert torch.equal(stored, expected.bfloat16())


def test_an_index_that_leaves_a_tensor_out(tmp_path: Path) -> None:
    source = dense().write(tmp_path / "in", shards=3)
    index = source / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    del document["weight_map"]["model.layers.1.mlp.gate.weight"]
    index.write_text(json.dumps(document))
    with pytest.raises(HalfbyteError, match=r"the index leaves out tensor model\.layers\.1\.mlp\.gate\.weight"):
        quantize_model(source, tmp_path / "out")


def test_a_family_that_halfbyte_does_not_know(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It may be one that transformers knows: a warning, and the experts are checked among themselves."""
    with caplog.at_level(logging.WARNING, "halfbyte"):
        quantize_model(dense(model_type="novel_moe").write(tmp_path / "good"), tmp_path / "out")
    assert "model_type 'novel_moe' is no family that halfbyte knows" in caplog.text
    for number, change in enumerate(
        (drop("experts.1."), drop("experts.1.up_proj"), drop("up_proj"), configure(num_experts=4), configure(num_experts="3"))
    ):
        files = dense(model_type="novel_moe")
        change(files)
        with pytest.raises(HalfbyteError, match=r"missing experts|num_experts does not fit"):
            quantize_model(files.write(tmp_path / f"in{number}"), tmp_path / f"out{number}")


def test_layers_that_predict_further_tokens_may_lie_behind(tmp_path: Path) -> None:
    files = dense()
    files.tensors |= {name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in files.tensors.items()}
    refuse(files, tmp_path, ["no experts", "layers.2"])
    files.config["num_nextn_predict_layers"] = 1
    quantize_model(files.write(tmp_path / "predicting"), tmp_path / "predicted")


def test_experts_that_are_skipped_are_not_missed(tmp_path: Path) -> None:
    files = dense(mlp_only_layers=[])
    first = {name.replace("layers.1", "layers.0"): tensor.clone() for name, tensor in files.tensors.items()}
    files.tensors |= first
    report = quantize_model(files.write(tmp_path / "in"), tmp_path / "out", QuantizeOptions(skip=("model.layers.0.*",)))
    assert report.matrices == 3 * E
