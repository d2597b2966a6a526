"""Every format and family read back against element-by-element expectations, and every way a file can be wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import checkpoint_files as cf
import pytest
import torch
from helpers import assert_equal_bits

import halfbyte as hb
from halfbyte.checkpoint import Checkpoint, load_experts
from halfbyte.errors import CheckpointError, InputError, UnsupportedError
from halfbyte.experts import DEEPSEEK_V4_SWIGLU, GPT_OSS_SWIGLU, SWIGLU, ExpertWeights
from halfbyte.formats import MXFP4, NVFP4

E, H, I = cf.E, cf.H, cf.I  # noqa: E741
EXPERTS = "model.layers.1.mlp.experts"
GATE0 = f"{EXPERTS}.0.gate_proj"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def check_dense(weights: ExpertWeights, files: cf.Files) -> None:
    dense = weights.dequantize(torch.float32)
    assert_equal_bits(dense.w13, files.w13)
    assert_equal_bits(dense.w2, files.w2)


@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("shards", [1, 3])
def test_nvfp4(tmp_path: Path, kind: str, shards: int) -> None:
    files = cf.nvfp4(kind)
    weights = load_experts(files.write(tmp_path, shards), 1)
    assert weights.format is NVFP4 and weights.activation == SWIGLU
    check_dense(weights, files)
    assert weights.w13.global_scale.tolist() == [[2.0 ** (-e - p) for p in (0, 1)] for e in range(E)]
    assert weights.w2.global_scale.tolist() == [2.0 ** (-e - 2) for e in range(E)]
    assert weights.w13_input_scale.tolist() == [[2.0 ** (-8 - e - p) for p in (0, 1)] for e in range(E)]
    assert weights.w2_input_scale.tolist() == [2.0 ** (-10 - e) for e in range(E)]


def test_modelopt_with_mixtral_names(tmp_path: Path) -> None:
    files = cf.nvfp4("modelopt", "model.layers.1.block_sparse_moe", cf.W_NAMES, cf.MIXTRAL)
    check_dense(load_experts(files.write(tmp_path), 1), files)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "modules_to_not_convert": ["*gate"], "kv_cache_scheme": {"num_bits": 8}},
        {"quant_method": "modelopt", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}}},
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"model.layers.1.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16}}},
    ],
    ids=["flat", "w4a16", "config_groups", "mixed"],
)
def test_modelopt_described_by_config_json(tmp_path: Path, quantization: dict) -> None:
    files = cf.nvfp4("modelopt")
    files.hf_quant_config, files.config["quantization_config"] = None, quantization
    weights = load_experts(files.write(tmp_path), 1)
    assert weights.format is NVFP4
    check_dense(weights, files)


def test_absent_input_scales_are_none(tmp_path: Path) -> None:
    files = cf.nvfp4("modelopt")
    files.tensors = {name: tensor for name, tensor in files.tensors.items() if not name.endswith("input_scale")}
    weights = load_experts(files.write(tmp_path), 1)
    assert weights.w13_input_scale is None and weights.w2_input_scale is None


def test_excluded_experts_are_dense(tmp_path: Path) -> None:
    files = cf.dense()
    files.hf_quant_config = {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["model.layers.1.mlp.experts*"]}}
    weights = load_experts(files.write(tmp_path), 1)
    assert weights.format is None
    check_dense(weights, files)


def test_compressed_tensors_mxfp4(tmp_path: Path) -> None:
    files = cf.compressed_tensors_mxfp4()
    weights = load_experts(files.write(tmp_path), 1)
    assert weights.format is MXFP4
    check_dense(weights, files)


def test_gpt_oss_is_deinterleaved(tmp_path: Path) -> None:
    files, w13_bias, w2_bias = cf.gpt_oss()
    weights = load_experts(files.write(tmp_path), 1)
    assert weights.format is MXFP4 and weights.activation == GPT_OSS_SWIGLU
    check_dense(weights, files)
    assert_equal_bits(weights.w13_bias, w13_bias)
    assert_equal_bits(weights.w2_bias, w2_bias)


@pytest.mark.parametrize("scale_name", ["scale", "weight_scale_inv"])
@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float8_e8m0fnu, torch.float32])
def test_deepseek_v4(tmp_path: Path, scale_dtype: torch.dtype, scale_name: str) -> None:
    files = cf.deepseek_v4(scale_dtype, scale_name)
    weights = load_experts(files.write(tmp_path), 1)
    assert weights.format is MXFP4 and weights.activation == DEEPSEEK_V4_SWIGLU
    check_dense(weights, files)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("config", "block", "names"),
    [
        (cf.QWEN, "model.layers.1.mlp", cf.NAMES),
        ({**cf.QWEN, "model_type": "qwen3_next"}, "model.layers.1.mlp", cf.NAMES),
        (cf.MIXTRAL, "model.layers.1.block_sparse_moe", cf.W_NAMES),
        (cf.MIXTRAL, "model.layers.1.mlp", cf.W_NAMES),
        (cf.DEEPSEEK_V3, "model.layers.1.mlp", cf.NAMES),
        ({**cf.DEEPSEEK_V3, "model_type": "glm4_moe"}, "model.language_model.layers.1.mlp", cf.NAMES),
    ],
)
def test_dense_families(tmp_path: Path, config: dict, block: str, names: dict, dtype: torch.dtype) -> None:
    files = cf.dense(config, dtype, block, names)
    files.tensors[f"{block}.shared_experts.gate_proj.weight"] = torch.zeros(8, H)
    files.tensors["mtp.layers.0.mlp.experts.0.gate_proj.weight"] = torch.zeros(8, H)
    weights = load_experts(files.write(tmp_path), 1)
    assert weights.w13.dtype == dtype
    check_dense(weights, files)


@pytest.mark.parametrize(("config", "stacked"), [(cf.QWEN, "rows"), (cf.QWEN, "columns"), (cf.GPT_OSS, "alternating")])
def test_stacked_dense_even_when_shapes_are_ambiguous(tmp_path: Path, config: dict, stacked: str) -> None:
    assert 2 * I == H  # so [E, 2I, H] and [E, H, 2I] are one shape
    files = cf.dense(config, stacked=stacked)
    if config is cf.GPT_OSS:
        files.tensors |= {
            f"model.layers.1.mlp.experts.{name}_bias": torch.zeros(E, rows) for name, rows in (("gate_up_proj", 2 * I), ("down_proj", H))
        }
    check_dense(load_experts(files.write(tmp_path), 1), files)


def test_fp8_block_with_ragged_edges(tmp_path: Path) -> None:
    hidden, intermediate = 200, 136
    config = {**cf.DEEPSEEK_V3, "hidden_size": hidden, "moe_intermediate_size": intermediate, "n_routed_experts": 1, "num_experts_per_tok": 1}
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    files, expected = cf.Files(config), {}
    for leaf, (rows, columns) in {"gate_proj": (136, 200), "up_proj": (136, 200), "down_proj": (200, 136)}.items():
        weight, scale = torch.randn(rows, columns).to(torch.float8_e4m3fn), torch.rand(2, 2) + 0.1
        prefix = f"model.layers.1.mlp.experts.0.{leaf}"
        files.tensors |= {f"{prefix}.weight": weight, f"{prefix}.weight_scale_inv": scale}
        row, column = torch.arange(rows)[:, None] // 128, torch.arange(columns)[None] // 128
        expected[leaf] = (weight.float() * scale[row, column]).bfloat16()
    weights = load_experts(files.write(tmp_path), 1)
    assert_equal_bits(weights.w13[0], torch.cat([expected["gate_proj"], expected["up_proj"]]))
    assert_equal_bits(weights.w2[0], expected["down_proj"])


def test_a_slice_of_experts_keeps_all_input_scales(tmp_path: Path) -> None:
    files = cf.nvfp4("modelopt")
    weights = load_experts(files.write(tmp_path), 1, experts=range(1, 3))
    assert (weights.num_experts, weights.first_expert, weights.num_global_experts) == (2, 1, E)
    assert_equal_bits(weights.dequantize().w13, files.w13[1:3])
    assert weights.w13_input_scale.shape == (E, 2) and weights.w2_input_scale.shape == (E,)
    for wrong in (range(1, E + 1), range(0, 3, 2), range(2, 1)):
        with pytest.raises(InputError, match="contiguous slice"):
            load_experts(tmp_path, 1, experts=wrong)


def test_outputs_are_preallocated_and_filled_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing the size of a layer is made but the result: no stack or cat, and each file tensor is read when its expert is filled."""
    files = cf.nvfp4("modelopt")
    checkpoint = Checkpoint.open(files.write(tmp_path))
    reads: list[str] = []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (reads.append(name), original(self, name))[1])
    monkeypatch.setattr(torch, "stack", None)
    monkeypatch.setattr(torch, "cat", None)
    load_experts(checkpoint, 1, experts=range(2))
    assert len(reads) == len(set(reads))
    weights_read = [name for name in reads if name.endswith((".weight", ".weight_scale"))]
    assert [int(name.split(".")[5]) for name in weights_read] == [0] * 6 + [1] * 6


