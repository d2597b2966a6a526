"""Every way in which the tensors of experts can be wrong: an error that names file and tensor, with what is given and needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import checkpoint_files as cf
import pytest
import torch

from halfbyte.checkpoint import load_experts
from halfbyte.errors import CheckpointError, UnsupportedError

E, H, I = cf.E, cf.H, cf.I  # noqa: E741
EXPERTS = "model.layers.1.mlp.experts"
GATE0 = f"{EXPERTS}.0.gate_proj"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


SCALE2 = f"{GATE0}.weight_scale_2"


BROKEN = {
    "missing weight_scale": ({f"{GATE0}.weight_scale": None}, ["missing tensor", f"{GATE0}.weight_scale"]),
    "missing weight_scale_2": ({SCALE2: None}, ["missing scale", SCALE2, "8 of 9", "all of them"]),
    "missing weight": ({f"{GATE0}.weight": None}, ["missing tensor", f"{GATE0}.weight"]),
    "NaN weight_scale_2": ({SCALE2: torch.tensor(torch.nan)}, ["not a positive finite number", SCALE2, "given nan"]),
    "zero weight_scale_2": ({SCALE2: torch.tensor(0.0)}, ["not a positive finite number", "given 0.0"]),
    "negative weight_scale_2": ({SCALE2: torch.tensor(-1.0)}, ["not a positive finite number", "given -1.0"]),
    "weight_scale_2 a vector": ({SCALE2: torch.ones(4)}, ["not a scalar", "(4,)"]),
    "infinite input_scale": ({f"{GATE0}.input_scale": torch.tensor(torch.inf)}, ["not a positive finite number", f"{GATE0}.input_scale"]),
    "weight left in bf16": ({f"{GATE0}.weight": torch.zeros(I, H).bfloat16()}, ["wrong dtype", "bfloat16 (32, 64)", "uint8", "(32, 32)"]),
    "scales in fp16": ({f"{GATE0}.weight_scale": torch.zeros(I, H // 16).half()}, ["wrong dtype", "float16", "float8_e4m3fn"]),
    "scales of blocks of 32": ({f"{GATE0}.weight_scale": torch.zeros(I, H // 32).to(torch.float8_e4m3fn)}, ["wrong shape", "(32, 2)", "(32, 4)"]),
    "NaN block scale": (
        {f"{GATE0}.weight_scale": torch.full((I, H // 16), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)},
        ["NaN or negative", "0x7f"],
    ),
    "negative block scale": ({f"{GATE0}.weight_scale": torch.full((I, H // 16), -1.0).to(torch.float8_e4m3fn)}, ["NaN or negative", "0xb8"]),
}


@pytest.mark.parametrize(("change", "said"), BROKEN.values(), ids=BROKEN)
def test_broken_modelopt(tmp_path: Path, change: dict, said: list[str]) -> None:
    files = cf.nvfp4("modelopt")
    for name, tensor in change.items():
        if tensor is None:
            del files.tensors[name]
        else:
            files.tensors[name] = tensor
    with pytest.raises(CheckpointError) as caught:
        load_experts(files.write(tmp_path), 1)
    for text in (*said, str(tmp_path)):
        assert text in str(caught.value)


def test_broken_powers_of_two(tmp_path: Path) -> None:
    files = cf.deepseek_v4(torch.float32)
    files.tensors["layers.1.ffn.experts.1.w3.scale"][3, 1] *= 1.5
    with pytest.raises(CheckpointError, match=r"not powers of two: layers\.1\.ffn\.experts\.1\.w3\.scale"):
        load_experts(files.write(tmp_path / "a"), 1)
    files = cf.deepseek_v4(torch.uint8)
    files.tensors["layers.1.ffn.experts.1.w3.scale"][3, 1] = 255
    with pytest.raises(CheckpointError, match="NaN"):
        load_experts(files.write(tmp_path / "b"), 1)


def test_broken_fp8_block_scale(tmp_path: Path) -> None:
    files = cf.dense(cf.DEEPSEEK_V3)
    files.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for name in [name for name in files.tensors if ".experts." in name]:
        files.tensors[name] = files.tensors[name].to(torch.float8_e4m3fn)
        files.tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    load_experts(files.write(tmp_path / "good"), 1)
    files.tensors[f"{GATE0}.weight_scale_inv"] = torch.full((1, 1), torch.nan)
    with pytest.raises(CheckpointError, match="not positive finite"):
        load_experts(files.write(tmp_path / "nan"), 1)
    del files.tensors[f"{GATE0}.weight_scale_inv"]
    with pytest.raises(CheckpointError, match=r"missing tensor: .*weight_scale_inv"):
        load_experts(files.write(tmp_path / "missing"), 1)


@pytest.mark.parametrize(("kind", "needed"), [("modelopt", 16), ("compressed-tensors", 16)])
def test_hidden_not_a_multiple_of_the_block(tmp_path: Path, kind: str, needed: int) -> None:
    files = cf.nvfp4(kind)
    files.config["hidden_size"] = 40
    with pytest.raises(CheckpointError, match=f"hidden size does not divide into NVFP4 blocks .given 40; needed a multiple of {needed}"):
        load_experts(files.write(tmp_path), 1)


def test_layers_without_experts(tmp_path: Path) -> None:
    path = cf.dense().write(tmp_path)
    with pytest.raises(CheckpointError, match=r"layer 0 has no routed experts .*MoE layers 1"):
        load_experts(path, 0)
    for layer in (2, -1):
        with pytest.raises(CheckpointError, match=f"there is no layer {layer}"):
            load_experts(path, layer)


def test_dense_experts_where_the_configuration_says_quantised_ones(tmp_path: Path) -> None:
    files = cf.dense(stacked="rows")
    files.hf_quant_config = cf.MODELOPT
    with pytest.raises(CheckpointError, match=r"(missing scale|wrong dtype): model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load_experts(files.write(tmp_path), 1)


@pytest.mark.parametrize("stacked", [False, True])
def test_factors_of_the_input_are_refused_by_name(stacked: bool, tmp_path: Path) -> None:
    """NVFP4_AWQ: even one in a layer that is otherwise sound."""
    files = cf.stacked(cf.nvfp4("modelopt")) if stacked else cf.nvfp4("modelopt")
    name = "model.layers.1.mlp.experts." + ("down_proj_pre_quant_scale" if stacked else "2.down_proj.pre_quant_scale")
    files.tensors[name] = torch.ones(cf.I)
    with pytest.raises(UnsupportedError, match=name.replace(".", r"\.")):
        load_experts(files.write(tmp_path), 1)


UNUSED = [
    "2.up_proj.bias",
    "1.gate_proj.weight_packed",
    "3x.weight",
    "gate_up_proj_scales",
    "0.gate_proj.weight_scale_inv",
]


@pytest.mark.parametrize("name", UNUSED)
def test_every_tensor_of_the_experts_has_a_use(tmp_path: Path, name: str) -> None:
    """A scale or bias that is left out computes something else."""
    files = cf.nvfp4("modelopt")
    files.tensors[f"{EXPERTS}.{name}"] = torch.ones(H)
    with pytest.raises(UnsupportedError, match=f"does not read: {EXPERTS}.{name} .given 1 such tensors"):
        load_experts(files.write(tmp_path), 1)


@pytest.mark.parametrize("missing", ["gate_up_proj_bias", "down_proj_bias"])
@pytest.mark.parametrize("packed", [True, False])
def test_gpt_oss_has_biases(tmp_path: Path, missing: str, packed: bool) -> None:
    files = cf.gpt_oss()[0] if packed else cf.dense(cf.GPT_OSS, stacked="alternating")
    if not packed:
        files.tensors |= {f"{EXPERTS}.gate_up_proj_bias": torch.zeros(E, 2 * I), f"{EXPERTS}.down_proj_bias": torch.zeros(E, H)}
    load_experts(files.write(tmp_path / "whole"), 1)
    with pytest.raises(CheckpointError, match=f"missing tensor: {EXPERTS}.{missing}"):
        load_experts(cf.without(files, missing).write(tmp_path / "half"), 1)


@pytest.mark.parametrize("size", ["hidden_size", "moe_intermediate_size"])
@pytest.mark.parametrize("make", [lambda: cf.nvfp4("modelopt"), cf.dense, lambda: cf.dense(stacked="rows"), lambda: cf.dense(stacked="columns")])
def test_nothing_is_allocated_for_sizes_that_the_files_do_not_have(tmp_path: Path, make: Callable[[], cf.Files], size: str) -> None:
    """2^30 by anything would be some 100 GB."""
    files = make()
    files.config[size] = 2**30
    with pytest.raises(CheckpointError, match=rf"wrong shape: {EXPERTS}\..*(1073741824|2147483648|536870912)"):
        load_experts(files.write(tmp_path), 1)


@pytest.mark.parametrize(("kind", "scale"), [("modelopt", -1.0), ("modelopt", torch.nan), ("compressed-tensors", torch.nan)])
def test_other_scales_of_a_pruned_expert_are_refused(tmp_path: Path, kind: str, scale: float) -> None:
    with pytest.raises(CheckpointError, match=rf"not a positive finite number: {EXPERTS}\.1\.gate_proj\.weight_"):
        load_experts(cf.prune(cf.nvfp4(kind), 1, scale).write(tmp_path), 1)
