"""Layouts in which published checkpoints keep experts and FP8 layers, and files in which something is missing, spare or unusable.

What is expected comes from stock transformers on the dequantised weights.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from devices import on_hopper
from helpers import assert_close_rel, relative_errors
from safetensors.torch import load_file, save_file
from saved_models import assert_same_checkpoint
from tiny_models import COMMON, build, write
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeForCausalLM

import halfbyte as hb
import halfbyte.integrations.transformers  # registers halfbyte
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.integrations.transformers.modules import FP8Linear, QuantLinear

Tensors = dict[str, torch.Tensor]
IDS = torch.arange(22).view(2, 11) * 7 % 128
EXACT = {"token": 1e-5, "overall": 1e-5}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
LLAMA4 = {"intermediate_size": 32, "intermediate_size_mlp": 64, "num_local_experts": 4, "head_dim": 16, "interleave_moe_layer_step": 1}
LONGCAT = {
    "num_layers": 1,
    "num_key_value_heads": 4,
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 32,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "moe_topk": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 16,
}


def load(directory: Path, **options: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits.float().flatten(0, 1).cpu()


def save(directory: Path, tensors: Tensors, config: dict) -> Path:
    directory.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def changed(source: Path, directory: Path, edit: Callable[[Tensors], object], **quantization: object) -> Path:
    """A copy of a checkpoint with its tensors and its quantization_config edited."""
    tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    edit(tensors)
    config["quantization_config"] |= quantization
    return save(directory, tensors, config)


Pack = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor] | None]


def check(directory: Path, model: torch.nn.Module, pack: Pack, config: dict, *, unread: str = "$^") -> None:
    """Write `model` with the tensors for which `pack` gives packed ones and a value, load it, and compare with the stock model of those values.

    What the loaded model saves are the files it came from, without tensors that nothing reads.
    """
    model.save_pretrained(directory / "source")
    plain = json.loads((directory / "source" / "config.json").read_text())
    packed, dense = {}, {}
    for name, tensor in load_file(directory / "source" / "model.safetensors").items():
        result = pack(name, tensor)
        packed |= {name: tensor} if result is None else result[0]
        dense[name] = tensor if result is None else result[1]
    expected = load(save(directory / "dense", dense, plain), experts_implementation="eager")
    loaded = load(save(directory / "packed", packed, {**plain, "quantization_config": config}))
    assert any(module.dtype in (torch.uint8, torch.float8_e4m3fn) for module in loaded.parameters())
    assert_close_rel(logits(loaded), logits(expected), **EXACT)
    loaded.save_pretrained(directory / "saved")
    absent = frozenset(name for name in packed if re.search(unread, name))
    assert_same_checkpoint(directory / "saved", directory / "packed", absent=absent)


def quantise_stack(name: str, rows: torch.Tensor, style: str) -> tuple[Tensors, torch.Tensor]:
    """[E, N, K] as one tensor of all experts, in three ways, and the value [E, N, K]."""
    q = [hb.quantize(matrix, hb.MXFP4 if style == "mxfp4-pack-quantized" else hb.NVFP4) for matrix in rows]
    codes, scales, value = (torch.stack(list(part)) for part in zip(*((one.codes, one.scales, one.dequantize()) for one in q), strict=True))
    if style == "mxfp4-pack-quantized":
        return {f"{name}_packed": codes, f"{name}_scale": scales}, value
    decode = torch.stack([one.global_scale for one in q])
    if style == "modelopt":
        return {name: codes, f"{name}_weight_scale": scales, f"{name}_weight_scale_2": decode, f"{name}_input_scale": torch.tensor(0.01)}, value
    encode = (1 / decode).unsqueeze(-1)
    value = torch.stack([hb.QuantTensor(one.codes, one.scales, 1 / scale[0], hb.NVFP4).dequantize() for one, scale in zip(q, encode, strict=True)])
    return {f"{name}_packed": codes, f"{name}_scale": scales, f"{name}_global_scale": encode}, value


@pytest.mark.parametrize("style", ["modelopt", "nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_stacked_experts(style: str, tmp_path: Path) -> None:
    """A class that stacks its experts (Qwen3.5 keeps them so in its files)."""
    model = build("qwen3_next")
    stacked = {name: parameter for name, parameter in model.state_dict().items() if re.search(r"experts\.(gate_up|down)_proj$", name)}
    model.save_pretrained(tmp_path / "source")
    plain = json.loads((tmp_path / "source" / "config.json").read_text())
    others = {name: t for name, t in load_file(tmp_path / "source" / "model.safetensors").items() if not re.search(r"\.experts\.\d", name)}
    packed, dense = dict(others), dict(others)
    for name, tensor in stacked.items():
        tensors, value = quantise_stack(name, tensor, style)
        packed |= tensors
        dense[name] = value
    config = MODELOPT if style == "modelopt" else {"quant_method": "compressed-tensors", "format": style, "ignore": ["lm_head"]}
    loaded = load(save(tmp_path / "packed", packed, {**plain, "quantization_config": config}))
    assert_close_rel(logits(loaded), logits(load(save(tmp_path / "dense", dense, plain))), **EXACT)
    loaded.save_pretrained(tmp_path / "saved")
    assert_same_checkpoint(tmp_path / "saved", tmp_path / "packed")


def test_gpt_oss_in_nvfp4(tmp_path: Path) -> None:
    """Rows of gate and up alternate; one scalar scale holds for a layer; biases stay."""

    def pack(name: str, tensor: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not re.search(r"experts\.(gate_up|down)_proj$", name):
            return None
        q = hb.quantize(tensor.mT.contiguous(), hb.NVFP4, tensor.abs().max() / 2688)
        return {name: q.codes, f"{name}_weight_scale": q.scales, f"{name}_weight_scale_2": q.global_scale}, q.dequantize().mT.contiguous()

    check(tmp_path, build("gpt_oss"), pack, MODELOPT)


def test_llama4_stacked_and_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama4_text", **COMMON | LLAMA4 | {"num_experts_per_tok": 1})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.15)

    def pack(name: str, tensor: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not re.search(r"experts\.(gate_up|down)_proj$", name):
            return None
        q = hb.quantize(tensor.mT.contiguous(), hb.NVFP4, tensor.abs().max() / 2688)
        tensors = {name: q.codes.mT, f"{name}_weight_scale": q.scales.view(torch.uint8).mT.contiguous().view(q.scales.dtype)}
        return tensors | {f"{name}_weight_scale_2": q.global_scale}, q.dequantize().mT.contiguous()

    check(tmp_path, model, pack, MODELOPT)


def test_the_projection_before_the_number_of_the_expert(sound: tuple[Path, Path], tmp_path: Path) -> None:
    """As ModelOpt 0.43 takes stacked experts apart. One expert that is missing is named."""
    source, _ = sound

    def reorder(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[re.sub(r"experts\.(\d+)\.(\w+_proj)", r"experts.\2.\1", name)] = tensors.pop(name)

    reordered = changed(source, tmp_path / "reordered", reorder)
    loaded = load(reordered)
    assert_close_rel(logits(loaded), logits(load(source)), token=0, overall=0)
    loaded.save_pretrained(tmp_path / "saved")
    assert_same_checkpoint(tmp_path / "saved", reordered)
    with pytest.raises(CheckpointError, match=r"no up matrix of expert 2"):
        load(changed(reordered, tmp_path / "without", drop(r"experts\.up_proj\.2\.")))


def test_longcat_with_zero_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("longcat_flash", **COMMON | LONGCAT), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.15)

    def pack(name: str, tensor: torch.Tensor) -> tuple[Tensors, torch.Tensor] | None:
        if not re.search(r"\.experts\.\d+\.", name):
            return None
        q, stem = hb.quantize(tensor, hb.NVFP4), name.removesuffix("weight")
        return {name: q.codes, f"{stem}weight_scale": q.scales, f"{stem}weight_scale_2": q.global_scale}, q.dequantize()

    check(tmp_path, model, pack, MODELOPT, unread=r"experts\.[45]\.")  # rows of the zero experts, which transformers has and does not use


def fp8(tensor: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """e4m3 codes, their scales and the value, by the definition of each kind."""
    if kind == "block":  # the tiny matrices are smaller than a tile
        scale = tensor.abs().max().reshape(1, 1) / 448
    elif kind == "row":
        scale = tensor.abs().amax(1, keepdim=True) / 448
    else:
        scale = tensor.abs().max() / 448
    codes = (tensor / scale).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * scale


@pytest.mark.parametrize("kind", ["tensor", "row", "block"])
def test_fp8_layers_beside_packed_experts(kind: str, tmp_path: Path) -> None:
    fp4, dense = write(build("qwen3_moe"), "modelopt", tmp_path)
    packed, values = load_file(fp4 / "model.safetensors"), load_file(dense / "model.safetensors")
    for name in [name for name in packed if re.search(r"self_attn\.[qkvo]_proj\.weight$", name)]:
        packed[name], scale, values[name] = fp8(packed[name], kind)
        packed[name + ("_scale_inv" if kind == "block" else "_scale")] = scale
    fp4_config, dense_config = (json.loads((path / "config.json").read_text()) for path in (fp4, dense))
    model = load(save(fp4, packed, fp4_config))
    assert sum(isinstance(module, FP8Linear) for module in model.modules()) == 8
    assert_close_rel(logits(model), logits(load(save(dense, values, dense_config))), **EXACT)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(FP4 directory, dense directory) of Qwen3-MoE in ModelOpt NVFP4, linear layers too."""
    return write(build("qwen3_moe"), "modelopt", tmp_path_factory.mktemp("sound"), all_linear=True)