def test_reading_one_layer_maps_rather_than_copies(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(cf.dense().write(tmp_path))
    first, second = checkpoint.read(f"{GATE0}.weight"), checkpoint.read(f"{GATE0}.weight")
    assert first.data_ptr() == second.data_ptr()


def test_scattered_input_scales_are_logged_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = cf.nvfp4("modelopt")
    files.tensors["model.layers.1.mlp.experts.2.up_proj.input_scale"] = torch.tensor(50.0)
    path = files.write(tmp_path)
    with caplog.at_level(logging.WARNING, "halfbyte"):
        weights = load_experts(path, 1)
    assert weights.w13_input_scale[2, 1] == 50.0
    (record,) = caplog.records
    assert "up input scales of 1 of 3 experts" in record.getMessage() and "expert 2" in record.getMessage()


def test_the_demo_model_reads_as_plain_safetensors_says() -> None:
    import halfbyte

    path = Path(halfbyte.__file__).parent / "demo_model"
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    weights = load_experts(path, 5)
    from safetensors import safe_open

    for name, rows in (("gate_proj", slice(0, 128)), ("up_proj", slice(128, 256))):
        key = f"model.layers.5.mlp.experts.9.{name}.weight"
        with safe_open(path / index[key], "pt") as file:
            assert_equal_bits(weights.w13[9, rows], file.get_tensor(key))


def test_stacked_scalars_of_the_whole_layer_or_of_each_expert(tmp_path: Path) -> None:
    files = cf.stacked(cf.nvfp4("modelopt"))
    prefix = "model.layers.1.mlp.experts"
    for index, (up, down) in enumerate((((), ()), ((1,), (1, 1)), ((cf.E,), (cf.E, 1)), ((cf.E, 1), (cf.E,)))):
        values = torch.arange(1.0, cf.E + 1)
        for leaf, shape in (("gate_up_proj", up), ("down_proj", down)):
            files.tensors[f"{prefix}.{leaf}_weight_scale_2"] = values.reshape(shape).clone() if cf.E in shape else torch.full(shape, 2.0)
        weights = load_experts(files.write(tmp_path / str(index)), 1)
        for actual, shape in ((weights.w13.global_scale[:, 0], up), (weights.w13.global_scale[:, 1], up), (weights.w2.global_scale, down)):
            assert actual.tolist() == (values.tolist() if cf.E in shape else [2.0] * cf.E)
    files.tensors[f"{prefix}.down_proj_weight_scale_2"] = torch.ones(cf.E + 1)
    with pytest.raises(CheckpointError, match=r"not a scalar: .*down_proj_weight_scale_2 .*one per expert"):
        load_experts(files.write(tmp_path / "wrong"), 1)


def test_experts_one_by_one_with_biases(tmp_path: Path) -> None:
    """gpt-oss taken apart by llm-compressor: rows alternate in stacks alone."""
    files = cf.nvfp4("compressed-tensors", config=cf.GPT_OSS)
    biases = {leaf: torch.randn(cf.E, cf.rows_columns(projection)[0]) for projection, leaf in cf.NAMES.items()}
    for leaf, bias in biases.items():
        files.tensors |= {f"model.layers.1.mlp.experts.{expert}.{leaf}.bias": bias[expert].clone() for expert in range(cf.E)}
    weights = load_experts(files.write(tmp_path), 1)
    assert_equal_bits(weights.dequantize().w13, files.w13)
    assert_equal_bits(weights.w13_bias, torch.cat([biases["gate_proj"], biases["up_proj"]], dim=1))
    assert_equal_bits(weights.w2_bias, biases["down_proj"])


@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors"])
def test_experts_that_calibration_did_not_reach(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A warning names what is missing; the largest of the layer stands in for it, for the same input: w13's for gate and up, w2's for down."""
    files = cf.without(cf.nvfp4(kind), f"{EXPERTS}.0.gate_proj.input_")
    files = cf.without(files, f"{EXPERTS}.2.down_proj.input_")
    path = files.write(tmp_path)
    with caplog.at_level(logging.WARNING, "halfbyte"):
        weights = load_experts(path, 1)
    check_dense(weights, files)
    assert weights.w13_input_scale.tolist() == [[2.0**-9, 2.0**-9], [2.0**-9, 2.0**-10], [2.0**-10, 2.0**-11]]
    assert weights.w2_input_scale.tolist() == [2.0**-10, 2.0**-11, 2.0**-10]
    (record,) = caplog.records
    assert "missing input scales" in record.getMessage() and f"{EXPERTS}.0.gate_proj.input_" in record.getMessage()
    assert f"{EXPERTS}.2.down_proj.input_" in record.getMessage()


def test_an_input_that_nothing_was_calibrated_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = cf.without(cf.nvfp4("modelopt"), "down_proj.input_scale")
    with caplog.at_level(logging.WARNING, "halfbyte"):
        weights = load_experts(files.write(tmp_path), 1)
    assert weights.w2_input_scale is None and weights.w13_input_scale.shape == (E, 2)
    assert "down_proj.input_scale" in caplog.text


@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("scale", [0.0, torch.inf])
@pytest.mark.parametrize("negative_zero", [False, True])
def test_a_pruned_expert_is_zero_whatever_its_scale(tmp_path: Path, kind: str, scale: float, negative_zero: bool) -> None:
    files = cf.prune(cf.nvfp4(kind), 1, scale, negative_zero)
    weights = load_experts(files.write(tmp_path), 1)
    check_dense(weights, files)
    assert weights.w13.global_scale[1].tolist() == [1.0, 1.0] and weights.w2.global_scale[1] == 1.0


@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_scalars_of_any_shape(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    files = cf.nvfp4(kind)
    files.tensors = {name: tensor.reshape(shape) if tensor.numel() == 1 else tensor for name, tensor in files.tensors.items()}
    check_dense(load_experts(files.write(tmp_path), 1), files)


def test_biases_of_one_matrix_each_are_not_left_out(tmp_path: Path) -> None:
    files = cf.dense()
    biases = {(expert, leaf): torch.randn(H if leaf == "down_proj" else I) for expert in range(E) for leaf in ("gate_proj", "up_proj", "down_proj")}
    files.tensors |= {f"{EXPERTS}.{expert}.{leaf}.bias": bias for (expert, leaf), bias in biases.items()}
    w = load_experts(files.write(tmp_path / "all"), 1)
    assert w.w13_bias is not None and w.w2_bias is not None
    for expert in range(E):
        assert torch.equal(w.w13_bias[expert], torch.cat([biases[expert, "gate_proj"], biases[expert, "up_proj"]]))
        assert torch.equal(w.w2_bias[expert], biases[expert, "down_proj"])
    for leaf, other in (("up_proj", "gate_proj"), ("gate_proj", "up_proj")):
        files = cf.dense()
        files.tensors |= {f"{EXPERTS}.{expert}.{leaf}.bias": torch.ones(I) for expert in range(E)}
        with pytest.raises(CheckpointError, match=rf"missing tensor:? .*0\.{other}\.bias"):
            load_experts(files.write(tmp_path / leaf), 1)


def test_fp8_blocks_with_bf16_scales_and_without_nan(tmp_path: Path) -> None:
    files = cf.dense(cf.DEEPSEEK_V3)
    files.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for name in [name for name in files.tensors if ".experts." in name]:
        files.tensors[name] = files.tensors[name].to(torch.float8_e4m3fn)
        files.tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.375).bfloat16()
    weights = load_experts(files.write(tmp_path / "bf16"), 1)
    expected = torch.stack([files.tensors[f"{EXPERTS}.{e}.down_proj.weight"].float() * 0.375 for e in range(E)]).bfloat16()
    assert_equal_bits(weights.w2, expected)
    for byte in (0x7F, 0xFF):
        spoilt = files.tensors[f"{EXPERTS}.2.up_proj.weight"].clone()
        spoilt.view(torch.uint8)[5, 7] = byte
        files.tensors[f"{EXPERTS}.2.up_proj.weight"] = spoilt
        with pytest.raises(CheckpointError, match=rf"NaN weights: {EXPERTS}\.2\.up_proj\.weight"):
            load_experts(files.write(tmp_path / f"nan{byte}"), 1)


@pytest.mark.parametrize("read", [hb.load_experts, hb.load_router, hb.load_prepared])
def test_layers_are_integers_and_devices_are_there(read: Callable[..., object]) -> None:
    with pytest.raises(InputError, match=r"a layer is an integer \(given '0'; needed one of the MoE layers 0..5\)"):
        read("demo", "0")
    with pytest.raises(UnsupportedError, match=r"cannot use the device.*Run: halfbyte doctor"):
        read("demo", 0, device="banana")
