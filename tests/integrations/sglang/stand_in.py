"""What the plug-in meets in SGLang, small enough to read: the modules it imports, a FusedMoE layer, two of its methods and their loaders.

`test_contracts.py` holds the names and parameters used here against two releases of SGLang.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch

BF16 = torch.bfloat16


class Dispatched(NamedTuple):
    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor | None
    topk_output: Any


class Combined(NamedTuple):
    hidden_states: torch.Tensor


class TopK(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor | None = None


class PackedTopK(NamedTuple):
    packed_topk_ids: torch.Tensor


class Backend(Enum):
    AUTO = "auto"
    MARLIN = "marlin"
    TRITON_KERNELS = "triton_kernel"

    def is_auto(self) -> bool:
        return self is Backend.AUTO

    def is_marlin(self) -> bool:
        return self is Backend.MARLIN


class AllToAll(Enum):
    NONE = "none"
    DEEPEP = "deepep"

    def is_none(self) -> bool:
        return self is AllToAll.NONE


class HookType(Enum):
    AROUND = "around"


class HookRegistry:
    registered: ClassVar[list[tuple[str, Callable[..., Any]]]] = []

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
        assert hook_type is HookType.AROUND
        cls.registered.append((target, hook))


class WeightUpdater:
    def __init__(self, model: torch.nn.Module) -> None:
        self.get_model = lambda: model


class Base(ABC):
    """SGLang's methods are abstract classes, too."""

    @abstractmethod
    def apply(self, layer: Any, dispatch_output: Any) -> Combined: ...