def drop(pattern: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if re.search(pattern, name)]


def rename(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.update({name.replace(old, new): tensors.pop(name)}) for name in list(tensors) if old in name]


def set_byte(name: str, byte: int) -> Callable[[Tensors], object]:
    return lambda tensors: tensors[name].view(torch.uint8)[1, 1].fill_(byte)


EXPERT = "model.layers.1.mlp.experts.2"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (drop(r"layers\.1\..*experts"), r"layers\.1\.mlp\.experts\.down_proj"),
        (drop(r"layers\.1\..*experts\.2\."), r"layers\.1\.mlp\.experts.*expert 2"),
        (rename("layers.1.mlp.experts.2.", "layers.1.mlp.experts.9."), r"layers\.1\.mlp\.experts"),
        (rename("layers.0.mlp.experts.2.", "layers.0.mlp.experts.01."), r"experts\.0*1\..*stored twice"),
        (drop(r"layers\.1\.input_layernorm"), r"layers\.1\.input_layernorm\.weight.*random"),
        (drop(r"layers\.1\.self_attn\.q_proj"), r"layers\.1\.self_attn\.q_proj\.weight.*random"),
        (lambda tensors: tensors.update({f"{EXPERT}.up_proj.bias": torch.zeros(32)}), r"experts\.2\.up_proj\.bias.*no place"),
        (lambda tensors: tensors.update({f"{EXPERT}.up_proj.pre_quant_scale": torch.ones(64)}), r"experts\.2\.up_proj\.pre_quant_scale"),
        (lambda tensors: tensors.update({"model.layers.0.other.weight_scale": torch.ones(2, 2)}), r"layers\.0\.other\.weight_scale"),
        (set_byte(f"{EXPERT}.up_proj.weight_scale", 0x7F), r"experts\.2\.up_proj\.weight_scale.*NaN.*\[1, 1\]"),
        (set_byte(f"{EXPERT}.down_proj.weight_scale", 0xB8), r"experts\.2\.down_proj\.weight_scale.*negative"),
        (set_byte("model.layers.1.self_attn.o_proj.weight_scale", 0x7F), r"self_attn\.o_proj\.weight_scale.*NaN"),
        (lambda tensors: tensors[f"{EXPERT}.gate_proj.weight_scale_2"].fill_(-1), r"experts\.2\.gate_proj\.weight_scale_2.*-1"),
        (lambda tensors: tensors[f"{EXPERT}.gate_proj.input_scale"].fill_(float("inf")), r"experts\.2\.gate_proj\.input_scale.*inf"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}), r"model\.norm\.weight_scale"),
        (lambda tensors: tensors.update({f"{EXPERT}.up_proj.weight": torch.zeros(16, 64, dtype=torch.uint8)}), r"experts\.2\.up_proj"),
    ],
)
def test_what_is_missing_spare_or_unusable_is_named(sound: tuple[Path, Path], tmp_path: Path, edit: Callable, named: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=named):
        load(changed(sound[0], tmp_path, edit))


