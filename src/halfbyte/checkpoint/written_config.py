"""The configuration blocks of written checkpoints, as engines read them. Their tensors: `checkpoint.dialects`.

Without calibration there is no input scale and the checkpoint says so: quant_algo W4A16_NVFP4 for ModelOpt (listed by vLLM's `QUANT_ALGOS`,
TensorRT-LLM's `QuantAlgo`; SGLang and vLLM route it to their weight-only kernels), `input_activations: null` for compressed-tensors (its presets
NVFP4A16, MXFP4A16). Labelling such a file NVFP4 makes engines multiply by an uninitialised input scale (vLLM issue 54189). Sources: ModelOpt
`export/convert_hf_config.py`, compressed-tensors `quantization/quant_scheme.py`, vLLM `quantization/modelopt.py`, pull requests 41769 and 54427.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.checkpoint.dialects import GPT_OSS, MODELOPT, STACKED_MODELOPT, Dialect
from halfbyte.formats import NVFP4


def quantization_config(dialect: Dialect, excluded: Sequence[str], *, calibrated: bool) -> dict[str, Any]:
    """The `quantization_config` block of config.json, for tensors in an FP4 dialect of `OUTPUTS`. `excluded` names every module left unquantised.

    >>> config = quantization_config(MODELOPT, ["lm_head"], calibrated=False)
    >>> config["quant_method"], config["quant_algo"], config["ignore"]
    ('modelopt', 'W4A16_NVFP4', ['lm_head'])
    """
    format = dialect.format
    assert format
    if dialect is GPT_OSS:
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(excluded)}
    if dialect in (MODELOPT, STACKED_MODELOPT):
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
    return {
        "quant_method": "compressed-tensors",
        "format": dialect.name,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": scheme,
                "input_activations": {**scheme, "dynamic": "local"} if calibrated else None,
                "output_activations": None,
                "format": dialect.name,
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
