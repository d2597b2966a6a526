"""What the written checkpoints look like: tensor names and dtypes of a quantised module, and the configuration blocks engines read.

| output, format | tensors of a module [N, K] |
|---|---|
| modelopt NVFP4 | weight u8 [N, K/2], weight_scale e4m3 [N, K/16], weight_scale_2 fp32 (decode), input_scale fp32 (decode, calibrated only) |
| compressed-tensors NVFP4 | weight_packed u8 [N, K/2], weight_scale e4m3 [N, K/16], weight_global_scale, input_global_scale fp32 [1] (encode) |
| compressed-tensors MXFP4 | weight_packed u8 [N, K/2], weight_scale u8 e8m0 [N, K/32] |

Scales are in linear layout. Without calibration there is no input scale and the checkpoint says so: quant_algo W4A16_NVFP4 for ModelOpt (listed
by vLLM's `QUANT_ALGOS`, TensorRT-LLM's `QuantAlgo`; SGLang and vLLM route it to their weight-only kernels), `input_activations: null` for
compressed-tensors (its presets NVFP4A16, MXFP4A16). Labelling such a file NVFP4 makes engines multiply by an uninitialised input scale
(vLLM issue 54189). Sources: ModelOpt `export/convert_hf_config.py`, compressed-tensors `quantization/quant_scheme.py`, vLLM
`quantization/modelopt.py`, pull requests 41769 and 54427.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from halfbyte.errors import InputError
from halfbyte.formats import MXFP4, NVFP4, BlockFormat, QuantTensor, decode_scale_from_encode, encode_scale_from_decode

OutputName = Literal["modelopt", "compressed-tensors"]
OUTPUTS: dict[OutputName, tuple[BlockFormat, ...]] = {"modelopt": (NVFP4,), "compressed-tensors": (NVFP4, MXFP4)}


def check_output(output: str, format: BlockFormat) -> None:
    """Raise InputError unless `output` is known and can hold `format`."""
    if output not in OUTPUTS:
        raise InputError("unknown output", given=repr(output), needed=" or ".join(OUTPUTS))
    if format not in OUTPUTS[output]:
        raise InputError(
            f"{output} checkpoints do not exist in {format!r}",
            given=f"output {output}, format {format.name}",
            needed=" or ".join(f"{name} {known.name}" for name, formats in OUTPUTS.items() for known in formats),
            next_step="choose compressed-tensors for mxfp4",
        )


def storable_global_scale(decode_scale: torch.Tensor, output: OutputName) -> torch.Tensor:
    """The fp32 decode multiplier nearest to `decode_scale` that the output stores exactly.

    compressed-tensors stores 1/scale, and 1/(1/s) != s for one fp32 in six; but 1/(1/s) itself comes back exactly (checked for every mantissa
    in tests/checkpoint/test_output_formats.py), so a weight quantised with it reads back bit for bit.
    """
    return decode_scale if output == "modelopt" else decode_scale_from_encode(encode_scale_from_decode(decode_scale))


def pack(module: str, q: QuantTensor, output: OutputName, input_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Name the tensors of one quantised module as `output` stores them.

    Args:
        module: e.g. "model.layers.0.mlp.experts.3.gate_proj".
        q: [N, K] in scale layout "linear" with one global scale (NVFP4) or none (MXFP4).
        output: "modelopt" or "compressed-tensors".
        input_scale: fp32 decode multiplier [] of calibrated NVFP4 activations; None for weight-only.

    Raises:
        InputError: the output cannot hold this format, layout or an input scale with it.

    >>> sorted(pack("m", halfbyte.quantize(torch.ones(4, 32), halfbyte.NVFP4), "modelopt"))
    ['m.weight', 'm.weight_scale', 'm.weight_scale_2']
    """
    check_output(output, q.format)
    if q.scale_layout != "linear" or len(q.shape) != 2:
        raise InputError(
            "checkpoints hold matrices with linear scales", where=module, given=f"{tuple(q.shape)}, {q.scale_layout}", needed="[N, K], linear"
        )
    if q.global_scale is None:
        if input_scale is not None:
            raise InputError("MXFP4 has no input scale", where=module, given=input_scale, needed=None)
        return {f"{module}.weight_packed": q.codes, f"{module}.weight_scale": q.scales}
    if output == "modelopt":
        shared = q.global_scale.clone()  # gate and up may come with one tensor, and safetensors refuses tensors that share memory
        tensors = {f"{module}.weight": q.codes, f"{module}.weight_scale": q.scales, f"{module}.weight_scale_2": shared}
        return tensors if input_scale is None else tensors | {f"{module}.input_scale": input_scale}
    tensors = {
        f"{module}.weight_packed": q.codes,
        f"{module}.weight_scale": q.scales,
        f"{module}.weight_global_scale": encode_scale_from_decode(q.global_scale).reshape(1),
    }
    return tensors if input_scale is None else tensors | {f"{module}.input_global_scale": encode_scale_from_decode(input_scale).reshape(1)}


def quantization_config(output: OutputName, format: BlockFormat, excluded: Sequence[str], *, calibrated: bool) -> dict[str, Any]:
    """The `quantization_config` block of config.json. `excluded` names every module that is not quantised.

    >>> config = quantization_config("modelopt", NVFP4, ["lm_head"], calibrated=False)
    >>> config["quant_method"], config["quant_algo"], config["ignore"]
    ('modelopt', 'W4A16_NVFP4', ['lm_head'])
    """
    check_output(output, format)
    if output == "modelopt":
        four_bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": format.block}
        group: dict[str, Any] = {"weights": four_bits, "targets": ["Linear"]}
        if calibrated:
            group = {"input_activations": dict(four_bits), **group}
        return {
            "config_groups": {"group_0": group},
            "ignore": list(excluded),
            "quant_algo": _modelopt_algorithm(calibrated),
            "group_size": format.block,
            "producer": _producer(),
            "quant_method": "modelopt",
        }
    scheme = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group" if format is NVFP4 else "group",
        "group_size": format.block,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": str(format.scale_dtype),
    }
    packing = f"{format.name}-pack-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": scheme,
                "input_activations": {**scheme, "dynamic": "local"} if calibrated else None,
                "output_activations": None,
                "format": packing,
            }
        },
        "ignore": list(excluded),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def hf_quant_config(excluded: Sequence[str], *, calibrated: bool) -> dict[str, Any]:
    """The document `hf_quant_config.json` of a ModelOpt NVFP4 checkpoint."""
    return {
        "producer": _producer(),
        "quantization": {
            "quant_algo": _modelopt_algorithm(calibrated),
            "kv_cache_quant_algo": None,
            "group_size": NVFP4.block,
            "exclude_modules": list(excluded),
        },
    }


def _modelopt_algorithm(calibrated: bool) -> str:
    return "NVFP4" if calibrated else "W4A16_NVFP4"


def _producer() -> dict[str, str]:
    return {"name": "modelopt", "version": "halfbyte"}  # TensorRT-LLM and SGLang recognise the dialect by this name
