"""Every dialect: the names and dtypes it writes, and what the reader makes of files in it, element by element."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import checkpoint_files as cf
import pytest
import torch
from helpers import assert_equal_bits

import halfbyte as hb
from halfbyte.checkpoint import Checkpoint, load_experts
from halfbyte.checkpoint.dialects import (
    DEEPSEEK_V4,
    DENSE,
    DIALECTS,
    FP8_BLOCK,
    GPT_OSS,
    MODELOPT,
    MXFP4_PACK,
    NVFP4_PACK,
    OUTPUTS,
    QUANTIZED_ONLY,
    QUARK,
    STACKED_DENSE,
    STACKED_MODELOPT,
    STACKED_MXFP4_PACK,
    STACKED_NVFP4_PACK,
    Dialect,
    is_scale,
    output_dialect,
)
from halfbyte.checkpoint.projections import FUSED, PROJECTION_OF
from halfbyte.errors import InputError

SOURCE = Path(hb.__file__).parent


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def described(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def fp8_block() -> cf.Files:
    """One 128 x 128 tile a matrix, its scale a power of two, so that the bf16 result is exact."""
    files = cf.dense(cf.DEEPSEEK_V3)
    files.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    files.dense = {projection: [] for projection in files.dense}
    for expert in range(cf.E):
        for projection, leaf in cf.NAMES.items():
            name = f"model.layers.1.mlp.experts.{expert}.{leaf}"
            weight = torch.randn(cf.rows_columns(projection)).to(torch.float8_e4m3fn)
            files.tensors |= {f"{name}.weight": weight, f"{name}.weight_scale_inv": torch.full((1, 1), 2.0**-expert)}
            files.dense[projection].append(weight.float() * 2.0**-expert)
    return files


# Files written by hand, under literal names.
FILES = {
    MODELOPT: lambda: cf.nvfp4("modelopt"),
    NVFP4_PACK: lambda: cf.nvfp4("compressed-tensors"),
    MXFP4_PACK: cf.compressed_tensors_mxfp4,
    GPT_OSS: lambda: cf.gpt_oss()[0],
    DEEPSEEK_V4: cf.deepseek_v4,
    FP8_BLOCK: fp8_block,
    DENSE: cf.dense,
    STACKED_DENSE: lambda: cf.dense(stacked="columns"),
    QUARK: cf.quark,
    STACKED_MODELOPT: lambda: cf.stacked(cf.nvfp4("modelopt")),
    STACKED_NVFP4_PACK: lambda: cf.stacked(cf.nvfp4("compressed-tensors")),
    STACKED_MXFP4_PACK: lambda: cf.stacked(cf.compressed_tensors_mxfp4()),
}


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_every_dialect_is_read(dialect: Dialect, tmp_path: Path) -> None:
    files = FILES[dialect]()
    weights = load_experts(files.write(tmp_path), 1)
    assert weights.format is dialect.format
    assert_equal_bits(weights.dequantize().w13, files.w13)
    assert_equal_bits(weights.dequantize().w2, files.w2)


WRITTEN = {
    MODELOPT: (cf.nvfp4("modelopt"), "model.layers.1.mlp", cf.NAMES, {".weight", ".weight_scale", ".weight_scale_2", ".input_scale"}),
    NVFP4_PACK: (
        cf.nvfp4("compressed-tensors"),
        "model.layers.1.mlp",
        cf.NAMES,
        {".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale"},
    ),
    MXFP4_PACK: (cf.compressed_tensors_mxfp4(), "model.layers.1.mlp", cf.NAMES, {".weight_packed", ".weight_scale"}),
    DEEPSEEK_V4: (cf.deepseek_v4(), "layers.1.ffn", cf.W_NAMES, {".weight", ".scale"}),
}


@pytest.mark.parametrize("dialect", WRITTEN, ids=lambda dialect: dialect.name)
def test_what_is_written_reads_back(dialect: Dialect, tmp_path: Path) -> None:
    """Packed, saved and loaded: what codes and scales mean one by one, under the expected names and no others."""
    files, block, names, suffixes = WRITTEN[dialect]
    experts = f"{block}.experts."
    files.tensors = {name: tensor for name, tensor in files.tensors.items() if not name.startswith(experts)}
    expected: dict[str, list[torch.Tensor]] = {projection: [] for projection in names}
    nvfp4 = dialect.format is hb.NVFP4
    input_scale = torch.tensor(0.013) if nvfp4 else None
    for expert in range(cf.E):
        for projection, leaf in names.items():
            scale = dialect.storable_global_scale(torch.tensor(0.001 * (1 + expert))) if nvfp4 else None
            q = hb.quantize(torch.randn(cf.rows_columns(projection)), dialect.format, scale)
            scales = q.scales.float().tolist() if nvfp4 else cf.e8m0_values(q.scales)
            expected[projection].append(cf.decode(q.codes, scales, 16 if nvfp4 else 32, 1.0 if scale is None else scale.item()))
            packed = dialect.pack(f"{experts}{expert}.{leaf}", q, input_scale)
            assert packed.keys() == {f"{experts}{expert}.{leaf}{suffix}" for suffix in suffixes}
            files.tensors |= packed
    files.dense = expected
    weights = load_experts(files.write(tmp_path), 1)
    assert_equal_bits(weights.dequantize().w13, files.w13)
    assert_equal_bits(weights.dequantize().w2, files.w2)
    if nvfp4:
        assert weights.w13_input_scale.flatten().tolist() == pytest.approx([0.013] * 2 * cf.E, rel=1e-6)
    else:
        assert weights.w13_input_scale is None


def test_tensors_of_each_output() -> None:
    x = torch.randn(8, 64)
    nvfp4, mxfp4, scale = hb.quantize(x, hb.NVFP4), hb.quantize(x, hb.MXFP4), torch.tensor(0.25)
    u8, e4m3, fp32 = torch.uint8, torch.float8_e4m3fn, torch.float32
    weight_only = {"m.weight": (u8, (8, 32)), "m.weight_scale": (e4m3, (8, 4)), "m.weight_scale_2": (fp32, ())}
    assert described(MODELOPT.pack("m", nvfp4)) == weight_only
    assert described(MODELOPT.pack("m", nvfp4, scale)) == weight_only | {"m.input_scale": (fp32, ())}
    packed = {"m.weight_packed": (u8, (8, 32)), "m.weight_scale": (e4m3, (8, 4)), "m.weight_global_scale": (fp32, (1,))}
    assert described(NVFP4_PACK.pack("m", nvfp4)) == packed
    calibrated = NVFP4_PACK.pack("m", nvfp4, scale)
    assert described(calibrated) == packed | {"m.input_global_scale": (fp32, (1,))}
    assert calibrated["m.input_global_scale"].item() == 4  # encode: the reciprocal
    assert described(MXFP4_PACK.pack("m", mxfp4)) == {"m.weight_packed": (u8, (8, 32)), "m.weight_scale": (u8, (8, 2))}


def test_gate_and_up_with_one_scale_do_not_share_memory() -> None:
    scale = torch.tensor(0.01)
    packed = [MODELOPT.pack(name, hb.quantize(torch.ones(4, 32), hb.NVFP4, scale))[f"{name}.weight_scale_2"] for name in ("gate", "up")]
    assert packed[0].data_ptr() != packed[1].data_ptr()


def test_what_cannot_be_packed() -> None:
    nvfp4, mxfp4 = hb.quantize(torch.ones(4, 64), hb.NVFP4), hb.quantize(torch.ones(4, 64), hb.MXFP4)
    for q, dialect, scale, message in (
        (mxfp4, MODELOPT, None, "modelopt does not hold MXFP4 matrices"),
        (mxfp4, GPT_OSS, None, r"gpt-oss holds other matrices .*needed \[E, N, K\]"),
        (nvfp4, DENSE, None, "dense does not hold NVFP4 matrices"),
        (nvfp4.with_scale_layout("128x4"), MODELOPT, None, "needed .N, K., linear"),
        (hb.quantize(torch.ones(2, 4, 64), hb.NVFP4), MODELOPT, None, "matrices"),
        (mxfp4, MXFP4_PACK, torch.tensor(1.0), "no input scale"),
    ):
        with pytest.raises(InputError, match=message):
            dialect.pack("m", q, scale)


def test_outputs() -> None:
    assert output_dialect("modelopt", hb.NVFP4) is MODELOPT and output_dialect("compressed-tensors", hb.NVFP4) is NVFP4_PACK
    assert set(OUTPUTS) == {"modelopt", "compressed-tensors", "gpt-oss"}
    with pytest.raises(InputError, match=r"modelopt checkpoints do not exist in MXFP4 .*compressed-tensors mxfp4"):
        output_dialect("modelopt", hb.MXFP4)
    with pytest.raises(InputError, match="unknown output"):
        output_dialect("awq", hb.NVFP4)


def test_every_compressed_tensors_global_scale_reads_back() -> None:
    """1/(1/s) for every fp32 mantissa (the exponent does not matter to a reciprocal) survives being stored as its reciprocal; s alone does not."""
    every = (torch.arange(2**23, dtype=torch.int32) + (127 << 23)).view(torch.float32)
    stored = NVFP4_PACK.storable_global_scale(every)
    assert_equal_bits(1 / (1 / stored), stored)
    assert (1 / (1 / every) != every).any()
    assert ((stored / every - 1).abs() <= 2**-23).all()
    assert MODELOPT.storable_global_scale(every) is every


@pytest.mark.parametrize("make", FILES.values(), ids=[dialect.name for dialect in FILES])
def test_scales_are_told_from_codes_by_name(make: object, tmp_path: Path) -> None:
    """In every dialect a tensor is a scale exactly when it is neither codes, nor a weight, nor a bias, nor the router's table."""
    names = Checkpoint.open(make().write(tmp_path)).names  # type: ignore[operator]
    others = (".weight", "_packed", "_blocks", "bias", "tid2eid", "experts.gate_up_proj", "experts.down_proj")
    assert [name for name in names if is_scale(name)] == [name for name in names if not name.endswith(others)]