class ModelOptNvFp4FusedMoEMethod(Base):
    def __init__(self) -> None:
        self.quant_config = SimpleNamespace(is_checkpoint_nvfp4_serialized=True)
        self.said = "kept"

    def create_weights(self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int, **attributes: Any) -> None:
        e, h, i = num_experts, hidden_size, intermediate_size_per_partition
        halves = 2 if layer.moe_runner_config.is_gated else 1
        shapes = {"w13_weight": (e, halves * i, h // 2), "w2_weight": (e, h, i // 2)}
        scales = {"w13_weight_scale": (e, halves * i, h // 16), "w2_weight_scale": (e, h, i // 16)}
        outer = {"w13_weight_scale_2": (e, 2) if halves == 2 else (e,), "w2_weight_scale_2": (e,)}
        for dtype, named in ((torch.uint8, shapes), (torch.float8_e4m3fn, scales), (torch.float32, outer)):
            for name, shape in named.items():
                register(layer, name, torch.zeros(shape, dtype=dtype), attributes["weight_loader"])
        register(layer, "w13_input_scale", torch.ones(e, 2), attributes["weight_loader"])
        register(layer, "w13_blockscale_swizzled", torch.zeros(e, halves * i, h // 16), attributes["weight_loader"])

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.on_marlin = {name: p.detach().clone() for name, p in layer.named_parameters()}

    def apply(self, layer: Any, dispatch_output: Any) -> Combined:
        return Combined(torch.full_like(dispatch_output.hidden_states, 7))


class Mxfp4MoEMethod(Base):
    """Its Parameters are padded, as for Marlin: the intermediate size to 128, the hidden size to 256."""

    def create_weights(self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int, **attributes: Any) -> None:
        e, h, i = num_experts, -(-hidden_size // 256) * 256, -(-intermediate_size_per_partition // 128) * 128
        for side, rows, columns in (("w13", 2 * i, h), ("w2", h, i)):
            register(layer, f"{side}_weight", torch.zeros(e, rows, columns // 2, dtype=torch.uint8), attributes["weight_loader"])
            register(layer, f"{side}_weight_scale", torch.full((e, rows, columns // 32), 127, dtype=torch.uint8), attributes["weight_loader"])
            register(layer, f"{side}_weight_bias", torch.zeros(e, rows, dtype=BF16), attributes["weight_loader"])

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.on_marlin = {name: p.detach().clone() for name, p in layer.named_parameters()}

    def apply(self, layer: Any, dispatch_output: Any) -> Combined:
        return Combined(torch.full_like(dispatch_output.hidden_states, 7))


def register(layer: torch.nn.Module, name: str, data: torch.Tensor, loader: Callable[..., Any]) -> None:
    parameter = torch.nn.Parameter(data, requires_grad=False)
    parameter.weight_loader = loader  # type: ignore[attr-defined]
    layer.register_parameter(name, parameter)


class FusedMoE(torch.nn.Module):
    def __init__(self, config: Any, hidden: int, intermediate: int, experts: int, name: str = "model.layers.3.mlp.experts") -> None:
        super().__init__()
        self.params_dtype, self.layer_name, self.top_k, self.num_experts = BF16, name, 2, experts
        self.hidden_size, self.intermediate_size_per_partition = hidden, intermediate
        self.moe_runner_config, self.quant_method = config, None

    def make(self, method: Any) -> None:
        """The rest of SGLang's __init__."""
        self.quant_method = method
        method.create_weights(
            self, self.num_experts, hidden_size=self.hidden_size, intermediate_size_per_partition=self.intermediate_size_per_partition,
            weight_loader=self.weight_loader,
        )  # fmt: skip

    def weight_loader(self, param: torch.nn.Parameter, loaded_weight: torch.Tensor, expert_id: int) -> None:
        """One expert of one Parameter, unpadded, as SGLang copies it."""
        part = param.data[expert_id]
        part = part.view(torch.uint8) if part.element_size() == 1 else part
        part[tuple(slice(size) for size in loaded_weight.shape)].copy_(loaded_weight)

    def forward(self, hidden: torch.Tensor, topk: Any) -> torch.Tensor:
        return self.quant_method.apply(self, Dispatched(hidden, None, topk)).hidden_states


def runner_config(**given: Any) -> SimpleNamespace:
    usual = {
        "activation": "silu", "is_gated": True, "gemm1_alpha": None, "gemm1_clamp_limit": None, "swiglu_limit": None, "gate_up_interleaved": True,
        "apply_router_weight_on_input": False, "no_combine": False, "routed_scaling_factor": None,
    }  # fmt: skip
    return SimpleNamespace(**usual | given)


def server(**given: Any) -> SimpleNamespace:
    usual = {
        "device": "cpu", "json_model_override_args": "{}", "chunked_prefill_size": 64, "max_prefill_tokens": 128, "dp_size": 1, "enable_lora": None,
        "lora_paths": None, "lora_target_modules": None, "cpu_offload_gb": 0, "dwdp_size": 1, "offload_group_size": -1, "weight_cache_mode": "off",
        "enable_deterministic_inference": False,
    }  # fmt: skip
    return SimpleNamespace(**usual | given)


def install(monkeypatch: pytest.MonkeyPatch, arguments: SimpleNamespace, backend: Backend = Backend.MARLIN) -> None:
    """Put the modules where the plug-in looks for them, and forget what it has imported of others."""
    contents: dict[str, dict[str, Any]] = {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.plugins": {},
        "sglang.srt.plugins.hook_registry": {"HookRegistry": HookRegistry, "HookType": HookType},
        "sglang.srt.runtime_context": {"get_server_args": lambda: arguments},
        "sglang.srt.model_executor": {},
        "sglang.srt.model_executor.model_runner_components": {},
        "sglang.srt.model_executor.model_runner_components.weight_updater": {"WeightUpdater": WeightUpdater},
        "sglang.srt.layers": {},
        "sglang.srt.layers.moe": {},
        "sglang.srt.layers.moe.utils": {"get_moe_runner_backend": lambda: backend, "get_moe_a2a_backend": lambda: AllToAll.NONE},
        "sglang.srt.layers.moe.token_dispatcher": {},
        "sglang.srt.layers.moe.token_dispatcher.standard": {"StandardCombineInput": Combined},
    }
    for name in [name for name in sys.modules if name.startswith("halfbyte.integrations.sglang.") and not name.endswith(".methods")]:
        monkeypatch.delitem(sys.modules, name)
    for name, values in contents.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(HookRegistry, "registered", [])
