"""Layers of a model in an engine against fp32, wherever the engine keeps its model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.bench.gate import expected_output, judge
from halfbyte.bench.inputs import Call
from halfbyte.bench.serve_weights import Filled
from halfbyte.checkpoint.load import load_experts
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.errors import HalfbyteError, InputError
from halfbyte.experts import ExpertWeights

# Of all tokens against fp32 without any rounding of activations. Measured in vLLM 0.26.0 on an H200 (2026-11-29): 2.9e-3 with bf16, 6.4e-2 with fp8.
LAYER_LIMITS = {"bf16": 5e-3, "fp8": 8e-2, "mxfp8": 8e-2, "nvfp4": 2e-1}
_GPU_TOKENS, _CPU_TOKENS = (1, 16, 256, 4096), (1, 16)
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class EngineLayer:
    """One MoE layer in an engine: `apply(hidden bf16 [T, H], ids int32 [T, k], weights fp32 [T, k])` gives bf16 [T, H]."""

    name: str
    hidden: int
    num_experts: int
    top_k: int
    apply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


ExpertsOf = Callable[[str, torch.device], ExpertWeights]


def experts_source(model: Path, filled: Filled | None) -> ExpertsOf:
    """Where a layer's experts come from: the values that were filled, or the checkpoint."""
    if filled is not None:
        return filled.experts

    def read(name: str, device: torch.device) -> ExpertWeights:
        layer = _LAYER.search(name)
        if layer is None:
            raise InputError("which layer it is does not show", where="bench serve", given=name, needed="a name with .layers.N.")
        return load_experts(Checkpoint.open(model), int(layer[1]), device=device)

    return read


@torch.inference_mode()
def check_layers(layers: Sequence[EngineLayer], experts_of: ExpertsOf, device: torch.device) -> dict[str, Any]:
    """Compare the first layer and one in the middle with fp32.

    Returns:
        layer_error, the worst over all tokens of a call, and `checked`, which they were; or in `checked` alone why none could be compared.
    """
    try:
        worst, tokens = 0.0, _CPU_TOKENS if device.type == "cpu" else _GPU_TOKENS
        compared = list(dict.fromkeys((layers[0], layers[len(layers) // 2]))) if layers else []
        if not compared:
            return {"checked": "the engine has no MoE layers of a kind that is known"}
        for layer in compared:
            experts = experts_of(layer.name, device)
            for num_tokens in tokens:
                call = _call(layer, num_tokens, device)
                actual = layer.apply(call.hidden.clone(), call.ids, call.weights)
                worst = max(worst, judge(actual, expected_output(experts, call, "bf16")).global_error)
        names = " and ".join(layer.name for layer in compared)
        return {"layer_error": worst, "checked": f"{names} at {', '.join(map(str, tokens))} tokens"}
    except (HalfbyteError, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return {"checked": f"not, {type(error).__name__}: {' '.join(str(error).split())[:200]}"}  # an engine's layer may want more around it


def _call(layer: EngineLayer, num_tokens: int, device: torch.device) -> Call:
    generator = torch.Generator(device).manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, layer.hidden, generator=generator, device=device, dtype=torch.float32).bfloat16()
    logits = torch.randn(num_tokens, layer.num_experts, generator=generator, device=device, dtype=torch.float32)
    weights, ids = logits.softmax(-1).topk(layer.top_k)
    return Call(hidden, ids.int().contiguous(), (weights / weights.sum(-1, keepdim=True)).contiguous())