def test_a_module_named_as_quantised_is_packed(sound: tuple[Path, Path], tmp_path: Path) -> None:
    layers = {"lm_head": {"quant_algo": "NVFP4", "group_size": 16}}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*quantised.*float32"):
        load(changed(sound[0], tmp_path, lambda tensors: None, quant_algo="MIXED_PRECISION", quantized_layers=layers, ignore=[]))


def test_a_pruned_expert_is_zero_whatever_its_scales(sound: tuple[Path, Path], tmp_path: Path) -> None:
    def prune(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.startswith(EXPERT) and name.endswith("proj.weight"):
                tensors[name].copy_(torch.tensor([0x00, 0x88], dtype=torch.uint8).repeat(tensors[name].shape[1] // 2))  # 0 and -0
                tensors[f"{name}_scale"].view(torch.uint8).fill_(0x7F)
                tensors[f"{name}_scale_2"].fill_(0.0)

    def zero(tensors: Tensors) -> None:
        for name in list(tensors):
            if name.startswith(EXPERT):
                tensors[name].zero_()

    dense = load_file(sound[1] / "model.safetensors")
    zero(dense)
    expected = load(save(tmp_path / "dense", dense, json.loads((sound[1] / "config.json").read_text())))
    assert_close_rel(logits(load(changed(sound[0], tmp_path / "fp4", prune))), logits(expected), **EXACT)


def test_input_of_a_linear_layer_is_scaled_as_awq_says(sound: tuple[Path, Path], tmp_path: Path) -> None:
    name, scale = "model.layers.1.self_attn.o_proj", torch.rand(64) + 0.5
    dense = load_file(sound[1] / "model.safetensors")
    dense[f"{name}.weight"] *= scale
    expected = load(save(tmp_path / "dense", dense, json.loads((sound[1] / "config.json").read_text())))
    model = load(changed(sound[0], tmp_path / "fp4", lambda tensors: tensors.update({f"{name}.pre_quant_scale": scale}), quant_algo="NVFP4_AWQ"))
    assert isinstance(model.get_submodule(name), QuantLinear)
    assert_close_rel(logits(model), logits(expected), **EXACT)


def test_missing_input_scales_are_said_and_filled(sound: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.experts.3.up_proj.input_scale"].fill_(0.5)
        del tensors[f"{EXPERT}.up_proj.input_scale"], tensors["model.layers.0.mlp.experts.6.up_proj.input_scale"]

    with caplog.at_level(logging.WARNING, "halfbyte"):
        model = load(changed(sound[0], tmp_path, edit))
    assert f"{EXPERT}.up_proj.input_scale" in caplog.text and "layers.0.mlp.experts.6.up_proj.input_scale" in caplog.text
    assert model.model.layers[0].mlp.experts.gate_up_proj_input_scale[6].tolist() == pytest.approx([0.01, 0.5])
    assert_close_rel(logits(model), logits(load(sound[1])), **EXACT)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj", "model.layers.0.mlp.experts.5.down_proj"])
def test_one_missing_input_scale_is_said(sound: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    with caplog.at_level(logging.WARNING, "halfbyte"):
        model = load(changed(sound[0], tmp_path, lambda tensors: tensors.pop(f"{name}.input_scale")))
    assert [record.getMessage() for record in caplog.records if f"no input scale for {name}.input_scale: " in record.getMessage()]
    assert len(caplog.records) == 1
    assert_close_rel(logits(model), logits(load(sound[1])), **EXACT)


def test_a_projection_without_input_scales_is_said(sound: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Scales of gate and up alone. Where no matrix has one the files are weight-only, and nothing is said."""
    with caplog.at_level(logging.WARNING, "halfbyte"):
        load(changed(sound[0], tmp_path / "some", drop(r"layers\.1\..*down_proj\.input_scale")))
        assert len(caplog.records) == 1
        assert "model.layers.1.mlp.experts.0.down_proj.input_scale" in caplog.text and "more" not in caplog.text
        caplog.clear()
        model = load(changed(sound[0], tmp_path / "none", drop(r"input_scale")))
    assert not caplog.records
    assert_close_rel(logits(model), logits(load(sound[1])), **EXACT)


def test_hf_quant_config_alone(sound: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((sound[0] / "config.json").read_text())
    config.pop("quantization_config")
    save(tmp_path, load_file(sound[0] / "model.safetensors"), config)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}))
    expected = logits(load(sound[1]))
    assert_close_rel(logits(load(tmp_path)), expected, **EXACT)
    of_class = Qwen3MoeForCausalLM.from_pretrained  # which does not tell the configuration where it lies, as AutoModel does
    for options in ({}, {"config": AutoConfig.from_pretrained(sound[1])}):  # also one from somewhere else
        assert_close_rel(logits(of_class(tmp_path, dtype=torch.float32, **options)), expected, **EXACT)
    (tmp_path / "part").mkdir()
    for file in [file for file in tmp_path.iterdir() if file.is_file()]:
        file.rename(tmp_path / "part" / file.name)
    assert_close_rel(logits(of_class(tmp_path, subfolder="part", dtype=torch.float32)), expected, **EXACT)


def test_files_that_name_two_methods_are_refused(sound: tuple[Path, Path], tmp_path: Path) -> None:
    said = {"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}}
    save(tmp_path, load_file(sound[0] / "model.safetensors"), json.loads((sound[0] / "config.json").read_text()) | said)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(CheckpointError, match="name two methods of quantisation"):
        load(tmp_path)


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_an_offloaded_layer(sound: tuple[Path, Path], tmp_path: Path, where: str) -> None:
    """accelerate brings its tensors at every call; its experts stay canonical, since what is packed would be gone at the next."""
    if where == "disk":
        parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
        model = load(sound[0], device_map=dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}, offload_folder=str(tmp_path))
    else:
        model = load(sound[0])
        cpu_offload(model.model.layers[1], execution_device=torch.device("cpu"))
    experts = model.model.layers[1].mlp.experts
    assert experts.down_proj.device.type == "meta" and not experts.halfbyte.host.keeps_storage(experts)
    expected = logits(load(sound[1]))
    for _ in range(2):
        assert_close_rel(logits(model), expected, **EXACT)


@on_hopper
def test_a_layer_offloaded_from_a_gpu(sound: tuple[Path, Path]) -> None:
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    exact = logits(load(sound[1]))
    limit = 2 * relative_errors(logits(AutoModelForCausalLM.from_pretrained(sound[0], dtype=torch.bfloat16)), exact)[1]
    assert limit < 0.2
    model = AutoModelForCausalLM.from_pretrained(sound[0], dtype=torch.bfloat16, device_map=dict.fromkeys(parts, 0) | {"model.layers.1": "cpu"})
    for _ in range(2):
        assert relative_errors(logits(model), exact)[1] < limit
    assert [model.model.layers[layer].mlp.experts.halfbyte.prepared.layout for layer in (0, 1)] == ["hopper", "canonical"]
