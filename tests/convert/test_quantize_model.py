"""Whole conversions, read back by an independent path; and everything that may go wrong on the way."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import checkpoint_files as cf
import plain_reader
import pytest
import torch
from helpers import assert_equal_bits
from safetensors.torch import load_file

import halfbyte as hb
from halfbyte.checkpoint import Checkpoint, load_experts
from halfbyte.checkpoint import writer as writer_module
from halfbyte.checkpoint.writer import JOURNAL, CheckpointWriter
from halfbyte.convert import QuantizeOptions, QuantizeReport, quantize_model
from halfbyte.errors import CheckpointError, InputError, UnsupportedError
from halfbyte.formats import FORMATS

DEMO = Path(hb.__file__).parent / "demo_model"
LAYER = "model.layers.1.mlp"
SMALL = QuantizeOptions(max_shard_bytes=4_000)  # several shards from the tiny model


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, QuantizeReport, dict[str, torch.Tensor]]]:
    path = tmp_path_factory.mktemp("demo") / "nvfp4"
    yield path, quantize_model(DEMO, path), plain_reader.read_all(DEMO)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def expert_sources(tensors: dict[str, torch.Tensor], experts: str, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """gate over up [2I, H], and down [H, I], of a dense checkpoint."""
    gate, up, down = (tensors[f"{experts}.{expert}.{leaf}_proj.weight"] for leaf in ("gate", "up", "down"))
    return torch.cat([gate, up]), down


def test_demo_model_reads_back_bit_for_bit(demo: tuple[Path, QuantizeReport, dict[str, torch.Tensor]]) -> None:
    """Every expert equals quantize().dequantize(), gate and up with one common scale; the rest is unchanged."""
    path, report, source = demo
    result = plain_reader.read_all(path)
    for layer in range(6):
        experts = f"model.layers.{layer}.mlp.experts"
        w13, w2 = map(torch.stack, zip(*(expert_sources(source, experts, expert) for expert in range(16)), strict=True))
        gate, up, down = (
            torch.stack([plain_reader.dequantize(result, f"{experts}.{expert}.{leaf}_proj") for expert in range(16)])
            for leaf in ("gate", "up", "down")
        )
        assert_equal_bits(torch.cat([gate, up], dim=1), hb.quantize(w13, hb.NVFP4).dequantize())
        assert_equal_bits(down, hb.quantize(w2, hb.NVFP4).dequantize())
    for name in source.keys() - {name for name in source if ".experts." in name}:
        assert_equal_bits(result[name], source[name])
    assert len(result) == len(source) + 2 * 288
    assert report.output_bytes == sum(tensor.nbytes for tensor in result.values())
    assert report.source_bytes == sum(tensor.nbytes for tensor in source.values())


def test_demo_model_loads_through_the_reader(demo: tuple[Path, QuantizeReport, dict[str, torch.Tensor]]) -> None:
    path, _, source = demo
    checkpoint = Checkpoint.open(path)
    assert checkpoint.quantization.kind == "modelopt" and checkpoint.quantization.format is hb.NVFP4
    weights = load_experts(checkpoint, 3).dequantize()
    for expert in (0, 15):
        w13, w2 = expert_sources(source, "model.layers.3.mlp.experts", expert)
        assert_equal_bits(weights.w13[expert], hb.quantize(w13, hb.NVFP4).dequantize())
        assert_equal_bits(weights.w2[expert], hb.quantize(w2, hb.NVFP4).dequantize())
    assert weights.w13_input_scale is None


def test_demo_model_files_and_report(demo: tuple[Path, QuantizeReport, dict[str, torch.Tensor]]) -> None:
    path, report, source = demo
    assert (path / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()
    quantization = json.loads((path / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "W4A16_NVFP4"
    unquantised = {name.removesuffix(".weight") for name, tensor in source.items() if tensor.ndim > 1 and ".experts." not in name}
    assert set(quantization["exclude_modules"]) == unquantised | {"lm_head"}
    config, before = json.loads((path / "config.json").read_text()), json.loads((DEMO / "config.json").read_text())
    assert config.pop("quantization_config")["ignore"] == quantization["exclude_modules"] and config == before
    assert {kind: sqnr.matrices for kind, sqnr in report.sqnr.items()} == {"gate": 96, "up": 96, "down": 96}
    for kind, sqnr in report.sqnr.items():
        assert sqnr.mean_db is not None and sqnr.worst_db is not None and 19 < sqnr.worst_db < sqnr.mean_db < 22, kind
    weight = source[f"{report.sqnr['up'].worst}.weight"].float()
    noise = plain_reader.dequantize(plain_reader.read_all(path), str(report.sqnr["up"].worst)) - weight
    assert report.sqnr["up"].worst_db == pytest.approx(10 * torch.log10(weight.square().sum() / noise.square().sum()).item(), abs=1e-3)


def test_four_over_six_lowers_the_error_of_the_demo_experts(tmp_path: Path, demo: tuple[Path, QuantizeReport, dict[str, torch.Tensor]]) -> None:
    """10 to 20 % less squared error, summed over all experts of a layer; measured on what was written, both ways."""
    plain_path, _, source = demo
    layers = "model.layers.[12345].*"
    quantize_model(DEMO, tmp_path / "out", QuantizeOptions(four_over_six=True, output="compressed-tensors", skip=(layers,)))
    plain, adaptive = plain_reader.read_all(plain_path), plain_reader.read_all(tmp_path / "out")
    modules = [name.removesuffix(".weight_packed") for name in adaptive if name.endswith(".weight_packed")]
    assert len(modules) == 48

    def squared_error(tensors: dict[str, torch.Tensor]) -> float:
        return sum((plain_reader.dequantize(tensors, m) - source[f"{m}.weight"].float()).square().sum().item() for m in modules)

    assert 0.80 < squared_error(adaptive) / squared_error(plain) < 0.90


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("stacked", ["", "rows", "columns"])
def test_compressed_tensors_and_stacked_sources(tmp_path: Path, format: str, stacked: str) -> None:
    """Stacked experts come out one matrix a tensor, with the values of the one-by-one source."""
    files = cf.dense(stacked=stacked)
    quantize_model(files.write(tmp_path / "in"), tmp_path / "out", QuantizeOptions(format=format, output="compressed-tensors"))
    result, block_format = plain_reader.read_all(tmp_path / "out"), {"nvfp4": hb.NVFP4, "mxfp4": hb.MXFP4}[format]
    for expert in range(cf.E):
        w13, w2 = files.w13[expert], files.w2[expert]
        scales: list = [None, None]
        if format == "nvfp4":  # what is stored is the reciprocal
            scales = [1 / result[f"{LAYER}.experts.{expert}.{leaf}_proj.weight_global_scale"][0] for leaf in ("gate", "down")]
            assert scales[0].item() == pytest.approx(w13.abs().max().item() / (6 * 448), rel=1e-6)
        restored = [plain_reader.dequantize(result, f"{LAYER}.experts.{expert}.{leaf}_proj") for leaf in ("gate", "up", "down")]
        assert_equal_bits(torch.cat(restored[:2]), hb.quantize(w13, block_format, scales[0]).dequantize())
        assert_equal_bits(restored[2], hb.quantize(w2, block_format, scales[1]).dequantize())
    weights = load_experts(tmp_path / "out", 1)
    assert weights.format is block_format
    assert_equal_bits(weights.dequantize().w2[1], plain_reader.dequantize(result, f"{LAYER}.experts.1.down_proj"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_source_dtypes_and_mixtral_names(tmp_path: Path, dtype: torch.dtype) -> None:
    files = cf.dense({**cf.MIXTRAL, "mlp_layer_types": ["dense", "sparse"]}, dtype, "model.layers.1.block_sparse_moe", cf.W_NAMES)
    quantize_model(files.write(tmp_path / "in"), tmp_path / "out")
    result = plain_reader.read_all(tmp_path / "out")
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    restored = torch.cat([plain_reader.dequantize(result, f"{prefix}.w1"), plain_reader.dequantize(result, f"{prefix}.w3")])
    assert_equal_bits(restored, hb.quantize(files.w13[2], hb.NVFP4).dequantize())


def fp8_block(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """e4m3 elements, 128 x 128 scales, and the fp32 values they mean (weights here fit in one tile or two)."""
    scale = torch.rand(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128)) * 1e-3 + 1e-4
    expanded = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
    elements = (weight / expanded).clamp(-448, 448).to(torch.float8_e4m3fn)
    return elements, scale, elements.float() * expanded


def test_fp8_block_source(tmp_path: Path) -> None:
    """Experts are quantised from what their fp8 means; other fp8 tensors become bf16; no fp8 and no scale of it remains."""
    files = cf.dense({**cf.DEEPSEEK_V3, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    files.tensors["model.layers.1.self_attn.o_proj.weight"] = torch.randn(192, 160)
    meant = {}
    for name in [name for name in files.tensors if name.endswith("_proj.weight")]:
        files.tensors[name], files.tensors[f"{name}_scale_inv"], meant[name] = fp8_block(files.tensors[name].float())
    report = quantize_model(files.write(tmp_path / "in"), tmp_path / "out")
    result = plain_reader.read_all(tmp_path / "out")
    for expert in range(cf.E):
        w13, w2 = expert_sources(meant, f"{LAYER}.experts", expert)
        restored = [plain_reader.dequantize(result, f"{LAYER}.experts.{expert}.{leaf}_proj") for leaf in ("gate", "up", "down")]
        assert_equal_bits(torch.cat(restored[:2]), hb.quantize(w13, hb.NVFP4).dequantize())
        assert_equal_bits(restored[2], hb.quantize(w2, hb.NVFP4).dequantize())
    assert_equal_bits(result["model.layers.1.self_attn.o_proj.weight"], meant["model.layers.1.self_attn.o_proj.weight"].bfloat16())
    assert not [name for name in result if name.endswith("_scale_inv")]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "modelopt"
    assert report.source_bytes == sum(tensor.nbytes for tensor in files.tensors.values())
    assert report.output_bytes == sum(tensor.nbytes for tensor in result.values())


def test_all_linear(tmp_path: Path) -> None:
    """q, k and v share a scale as engines fuse them; router, embeddings, lm_head and norms stay."""
    files = cf.dense()
    attention = "model.layers.1.self_attn"
    extra = {f"{attention}.{leaf}_proj.weight": torch.randn(rows, cf.H) for leaf, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64))}
    kept = {"model.embed_tokens.weight": torch.randn(10, cf.H), "lm_head.weight": torch.randn(10, cf.H), "model.norm.weight": torch.randn(cf.H)}
    files.tensors |= extra | kept
    report = quantize_model(files.write(tmp_path / "in"), tmp_path / "out", QuantizeOptions(all_linear=True))
    result = plain_reader.read_all(tmp_path / "out")
    qkv = torch.cat([extra[f"{attention}.{leaf}_proj.weight"] for leaf in "qkv"])
    restored = torch.cat([plain_reader.dequantize(result, f"{attention}.{leaf}_proj") for leaf in "qkv"])
    assert_equal_bits(restored, hb.quantize(qkv, hb.NVFP4).dequantize())
    for name in (*kept, f"{LAYER}.gate.weight"):
        assert_equal_bits(result[name], files.tensors[name])
    assert {"self_attn.q_proj", "self_attn.o_proj", "gate", "up", "down"} <= set(report.sqnr)
    excluded = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert excluded == ["lm_head", "model.embed_tokens", f"{LAYER}.gate"]


def test_skip(tmp_path: Path) -> None:
    """Skipped modules are copied and listed; half of what engines load as one cannot be skipped, nor can nothing."""
    files = cf.dense({**cf.QWEN, "mlp_only_layers": []})
    files.tensors |= {name.replace("layers.1", "layers.0"): torch.randn_like(tensor) for name, tensor in files.tensors.items()}
    source = files.write(tmp_path / "in")
    report = quantize_model(source, tmp_path / "out", QuantizeOptions(skip=("model.layers.0.*",)))
    assert report.matrices == 9
    result = plain_reader.read_all(tmp_path / "out")
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    assert_equal_bits(result[name], files.tensors[name])
    assert name.removesuffix(".weight") in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    with pytest.raises(InputError, match="leaves out a part of what engines load as one"):
        quantize_model(source, tmp_path / "no", QuantizeOptions(skip=("*.experts.0.*",)))
    with pytest.raises(InputError, match=r"matches no module .*layers\.7"):
        quantize_model(source, tmp_path / "no", QuantizeOptions(skip=("model.layers.7.*",)))
    with pytest.raises(CheckpointError, match=r"nothing to quantise .*Skip less"):
        quantize_model(source, tmp_path / "no", QuantizeOptions(skip=("*",)))
    assert not (tmp_path / "no").exists()


def test_dry_run_writes_nothing_and_predicts_the_sizes(tmp_path: Path) -> None:
    source = cf.dense().write(tmp_path / "in")
    planned = quantize_model(source, tmp_path / "out", SMALL, dry_run=True)
    assert not (tmp_path / "out").exists() and planned.dry_run and "would become" in str(planned)
    real = quantize_model(source, tmp_path / "out", SMALL)
    assert real.shards == planned.shards > 2
    assert real.output_bytes == planned.output_bytes == sum(tensor.nbytes for tensor in plain_reader.read_all(tmp_path / "out").values())
    assert json.loads(json.dumps(real.as_dict()))["sqnr"]["gate"]["matrices"] == cf.E


KILLED = """
import os, signal, sys
from pathlib import Path
from halfbyte.convert import QuantizeOptions, quantize_model
source, out = map(Path, sys.argv[1:])
def kill_after_first_shard(done, total):
    if list(out.glob("model-00001-*.safetensors")):
        (out / "model-00002-of-00009.safetensors.halfbyte-partial").write_bytes(b"torn")
        os.kill(os.getpid(), signal.SIGKILL)
