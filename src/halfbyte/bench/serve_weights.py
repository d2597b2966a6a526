"""Models of published sizes with seeded random weights: a config.json for the engine's loader, values for its Parameters, and the same values again.

A value depends on the Parameter's name and the model's sizes alone, so each process fills the same weights, however its engine pads them. They are as
large as trained weights: hidden states keep their size from layer to layer, and routers choose evenly.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from halfbyte.bench.shapes import NAMED_SHAPES, MoEShape
from halfbyte.env import cache_dir
from halfbyte.errors import UnsupportedError
from halfbyte.experts import ExpertWeights
from halfbyte.formats import QuantTensor

_SCALE_BYTES = {"nvfp4": (0x50, 0x60), "mxfp4": (119, 122)}  # e4m3 8 to 30, e8m0 2^-8 to 2^-6
_NVFP4_UNIT = 2.9 * 18.2  # rms of random codes times that of these block scales: what a global scale multiplies
_EXPERT_RMS = {"w13": 0.02, "w2": 0.04}
_LINEAR_RMS, _OUTPUT_RMS, _EMBEDDING_RMS = 0.02, 0.004, 1.0  # small outputs of attention, so that tokens stay different
_INPUT_SCALE = 0.01
_DERIVED = "blockscale_swizzled"  # SGLang's copy of the block scales for Blackwell, which it makes again when it processes weights


@dataclass(frozen=True)
class Geometry:
    """A model's sizes: `config` is its config.json, `shape` that of its MoE layers; `alternating`: gate and up rows take turns in w13."""

    name: str
    shape: MoEShape
    config: Mapping[str, Any]
    alternating: bool = False

    @property
    def vocabulary(self) -> int:
        return int(self.config["vocab_size"])

    def directory(self) -> Path:
        """A model without files of weights, always in the same place: engines look for what they compiled by the model's path."""
        directory = cache_dir() / "geometries" / self.name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config, indent=1))
        return directory


def _nvfp4(*ignored: str) -> dict[str, Any]:
    tensors = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    group = {"input_activations": tensors, "weights": tensors, "targets": ["Linear"]}
    return {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "producer": {"name": "modelopt", "version": "0.39.0"},
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "model.layers.*.self_attn*", "model.layers.*.mlp.gate", *ignored],
    }


_COMMON = {
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
}


def _gpt_oss(name: str, layers: int) -> Geometry:
    return Geometry(
        name,
        NAMED_SHAPES["gptoss"],
        _COMMON
        | {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "attention_bias": True,
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "experts_per_token": 4,
            "num_hidden_layers": layers,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "quantization_config": {
                "quant_method": "mxfp4",
                "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
            },
        },
        alternating=True,
    )


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        Geometry(
            "qwen3-30b",
            NAMED_SHAPES["qwen3-30b"],
            _COMMON
            | {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "vocab_size": 151936,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "norm_topk_prob": True,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "max_position_embeddings": 40960,
                "rms_norm_eps": 1e-6,
                "rope_theta": 1000000.0,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "tie_word_embeddings": False,
                "quantization_config": _nvfp4(),
            },
        ),
        _gpt_oss("gpt-oss-120b", 36),
        _gpt_oss("gpt-oss-120b-12l", 12),
        Geometry(
            "deepseek-r1-8l",
            NAMED_SHAPES["dsr1"],
            _COMMON
            | {
                "architectures": ["DeepseekV3ForCausalLM"],
                "model_type": "deepseek_v3",
                "vocab_size": 129280,
                "hidden_size": 7168,
                "intermediate_size": 18432,
                "moe_intermediate_size": 2048,
                "n_routed_experts": 256,
                "n_shared_experts": 1,
                "num_experts_per_tok": 8,
                "n_group": 8,
                "topk_group": 4,
                "topk_method": "noaux_tc",
                "scoring_func": "sigmoid",
                "norm_topk_prob": True,
                "routed_scaling_factor": 2.5,
                "first_k_dense_replace": 3,
                "moe_layer_freq": 1,
                "num_hidden_layers": 8,
                "num_attention_heads": 128,
                "num_key_value_heads": 128,
                "q_lora_rank": 1536,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
                "max_position_embeddings": 163840,
                "rms_norm_eps": 1e-6,
                "rope_theta": 10000,
                "tie_word_embeddings": False,
                "quantization_config": _nvfp4("model.layers.*.mlp.shared_experts*", *(f"model.layers.{layer}.mlp*" for layer in range(3))),
            },
        ),
    )
}