def test_what_only_a_quantised_module_has() -> None:
    assert set(QUANTIZED_ONLY) == {".weight_scale", ".weight_scale_2", ".weight_scale_inv", ".weight_global_scale", ".weight_zero_point"}


def strings(file: Path) -> Iterator[str]:
    """The string constants of a module, parts of f-strings among them, docstrings not."""
    tree = ast.parse(file.read_text())
    documented = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body]
    docstrings = {id(node.body[0].value) for node in documented if isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def homes(words: set[str], parts: tuple[str, ...] = ()) -> set[str]:
    """Files of src with a string that is one of `words` or has one of `parts` in it."""
    found = {file for file in SOURCE.rglob("*.py") for text in strings(file) if text in words or any(part in text for part in parts)}
    return {file.relative_to(SOURCE).as_posix() for file in found}


OF_TRANSFORMERS = {"_scale", "_input_scale", "_bias"}  # the suffixes by which the plug-in's own Parameters are called, too

OF_ENGINES = {"bench/serve_weights.py", "integrations/vllm/methods.py", "integrations/sglang/methods.py"}  # which name engines' own Parameters


def test_tensor_suffixes_are_written_in_one_file() -> None:
    suffixes = {suffix for d in DIALECTS for suffix in (d.codes, *d.scales, d.global_scale, d.input_scale)} - {"", ".weight", *OF_TRANSFORMERS}
    assert {"_blocks", "_scales", ".scale", ".input_scale", ".weight_packed"} <= suffixes
    found = homes(suffixes, ("weight_packed", "weight_scale", "weight_global", "input_global", "scale_inv"))
    assert found - OF_ENGINES == {"checkpoint/dialects.py"}


def test_names_of_projections_and_fused_modules_are_written_in_one_file() -> None:
    """Except those by which transformers' own modules call their parameters and ExpertWeights its own."""
    words = {*PROJECTION_OF, *FUSED, *(leaf for leaves in FUSED.values() for leaf in leaves)}
    assert homes(words - {"gate_up_proj", "up_proj", "down_proj", "w13", "w2"}) == {"checkpoint/projections.py"}
