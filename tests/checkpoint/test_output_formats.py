"""The names, dtypes and configuration blocks of written checkpoints."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_equal_bits

import halfbyte as hb
from halfbyte.checkpoint.output_formats import hf_quant_config, pack, quantization_config, storable_global_scale
from halfbyte.errors import InputError


def described(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_tensors_of_each_format() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    nvfp4, mxfp4, scale = hb.quantize(x, hb.NVFP4), hb.quantize(x, hb.MXFP4), torch.tensor(0.25)
    u8, e4m3, fp32 = torch.uint8, torch.float8_e4m3fn, torch.float32
    weight_only = {"m.weight": (u8, (8, 32)), "m.weight_scale": (e4m3, (8, 4)), "m.weight_scale_2": (fp32, ())}
    assert described(pack("m", nvfp4, "modelopt")) == weight_only
    assert described(pack("m", nvfp4, "modelopt", scale)) == weight_only | {"m.input_scale": (fp32, ())}
    packed = {"m.weight_packed": (u8, (8, 32)), "m.weight_scale": (e4m3, (8, 4)), "m.weight_global_scale": (fp32, (1,))}
    assert described(pack("m", nvfp4, "compressed-tensors")) == packed
    calibrated = pack("m", nvfp4, "compressed-tensors", scale)
    assert described(calibrated) == packed | {"m.input_global_scale": (fp32, (1,))}
    assert calibrated["m.input_global_scale"].item() == 4  # encode: the reciprocal
    assert described(pack("m", mxfp4, "compressed-tensors")) == {"m.weight_packed": (u8, (8, 32)), "m.weight_scale": (u8, (8, 2))}


def test_gate_and_up_with_one_scale_do_not_share_memory() -> None:
    scale = torch.tensor(0.01)
    packed = [pack(name, hb.quantize(torch.ones(4, 32), hb.NVFP4, scale), "modelopt")[f"{name}.weight_scale_2"] for name in ("gate", "up")]
    assert packed[0].data_ptr() != packed[1].data_ptr()


def test_what_cannot_be_packed() -> None:
    nvfp4, mxfp4 = hb.quantize(torch.ones(4, 64), hb.NVFP4), hb.quantize(torch.ones(4, 64), hb.MXFP4)
    for q, output, scale, message in (
        (mxfp4, "modelopt", None, "modelopt checkpoints do not exist in MXFP4"),
        (nvfp4.with_scale_layout("128x4"), "modelopt", None, "linear scales"),
        (hb.quantize(torch.ones(2, 4, 64), hb.NVFP4), "modelopt", None, "matrices"),
        (mxfp4, "compressed-tensors", torch.tensor(1.0), "no input scale"),
        (nvfp4, "awq", None, "unknown output"),
    ):
        with pytest.raises(InputError, match=message):
            pack("m", q, output, scale)


def test_every_compressed_tensors_global_scale_reads_back() -> None:
    """1/(1/s) for every fp32 mantissa (the exponent does not matter to a reciprocal) survives being stored as its reciprocal; s alone does not."""
    every = (torch.arange(2**23, dtype=torch.int32) + (127 << 23)).view(torch.float32)
    stored = storable_global_scale(every, "compressed-tensors")
    assert_equal_bits(1 / (1 / stored), stored)
    assert (1 / (1 / every) != every).any()
    assert ((stored / every - 1).abs() <= 2**-23).all()
    assert storable_global_scale(every, "modelopt") is every


def test_modelopt_configuration() -> None:
    """Both files say the same, in the two dialects that engines parse; without calibration the algorithm is the weight-only one."""
    for calibrated, algorithm in ((False, "W4A16_NVFP4"), (True, "NVFP4")):
        flat = quantization_config("modelopt", hb.NVFP4, ["lm_head"], calibrated=calibrated)
        nested = hf_quant_config(["lm_head"], calibrated=calibrated)["quantization"]
        assert flat["quant_algo"] == nested["quant_algo"] == algorithm
        assert flat["ignore"] == nested["exclude_modules"] == ["lm_head"]
        assert flat["quant_method"] == "modelopt" and flat["group_size"] == nested["group_size"] == 16
        assert ("input_activations" in flat["config_groups"]["group_0"]) == calibrated


def test_compressed_tensors_configuration() -> None:
    for format, strategy, group_size, dtype in (
        (hb.NVFP4, "tensor_group", 16, "torch.float8_e4m3fn"),
        (hb.MXFP4, "group", 32, "torch.uint8"),
    ):
        config = quantization_config("compressed-tensors", format, ["lm_head"], calibrated=False)
        group = config["config_groups"]["group_0"]
        assert config["format"] == group["format"] == f"{format.name}-pack-quantized" and config["quant_method"] == "compressed-tensors"
        assert group["input_activations"] is None and group["targets"] == ["Linear"]
        weights = group["weights"]
        assert (weights["strategy"], weights["group_size"], weights["scale_dtype"], weights["num_bits"]) == (strategy, group_size, dtype, 4)
    calibrated = quantization_config("compressed-tensors", hb.NVFP4, [], calibrated=True)["config_groups"]["group_0"]
    assert calibrated["input_activations"]["dynamic"] == "local" and calibrated["weights"]["dynamic"] is False