@dataclass
class Filled:
    """Random weights of one model, and the names of the experts' Parameters that got theirs. Values are not kept: they are made again."""

    geometry: Geometry
    seed: int
    filled: set[str] = field(default_factory=set)

    @torch.no_grad()
    def fill(self, name: str, parameter: torch.Tensor) -> None:
        """Give the Parameter of that name its values; what an engine pads is zero, and what it derives from other Parameters is left to it."""
        leaf = name.rpartition(".")[2]
        side = leaf.partition("_")[0]
        if leaf.endswith(_DERIVED):
            return
        if side in _EXPERT_RMS:
            values = self._expert_values(name, parameter.device)
            self.filled.add(name)
            held = parameter.view(torch.uint8) if values.dtype == torch.uint8 else parameter
            held.zero_()
            if held.ndim > values.ndim:  # one global scale, held twice: gate's and up's
                values = values[..., None].expand(*values.shape, held.shape[-1])
            held[tuple(slice(size) for size in values.shape)].copy_(values)
        elif "norm" in name and leaf == "weight":
            parameter.fill_(1.0)
        elif torch.is_floating_point(parameter):
            rms = _EMBEDDING_RMS if "embed_tokens" in name else _OUTPUT_RMS if "o_proj" in name else _LINEAR_RMS
            parameter.normal_(0, rms, generator=self._generator(name, parameter.device))

    def experts(self, prefix: str, device: torch.device) -> ExpertWeights:
        """The experts of the layer whose Parameters have this prefix, in canonical form.

        Raises:
            UnsupportedError: the engine holds no Parameters of these names, so they were not filled.
        """
        missing = [leaf for leaf in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale") if f"{prefix}.{leaf}" not in self.filled]
        if missing:
            raise UnsupportedError("the engine names the experts' Parameters otherwise", where=prefix, given=f"no {', '.join(missing)}")
        shape = self.geometry.shape
        w13, w2 = (self._matrix(prefix, side, device) for side in _EXPERT_RMS)
        biases = [self._bias(prefix, side, device) if shape.has_bias else None for side in _EXPERT_RMS]
        return ExpertWeights(w13, w2, activation=shape.activation, w13_bias=biases[0], w2_bias=biases[1])

    def _matrix(self, prefix: str, side: str, device: torch.device) -> QuantTensor:
        format = self.geometry.shape.published
        codes, scales = (self._gate_then_up(self._expert_values(f"{prefix}.{side}_{leaf}", device), side) for leaf in ("weight", "weight_scale"))
        if not format.has_global_scale:
            return QuantTensor(codes, scales, None, format)
        outer = self._expert_values(f"{prefix}.{side}_weight_scale_2", device)
        return QuantTensor(codes, scales.view(torch.float8_e4m3fn), outer[:, None].expand(-1, 2).contiguous() if side == "w13" else outer, format)

    def _bias(self, prefix: str, side: str, device: torch.device) -> torch.Tensor:
        return self._gate_then_up(self._expert_values(f"{prefix}.{side}_bias", device), side)

    def _gate_then_up(self, rows: torch.Tensor, side: str) -> torch.Tensor:
        return torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1) if side == "w13" and self.geometry.alternating else rows

    def _expert_values(self, name: str, device: torch.device) -> torch.Tensor:
        """The values of one Parameter of experts [E, ...], as long as the model says: bytes of codes and block scales, fp32 of the rest."""
        shape = self.geometry.shape
        leaf = name.rpartition(".")[2]
        side, _, part = leaf.partition("_")
        rows, columns = (shape.halves * shape.intermediate, shape.hidden) if side == "w13" else (shape.hidden, shape.intermediate)
        generator, experts = self._generator(name, device), shape.num_experts

        def draw(low: int, high: int, width: int) -> torch.Tensor:
            return torch.empty(experts, rows, width, dtype=torch.uint8, device=device).random_(low, high, generator=generator)

        if part == "weight":
            return draw(0, 256, columns // 2)
        if part == "weight_scale":
            return draw(*_SCALE_BYTES[shape.published.name], columns // shape.published.block)
        if part == "weight_scale_2":
            spread = torch.empty(experts, device=device, dtype=torch.float32).uniform_(0.8, 1.25, generator=generator)
            return spread * (_EXPERT_RMS[side] / _NVFP4_UNIT)
        if part == "bias":
            return torch.empty(experts, rows, device=device, dtype=torch.float32).normal_(0, _LINEAR_RMS, generator=generator).bfloat16().float()
        if part == "input_scale":
            return torch.full((experts,), _INPUT_SCALE, device=device, dtype=torch.float32)
        raise UnsupportedError("no values for a Parameter of experts", where=name)

    def _generator(self, name: str, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