quantize_model(source, out, QuantizeOptions(max_shard_bytes=4_000), progress=kill_after_first_shard)
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    source, out = cf.dense().write(tmp_path / "in"), tmp_path / "out"
    before = files_of(source)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    first = next(out.glob("model-00001-*.safetensors"))
    assert load_file(first)  # whole
    assert not (out / "config.json").exists()  # so nothing mistakes it for a model
    written = first.stat().st_mtime_ns
    with pytest.raises(CheckpointError, match=r"another source or other options .*four_over_six was False, is True"):
        quantize_model(source, out, QuantizeOptions(max_shard_bytes=4_000, four_over_six=True))
    resumed = quantize_model(source, out, SMALL)
    reference = quantize_model(source, tmp_path / "reference", SMALL)
    assert first.stat().st_mtime_ns == written and resumed.resumed_shards == 1 and reference.resumed_shards == 0
    assert files_of(out) == files_of(tmp_path / "reference")
    assert resumed.as_dict()["sqnr"] == reference.as_dict()["sqnr"]
    assert files_of(source) == before


def test_lost_journal_entry_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the rename of a shard and its entry in the journal: the shard is written again, equal."""
    source, saves = cf.dense().write(tmp_path / "in"), []
    original = CheckpointWriter._save_journal

    def interrupt_third(writer: CheckpointWriter) -> None:
        saves.append(writer)
        if len(saves) == 3:
            raise KeyboardInterrupt
        original(writer)

    monkeypatch.setattr(CheckpointWriter, "_save_journal", interrupt_third)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(source, tmp_path / "out", SMALL)
    monkeypatch.undo()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == 2
    assert quantize_model(source, tmp_path / "out", SMALL).resumed_shards == 1
    quantize_model(source, tmp_path / "reference", SMALL)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "reference")


def test_full_disk_keeps_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, save_file = cf.dense().write(tmp_path / "in"), writer_module.save_file

    def full_at_second(tensors: dict, path: Path, metadata: dict) -> None:
        save_file(tensors, path, metadata=metadata)
        if "model-00002" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer_module, "save_file", full_at_second)
    with pytest.raises(CheckpointError, match=r"model-00002-of-0000\d.safetensors: the disk is full"):
        quantize_model(source, tmp_path / "out", SMALL)
    assert sorted(file.name[:11] for file in (tmp_path / "out").iterdir()) == [".halfbyte-j", "hf_quant_co", "model-00001"]
    monkeypatch.undo()
    assert quantize_model(source, tmp_path / "out", SMALL).resumed_shards == 1


@pytest.mark.parametrize("dry_run", [False, True])
def test_occupied_destination(tmp_path: Path, dry_run: bool) -> None:
    source = cf.dense().write(tmp_path / "in")
    before = files_of(source)
    for inside in (source, source / "fp4"):
        with pytest.raises(InputError, match="the destination lies in the source"):
            quantize_model(source, inside, dry_run=dry_run)
    occupied = cf.dense().write(tmp_path / "occupied")
    with pytest.raises(CheckpointError, match="never overwritten"):
        quantize_model(source, occupied, restart=True, dry_run=dry_run)
    assert files_of(source) == before


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_nonfinite_weights(tmp_path: Path, format: str) -> None:
    files = cf.dense()
    name = f"{LAYER}.experts.1.up_proj.weight"
    files.tensors[name][3, 5], files.tensors[name][4, 4] = torch.nan, torch.inf
    source = files.write(tmp_path / "in")
    with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor {name} has 2 NaN or infinite weights .*--skip"):
        quantize_model(source, tmp_path / "out", QuantizeOptions(format=format))


def test_rows_that_do_not_divide_into_blocks(tmp_path: Path) -> None:
    files = cf.dense()
    name = f"{LAYER}.experts.0.down_proj.weight"
    files.tensors[name] = torch.randn(cf.H, 40)
    source = files.write(tmp_path / "in")
    with pytest.raises(CheckpointError, match=rf"{name} do not divide into NVFP4 blocks \(given 40 columns; needed a multiple of 16\).*--skip"):
        quantize_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_gpt_oss_goes_back_to_stacked_experts(format: str, tmp_path: Path) -> None:
    """Alternating rows and biases stay as they are; every matrix equals quantize().dequantize() of the whole, with one scale for gate and up."""
    files = cf.dense(cf.GPT_OSS, stacked="alternating")
    biases = {"gate_up_proj_bias": torch.randn(cf.E, 2 * cf.I), "down_proj_bias": torch.randn(cf.E, cf.H)}
    files.tensors |= {f"{LAYER}.experts.{name}": bias for name, bias in biases.items()}
    files.tensors["model.layers.1.self_attn.q_proj.weight"] = torch.randn(cf.H, cf.H)
    report = quantize_model(files.write(tmp_path / "in"), tmp_path / "out", QuantizeOptions(format=format))
    assert report.output == "gpt-oss" and report.matrices == 2
    names = {"mxfp4": "gate_up_proj_blocks", "nvfp4": "gate_up_proj_weight_scale_2"}
    assert f"{LAYER}.experts.{names[format]}" in load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    weights = load_experts(tmp_path / "out", 1)
    for actual, dense in ((weights.w13, files.w13), (weights.w2, files.w2)):
        assert_equal_bits(actual.dequantize(), hb.quantize(dense.bfloat16(), FORMATS[format]).dequantize())
    assert_equal_bits(weights.w2_bias, biases["down_proj_bias"])
    assert_equal_bits(weights.w13_bias, torch.cat([biases["gate_up_proj_bias"][:, ::2], biases["gate_up_proj_bias"][:, 1::2]], dim=1))
    with pytest.raises(InputError, match="experts only"):
        quantize_model(tmp_path / "in", tmp_path / "other", QuantizeOptions(format=format, all_linear=True))


GRANITE = {**cf.MIXTRAL, "model_type": "granitemoe"}
STEP = {
    "model_type": "step3p5",
    "num_hidden_layers": 2,
    "hidden_size": cf.H,
    "moe_intermediate_size": cf.I,
    "moe_num_experts": cf.E,
    "moe_top_k": 2,
    "moe_layers_enum": "1",
}


@pytest.mark.parametrize("family", ["granitemoe", "step3p5"])
def test_stacked_layouts_are_found_and_read_back(family: str, tmp_path: Path) -> None:
    files = cf.dense(GRANITE if family == "granitemoe" else STEP)
    blocks = [f"model.layers.{layer}.block_sparse_moe" for layer in range(2)] if family == "granitemoe" else ["model.layers.1.moe"]
    w13, w2 = files.w13.bfloat16(), files.w2.bfloat16()
    named = {"input_linear": w13, "output_linear": w2, "router.layer": torch.randn(cf.E, cf.H)}
    if family == "step3p5":
        named = {"gate_proj": w13[:, : cf.I], "up_proj": w13[:, cf.I :], "down_proj": w2, "gate": torch.randn(cf.E, cf.H)}
    others = {"model.layers.1.shared_mlp.input_linear.weight": torch.randn(2 * cf.I, cf.H), "model.layers.1.mlp.gate_proj.weight": torch.randn(8, 64)}
    files.tensors = {f"{block}.{name}.weight": tensor.clone().contiguous() for block in blocks for name, tensor in named.items()} | others
    files.tensors |= {"model.layers.1.moe.router_bias": torch.rand(cf.E)} if family == "step3p5" else {}
    source = files.write(tmp_path / "in")
    dense = load_experts(source, 1)
    assert_equal_bits(dense.w13, w13)
    assert_equal_bits(dense.w2, w2)
    assert quantize_model(source, tmp_path / "out").matrices == 3 * cf.E * len(blocks)
    weights = load_experts(tmp_path / "out", 1).dequantize()
    assert_equal_bits(weights.w13, hb.quantize(w13, hb.NVFP4).dequantize())
    assert_equal_bits(weights.w2, hb.quantize(w2, hb.NVFP4).dequantize())
    written = plain_reader.read_all(tmp_path / "out")
    assert all(name in written for name in others)


def test_all_linear_leaves_heads_and_views_alone(tmp_path: Path) -> None:
    kept = ("output", "head", "model.layers.0.self_attn.indexer.weights_proj", "model.layers.0.self_attn.o_a_proj", "model.layers.0.attn.wo_a")
    tensors = {f"{name}.weight": torch.randn(64, 64) for name in (*kept, "model.layers.0.self_attn.o_proj")}
    source = cf.Files({"model_type": "llama"}, tensors).write(tmp_path / "in")
    assert quantize_model(source, tmp_path / "out", QuantizeOptions(all_linear=True)).matrices == 1
    assert all(f"{name}.weight" in plain_reader.read_all(tmp_path / "out") for name in kept)


def test_sources_that_cannot_be_quantised(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"already quantised \(given modelopt"):
        quantize_model(cf.nvfp4("modelopt").write(tmp_path / "fp4"), tmp_path / "out")
    dense = cf.Files({"model_type": "llama"}, {"model.layers.0.mlp.up_proj.weight": torch.randn(64, 64)}).write(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"nothing to quantise .*--all-linear"):
        quantize_model(dense, tmp_path / "out")
    assert quantize_model(dense, tmp_path / "out", QuantizeOptions(all_linear=True), dry_run=True).matrices == 1
    files = cf.dense(stacked="columns")
    files.tensors[f"{LAYER}.experts.gate_up_proj_bias"] = torch.zeros(cf.E, 2 * cf.I)
    with pytest.raises(UnsupportedError, match="another family than gpt-oss"):
        quantize_model(files.write(tmp_path / "gpt"), tmp_path / "out")
    mismatched = cf.dense(stacked="rows")
    mismatched.tensors[f"{LAYER}.experts.down_proj"] = torch.zeros(cf.E, 48, 32)
    with pytest.raises(CheckpointError, match="do not belong together"):
        quantize_model(mismatched.write(tmp_path / "mismatched"), tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "fp4"}, "unknown format"),
        ({"format": "mxfp4", "output": "modelopt"}, "modelopt checkpoints do not exist in MXFP4.*Choose compressed-tensors"),
        ({"format": "mxfp4", "four_over_six": True}, "belong to nvfp4"),
        ({"scale_rule": "floor"}, "belongs to mxfp4"),
        ({"max_shard_bytes": 0}, "below 1 byte"),
    ],
)
def test_options_that_contradict_each_other(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantizeOptions(**arguments)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_bounded_by_a_shard_not_by_the_model(tmp_path: Path) -> None:
    """50 MB of output that exists only in memory (bf16 decoded from fp8): one shard of 5 MB is held, or all of it when one shard is all."""
    files = cf.dense({**cf.DEEPSEEK_V3, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    element = torch.ones(1024, 1024).to(torch.float8_e4m3fn)
    for index in range(25):
        name = f"model.layers.1.self_attn.part{index}.weight"
        files.tensors |= {name: element.clone(), f"{name}_scale_inv": torch.ones(8, 8)}
    source = files.write(tmp_path / "in")

    def anonymous_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])

    def growth(shard_bytes: int, out: str) -> int:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have freed must not be there to be used again
        start, seen = anonymous_bytes(), []
        quantize_model(source, tmp_path / out, QuantizeOptions(max_shard_bytes=shard_bytes), progress=lambda *_: seen.append(anonymous_bytes()))
        return max(seen) - start

    shard, largest_matrix = 5_000_000, 9 * element.numel()
    bound = shard + largest_matrix + 15_000_000  # of the fixed workspace little is used: the quantised matrices are tiny
    assert growth(shard, "bounded") < bound < growth(10**12, "whole")  # the measure does see what is held


def test_truncated_source(tmp_path: Path) -> None:
    source = cf.dense().write(tmp_path / "in", shards=3)
    os.truncate(source / "model-00002-of-00003.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors: truncated"):
        quantize_model(source, tmp_path / "out")


@pytest.mark.parametrize("change", ["rewritten", "removed", "config"])
def test_a_source_that_changes_meanwhile(tmp_path: Path, change: str) -> None:
    """No config.json is written, so nothing takes the mixture for a model; thrown away, the job begins anew."""
    source, out, seen = cf.dense().write(tmp_path / "in"), tmp_path / "out", []
    file = next(source.glob("*.safetensors"))

    def progress(done: int, total: int) -> None:
        if not seen and list(out.glob("model-00001-*")):
            seen.append(file.read_bytes())
            if change == "config":
                (source / "config.json").write_text((source / "config.json").read_text().replace("{", '{"more": 1, ', 1))
            elif change == "removed":
                file.unlink()
            else:
                os.utime(file, (1, 1))

    with pytest.raises(CheckpointError, match=r"the source (changed while it was read|vanished).*--restart"):
        quantize_model(source, out, SMALL, progress=progress)
    assert seen and not (out / "config.json").exists()
    file.write_bytes(seen[0])
    assert quantize_model(source, out, SMALL, restart=True).resumed_shards == 0
    assert (out / "config.json").exists()


def test_a_small_file_that_cannot_be_read_is_told_before_a_shard_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, opened = cf.dense().write(tmp_path / "in"), Path.open
    (source / "tokenizer.json").write_text("{}")

    def refusing(file: Path, *args: str, **options: str) -> object:  # root may read anything
        if file == source / "tokenizer.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return opened(file, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(CheckpointError, match=r"in/tokenizer\.json: cannot read the file: Permission denied\. Make it readable"):
        quantize_model(source, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [JOURNAL]
    monkeypatch.undo()
    quantize_model(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_links_that_lead_out_are_not_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "secret").write_text("mine")
    blobs, source = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    source.mkdir(parents=True)
    cf.dense().write(source)
    (blobs / "1234").write_text("{}")
    (source / "tokenizer.json").symlink_to(blobs / "1234")  # as the Hub's cache has it
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    (source / "chat.jinja").symlink_to("config.json")
    quantize_model(source, tmp_path / "out")
    copied = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat.jinja"} <= copied and "notes.txt" not in copied
    assert "notes.txt is a link that leads out of the model directory" in caplog.text


def test_the_card_speaks_of_the_weights_beside_it(tmp_path: Path) -> None:
    source = cf.dense().write(tmp_path / "Tiny-MoE")
    (source / "README.md").write_text("---\nlicense: apache-2.0\npipeline_tag: x\n---\n# Tiny-MoE\n\nBest model of all.\n")
    (source / "eval_results.json").write_text("{}")
    (source / "evaluator.py").write_text("")
    quantize_model(source, tmp_path / "out", QuantizeOptions(four_over_six=True, all_linear=True))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nbase_model: Tiny-MoE\ntags:\n- nvfp4\n") and "Best model" not in card
    assert "halfbyte quantize SOURCE DESTINATION --format nvfp4 --output modelopt --four-over-six --all-linear\n" in card
    assert re.search(r"^\| down \| \d+ \| 2\d\.\d\d \| [12]\d\.\d\d \|$", card, flags=re.MULTILINE)
    assert not (tmp_path / "out" / "eval_results.json").exists() and (tmp_path / "out" / "evaluator.py").exists()
