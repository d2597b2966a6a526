"""Every argument of every public function, given as something else: one error of halfbyte's, that says where, what was given and what is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte as hb
from halfbyte import moe
from halfbyte.checkpoint import Checkpoint, find_defects
from halfbyte.convert import QuantizeOptions, quantize_model
from halfbyte.distributed import Capacity
from halfbyte.distributed.placement import balanced, contiguous, round_robin

# Flags are left out: anything is true or false.
WRONG: dict[str, Any] = {
    "None": None,
    "text": "nonsense",
    "list": [1, 2],
    "dict": {"a": 1},
    "negative": -1,
    "huge": 10**30,
    "fraction": 1.5,
    "nan": float("nan"),
    "scalar": torch.tensor(1.0),
    "vector": torch.ones(7),
    "complex": torch.ones(3, 32, dtype=torch.complex64),
    "meta": torch.ones(3, 32, device="meta"),
    "sparse": torch.ones(3, 32).to_sparse(),
    "object": object(),
}
# What is right where it stands: a default, another value of the same kind, the name of something.
RIGHT: dict[str, set[str]] = {
    "None": {
        "global_scale", "global_scales", "activation", "out", "backend", "w13_bias", "w2_bias", "w13_input_scale", "w2_input_scale", "limit",
        "num_global_experts", "scale_check", "bias", "activations", "expert_map", "expert_offset", "workspace", "config", "threads", "progress",
        "experts of load_prepared", "cache_dir", "parallel", "local_of_copy", "copies", "code_bytes", "device of prepare",
        "layers of iterated", "options of planned", "output", "calibrate",
    },
    "text": {"cache_dir", "destination of planned"},
    "list": {"counts", "layers of iterated"},
    "negative": {"alpha", "beta", "scale", "eps"},
    "huge": {"max_shard_bytes", "global_scale", "alpha", "beta", "limit", "scale", "eps"},
    "fraction": {"global_scale", "alpha", "beta", "limit", "scale", "eps"},
    "scalar": {"global_scale", "w13_input_scale", "w2_input_scale"},
    "vector": {"w13_input_scale", "w2_input_scale"},
    "meta": {"w13_input_scale", "w2_input_scale"},
}  # fmt: skip

# Functions whose errors are those of others that they call, as their docstrings say.
ERRORS_AS = {
    "load_prepared": {"prepare", "load_experts"},
    "MoE.from_checkpoint": {"MoE", "load_prepared", "prepare"},
    "ExpertWeights.dequantize": {"QuantTensor.dequantize"},
}

torch.manual_seed(0)
X, LOGITS = torch.randn(3, 32), torch.randn(3, 4)
W = hb.ExpertWeights(hb.quantize(torch.randn(4, 64, 32), hb.NVFP4), hb.quantize(torch.randn(4, 32, 32), hb.NVFP4))
P, ROUTING, Q, Q8 = hb.prepare(W), hb.route(LOGITS, 2), hb.quantize(X, hb.NVFP4), hb.quantize_fp8(X)
SLOTS = moe.sort(ROUTING.ids, P)
ROWS, SCALES = moe.expert_rows(X, SLOTS, P), torch.ones(3, 8, dtype=torch.uint8)
MODEL = Path(hb.__file__).parent / "demo_model"
ROUTER, EXPERTS = hb.load_router(MODEL, 0), hb.load_prepared(MODEL, 0, cache="off")
OFFSETS = torch.tensor([0, 2, 2, 2, 3], dtype=torch.int32)
PACK = {"scale_rule": "ceil", "scale_layout": "linear", "backend": None}
LAYER = {"activations": None, "expert_map": None, "expert_offset": None, "config": None}


def iterated(layers: Any) -> object:
    return list(hb.iter_prepared(MODEL, layers))


def planned(source: Any, destination: Any, options: Any) -> object:
    return quantize_model(source, destination, options, dry_run=True)


def planned_with(**options: Any) -> object:
    return planned(MODEL, "absent", QuantizeOptions(**options))


CALLS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (hb.quantize, {"x": X, "format": hb.NVFP4, "global_scale": None, **PACK}),
    (hb.silu_mul_quantize, {"gate_up": torch.randn(3, 64), "format": hb.NVFP4, "global_scale": 1.0, "activation": hb.Activation(), **PACK}),
    (hb.rms_norm_quantize, {"x": X, "weight": torch.ones(32), "format": hb.NVFP4, "global_scale": 1.0, "eps": 1e-6, **PACK}),
    (hb.quantize_fp8, {"x": X, "scaling": "mx", "scale_layout": "linear", "backend": None}),
    (
        hb.quantize_experts,
        {"x": X, "expert_offsets": OFFSETS, "global_scales": torch.ones(4), "format": hb.NVFP4, "scale_layout": "8x4", "activation": None}
        | {"out": None, "backend": None},
    ),
    (hb.swizzle_scales, {"scales": SCALES, "layout": "128x4"}),
    (hb.unswizzle_scales, {"scales": hb.swizzle_scales(SCALES, "8x4"), "layout": "8x4", "rows": 3, "cols": 8}),
    (hb.QuantTensor, {"codes": Q.codes, "scales": Q.scales, "global_scale": Q.global_scale, "format": hb.NVFP4, "scale_layout": "linear"}),
    (Q.dequantize, {"dtype": torch.float32}),
    (Q.with_scale_layout, {"layout": "128x4"}),
    (Q.to, {"device": "cpu"}),
    (hb.Fp8Tensor, {"codes": Q8.codes, "scales": Q8.scales, "scaling": "token", "scale_layout": "linear"}),
    (Q8.dequantize, {"dtype": torch.float32}),
    (hb.Activation, {"kind": "swiglu", "alpha": 1.0, "beta": 0.0, "limit": None}),
    (
        hb.ExpertWeights,
        {"w13": W.w13, "w2": W.w2, "activation": "swiglu", "w13_bias": None, "w2_bias": None, "w13_input_scale": None, "w2_input_scale": None}
        | {"first_expert": 0, "num_global_experts": 4},
    ),
    (
        hb.ExpertWeights.from_engine_tensors,
        {"tensors": W.tensors, "format": hb.NVFP4, "activation": None, "w13_order": "gate_up", "first_expert": 0, "num_global_experts": None},
    ),
    (W.to, {"device": "cpu"}),
    (W.dequantize, {"dtype": torch.float32}),
    (hb.prepare, {"w": W, "layout": "auto", "policy": "packed", "activations": "bf16", "device": None, "scale_check": None}),
    (P.update_, {"w": W, "scale_check": None}),
    (P.to, {"device": "cpu"}),
    (
        hb.route,
        {"logits": LOGITS, "top_k": 2, "method": "deepseek_v3", "bias": torch.zeros(4), "num_groups": 2, "top_k_groups": 1, "scale": 1.0},
    ),
    (
        hb.fused_moe,
        {"hidden": X, "experts": P, "topk_ids": ROUTING.ids, "topk_weights": ROUTING.weights, "out": None, "backend": None, "workspace": None}
        | LAYER,
    ),
    (hb.workspace_nbytes, {"experts": P, "max_tokens": 8, "top_k": 2, "activations": None}),
    (hb.Workspace, {"buffer": torch.empty(1024, dtype=torch.uint8)}),
    (moe.sort, {"topk_ids": ROUTING.ids, "experts": P, **LAYER}),
    (moe.expert_rows, {"hidden": X, "slots": SLOTS, "experts": P}),
    (moe.combine, {"rows": ROWS, "slots": SLOTS, "topk_weights": ROUTING.weights, "out": None}),
    (hb.warm_up, {"layers": P, "top_k": 2, "activations": None, "max_tokens": 4, "dtype": torch.bfloat16, "ids_dtype": torch.int32, "threads": 1}),
    (hb.ExpertMap.placed, {"ranks": [[0, 1], [2, 3]], "rank": 0, "num_global": 4, "device": "cpu"}),
    (hb.ExpertMap, {"first": 0}),
    (lambda rows: hb.trtllm_gen_row_order(rows, gated=True), {"rows": 256}),
    (hb.Target.of, {"device": "cpu"}),
    (hb.load_experts, {"model": MODEL, "layer": 0}),
    (
        hb.load_prepared,
        {"model": MODEL, "layer": 0, "device": "cpu", "layout": "auto", "policy": "packed", "activations": "bf16", "experts": range(2)}
        | {"cache": "off", "cache_dir": None, "progress": None},
    ),
    (hb.load_router, {"model": MODEL, "layer": 0}),
    (hb.MoE, {"router": ROUTER, "experts": EXPERTS, "activations": None, "parallel": None}),
    (hb.MoE(ROUTER, EXPERTS), {"hidden": torch.randn(2, 256)}),
    (hb.MoE.from_checkpoint, {"model": MODEL, "layer": 0, "device": "cpu", "activations": "bf16", "cache": "off", "parallel": None}),
    (iterated, {"layers": [0]}),
    (Checkpoint.open(MODEL).info, {"name": "model.norm.weight"}),
    (Checkpoint.open(MODEL).read, {"name": "model.norm.weight"}),
    (find_defects, {"checkpoint": Checkpoint.open(MODEL)}),
    (planned, {"source": MODEL, "destination": "absent", "options": QuantizeOptions()}),
    (
        planned_with,
        {"format": "nvfp4", "output": None, "scale_rule": "ceil", "skip": (), "calibrate": None, "max_shard_bytes": 5_000_000_000, "device": "cpu"},
    ),
    (contiguous, {"num_experts": 4, "num_ranks": 2}),
    (round_robin, {"num_experts": 4, "num_ranks": 2}),
    (balanced, {"counts": [1, 2, 3, 4], "num_ranks": 2, "num_redundant": 0}),
    (Capacity, {"tokens": 4, "hidden": 64, "top_k": 2, "code_bytes": None}),
]


def name_of(call: Any) -> str:
    return getattr(call, "__qualname__", type(call).__name__) if callable(call) else ""


@pytest.mark.parametrize(("function", "arguments"), CALLS, ids=[name_of(function) for function, _ in CALLS])
def test_each_argument_is_refused_as_what_it_is_not(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    function(**arguments)
    others = {name_of(other) for other, _ in CALLS if not isinstance(other, type)} - {name_of(function)} - ERRORS_AS.get(name_of(function), set())
    taken = []
    for argument in arguments:
        for kind, value in WRONG.items():
            if argument in RIGHT.get(kind, ()) or f"{argument} of {name_of(function)}" in RIGHT.get(kind, ()):
                continue
            try:
                function(**(arguments | {argument: value}))
            except hb.HalfbyteError as error:
                assert len(str(error).splitlines()) == 1 and any(word in str(error) for word in ("given", "needed")), str(error)
                assert str(error).partition(":")[0] not in others
            else:
                taken.append(f"{argument} as {kind}")
    assert not taken
