"""Seven small models that are sound, one of each layout, as the bytes of their files. They are complete: `halfbyte eval` runs them."""

from __future__ import annotations

import json
import re
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tiny_models
import torch
from safetensors.torch import load_file, save

import halfbyte as hb
from halfbyte.checkpoint.source import INDEX, demo_model_dir

Files = dict[str, Any]  # bytes by file name; or a function that makes something else under a path
Tensors = dict[str, torch.Tensor]
TOKENIZER = "tokenizer.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TEXT = "Tom has 12 apples. He gives 5 of them to his sister and buys 4 more at the market. How many apples does Tom have now? " * 2
_SIZES: dict[str, Any] = {"vocab_size": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # the tokenizer is that of the demo model
_QWEN = {**_SIZES, "num_experts": 4}
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")


def _packed(family: str, output: str, sizes: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        packed, _ = tiny_models.write(tiny_models.build(family, **sizes), output, Path(folder))
        return load_file(packed / "model.safetensors"), json.loads((packed / "config.json").read_text())


def _dense(family: str, sizes: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        tiny_models.build(family, **sizes).save_pretrained(folder)
        return load_file(Path(folder, "model.safetensors")), json.loads(Path(folder, "config.json").read_text())


def _fp8_block() -> tuple[Tensors, dict[str, Any]]:
    """Experts as e4m3 with scales of 128 x 128 tiles; these matrices are one tile each."""
    dense, config = _dense("qwen3_moe", _QWEN)
    tensors = {}
    for name, tensor in dense.items():
        if _EXPERT.search(name):
            scale = tensor.abs().max() / 448
            tensors |= {name: (tensor / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale.reshape(1, 1)}
        else:
            tensors[name] = tensor
    return tensors, {**config, "quantization_config": _FP8}


def _deepseek_v4() -> tuple[Tensors, dict[str, Any]]:
    """MXFP4 experts in the names of the published files, the other layers as they are."""
    dense, config = _dense("deepseek_v4", _SIZES)
    tensors = {}
    for saved, tensor in dense.items():
        name = re.sub(r"^model\.(embed_tokens(?=\.))?", lambda match: "embed" if match[1] else "", saved)
        if re.search(r"\.ffn\.experts\.\d+\.w[123]\.weight$", name):
            q = hb.quantize(tensor, hb.MXFP4)
            tensors |= {name: q.codes.view(torch.int8), f"{name.removesuffix('weight')}scale": q.scales.view(torch.float8_e8m0fnu)}
        else:
            tensors[name] = tensor
    return tensors, {**config, "expert_dtype": "fp4", "quantization_config": _FP8}


def _modelopt() -> tuple[Tensors, dict[str, Any], dict[str, Any]]:
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "model.layers.*.self_attn*"]}
    return *_packed("qwen3_moe", "modelopt", _QWEN), {"producer": {"name": "modelopt"}, "quantization": quantization}


LAYOUTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "modelopt": _modelopt,
    "nvfp4-pack": lambda: _packed("qwen3_moe", "nvfp4-pack-quantized", _QWEN),
    "mxfp4-pack": lambda: _packed("qwen3_moe", "mxfp4-pack-quantized", _QWEN),
    "gpt-oss": lambda: _packed("gpt_oss", "gpt-oss", _SIZES),
    "deepseek-v4": _deepseek_v4,
    "dense": lambda: _dense("qwen3_moe", _QWEN),
    "fp8-block": _fp8_block,
}


@cache
def sound(layout: str) -> Files:
    """The files of one layout, with weights in two shards. Floats that are not part of the format are bf16."""
    tensors, config, *further = LAYOUTS[layout]()
    stored = {name: tensor.bfloat16() if _is_plain(name, tensor) else tensor for name, tensor in sorted(tensors.items())}
    halves = [dict(list(stored.items())[half::2]) for half in range(2)]
    files: Files = {shard: save(half, metadata={"format": "pt"}) for shard, half in zip(SHARDS, halves, strict=True)}
    weight_map = {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half}
    documents = {"config.json": {**config, "dtype": "bfloat16"}, INDEX: {"metadata": {}, "weight_map": weight_map}}
    documents |= dict(zip(("hf_quant_config.json",), further, strict=False))
    files |= {name: json.dumps(document).encode() for name, document in documents.items()}
    return files | {name: (demo_model_dir() / name).read_bytes() for name in (TOKENIZER, "tokenizer_config.json")}


def _is_plain(name: str, tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32 and "scale" not in name and not name.endswith(("correction_bias", "gate.bias"))


def write(files: Files, path: Path) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path / name)
        else:
            (path / name).write_bytes(content)
    return path


def split(shard: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", shard[:8])
    return json.loads(shard[8 : 8 + length]), shard[8 + length :]


def join(header: dict[str, Any] | str | bytes, data: bytes) -> bytes:
    """The file with this header, which need not be one."""
    text = json.dumps(header) if isinstance(header, dict) else header
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded)) + encoded + data
