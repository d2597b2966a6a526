"""The configuration blocks of written checkpoints."""

from __future__ import annotations

from halfbyte.checkpoint.dialects import MODELOPT, MXFP4_PACK, NVFP4_PACK
from halfbyte.checkpoint.written_config import hf_quant_config, quantization_config


def test_modelopt_configuration() -> None:
    """Both files say the same, in the two dialects that engines parse; without calibration the algorithm is the weight-only one."""
    for calibrated, algorithm in ((False, "W4A16_NVFP4"), (True, "NVFP4")):
        flat = quantization_config(MODELOPT, ["lm_head"], calibrated=calibrated)
        nested = hf_quant_config(["lm_head"], calibrated=calibrated)["quantization"]
        assert flat["quant_algo"] == nested["quant_algo"] == algorithm
        assert flat["ignore"] == nested["exclude_modules"] == ["lm_head"]
        assert flat["quant_method"] == "modelopt" and flat["group_size"] == nested["group_size"] == 16
        assert ("input_activations" in flat["config_groups"]["group_0"]) == calibrated


def test_compressed_tensors_configuration() -> None:
    for dialect, packing, strategy, group_size, dtype in (
        (NVFP4_PACK, "nvfp4-pack-quantized", "tensor_group", 16, "torch.float8_e4m3fn"),
        (MXFP4_PACK, "mxfp4-pack-quantized", "group", 32, "torch.uint8"),
    ):
        config = quantization_config(dialect, ["lm_head"], calibrated=False)
        group = config["config_groups"]["group_0"]
        assert config["format"] == group["format"] == packing and config["quant_method"] == "compressed-tensors"
        assert group["input_activations"] is None and group["targets"] == ["Linear"]
        weights = group["weights"]
        assert (weights["strategy"], weights["group_size"], weights["scale_dtype"], weights["num_bits"]) == (strategy, group_size, dtype, 4)
    calibrated = quantization_config(NVFP4_PACK, [], calibrated=True)["config_groups"]["group_0"]
    assert calibrated["input_activations"]["dynamic"] == "local" and calibrated["weights"]["dynamic"] is False
