"""Stand-ins for vLLM's modules and layers, with what the plug-in asks of them (`test_contracts.py` holds that against vLLM's sources)."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.integrations.vllm.methods import HOLDINGS


class MoEActivation(Enum):
    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU2_NO_MUL = "relu2_no_mul"
    SWIGLUOAI = "swigluoai"
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"
    SITU = "situ"


@dataclass
class ExpertMapManager:
    global_num_experts: int
    ep_size: int = 1
    ep_rank: int = 0
    placement_strategy: str = "linear"

    @property
    def expert_map(self) -> torch.Tensor | None:
        """As vLLM lays experts out: -1, or the local id of each global one."""
        if self.ep_size == 1:
            return None
        ids = torch.arange(self.global_num_experts)
        if self.placement_strategy == "round_robin":
            return torch.where(ids % self.ep_size == self.ep_rank, ids // self.ep_size, -1).int()
        base, left = divmod(self.global_num_experts, self.ep_size)
        start = self.ep_rank * base + min(self.ep_rank, left)
        held = base + (1 if self.ep_rank < left else 0)
        return torch.where((ids >= start) & (ids < start + held), ids - start, -1).int()

    @property
    def held(self) -> list[int]:
        if self.expert_map is None:
            return list(range(self.global_num_experts))
        return (self.expert_map >= 0).nonzero().flatten().tolist()


def moe_config(w: hb.ExpertWeights, **changes: Any) -> SimpleNamespace:
    parallel = SimpleNamespace(
        use_all2all_kernels=False, all2all_backend="allgather_reducescatter", use_ep=False, dp_size=1, ep_size=1, enable_eplb=False
    )
    config = SimpleNamespace(
        moe_backend="auto", moe_parallel_config=parallel, in_dtype=torch.bfloat16, hidden_dim=w.hidden, device="cpu",
        intermediate_size_per_partition=w.intermediate, dp_size=1, pcp_size=1, is_sequence_parallel=False,
    )  # fmt: skip
    for name, value in changes.items():
        for holder in (config, parallel):
            if hasattr(holder, name):
                setattr(holder, name, value)
    return config


class RoutedExperts(nn.Module):
    """A layer of vLLM's whose experts have been loaded, before they are processed."""

    def __init__(self, w: hb.ExpertWeights, method: str, activation: str = "silu", manager: ExpertMapManager | None = None, **swiglu: float) -> None:
        super().__init__()
        self.layer_name, self.activation, self.top_k = "model.layers.0.mlp.experts", MoEActivation(activation), 2
        self.swiglu_alpha, self.swiglu_beta, self.swiglu_limit = (swiglu.get(name) for name in ("alpha", "beta", "limit"))
        self.apply_router_weight_on_input = False
        self.expert_map_manager = manager or ExpertMapManager(w.num_experts)
        self.global_num_experts = self.expert_map_manager.global_num_experts
        self._expert_map = self.expert_map_manager.expert_map
        self.moe_config = moe_config(w)
        self.load(w, method)

    def load(self, w: hb.ExpertWeights, method: str) -> None:
        """Register what vLLM's method of this name does, and fill it from canonical experts."""
        holding = HOLDINGS[method]
        for name, parameter in holding.parameters.items():
            tensor = w.tensors.get(name)
            if name.endswith("input_scale") and tensor is None:
                tensor = torch.ones(w.num_experts, 2) if name.startswith("w13") else torch.ones(w.num_experts)
            if tensor is None:
                continue
            tensor = 1 / tensor if holding.inverse and name.endswith(("global_scale", "input_scale")) else tensor.clone()
            if self.activation is MoEActivation.SWIGLUOAI and name in ("w13.codes", "w13.scales", "w13_bias"):
                gate, up = tensor.chunk(2, dim=1)
                tensor = torch.stack((gate, up), 2).flatten(1, 2)
            self.register_parameter(parameter, nn.Parameter(tensor, requires_grad=False))

    def get_expert_mapping(self) -> list[tuple[str, str, int, str]]:
        """(start of a Parameter's name, part of a name in a checkpoint, expert, matrix), as vLLM has it."""
        parts = {"w1": ("w13", "gate_proj"), "w2": ("w2", "down_proj"), "w3": ("w13", "up_proj")}
        experts = range(self.global_num_experts)
        return [(f"experts.{side}_", f"experts.{id}.{name}.", id, matrix) for id in experts for matrix, (side, name) in parts.items()]

    def _map_global_expert_id_to_local_expert_id(self, expert: int) -> int:
        return expert if self._expert_map is None else int(self._expert_map[expert])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[str]:
        """Names of the Parameters that are loaded; each is looked up before it is known whether the expert is held here."""
        for name, _ in weights:
            whole = f"{self.layer_name}.{name}"
            for start, part, expert, _ in self.get_expert_mapping():
                if part in whole:
                    parameter = whole.replace(part, start).removeprefix(f"{self.layer_name}.")
                    getattr(self, parameter)
                    if self._map_global_expert_id_to_local_expert_id(expert) >= 0:
                        yield parameter


@dataclass
class VllmConfig:
    additional_config: dict[str, Any] = field(default_factory=dict)
    lora_config: Any = None
    scheduler_config: Any = field(default_factory=lambda: SimpleNamespace(max_num_batched_tokens=64))
    parallel_config: Any = field(default_factory=lambda: SimpleNamespace(data_parallel_size=1, enable_elastic_ep=False, use_ubatching=False))
    model_config: Any = field(default_factory=lambda: SimpleNamespace(enable_sleep_mode=False))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules in vLLM's place, as `put_in_place` makes them."""
    yield put_in_place(monkeypatch)
    for name in PLUGIN:
        sys.modules.pop(name, None)


PLUGIN = tuple(f"halfbyte.integrations.vllm.{name}" for name in ("hook", "takeover", "peers"))  # what imports vLLM


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules in vLLM's place. `vllm.config` is the current configuration, `vllm.method` what vLLM's own choice of a method returns or raises,
    `vllm.group` the ranks that share the experts, `vllm.sizes` how many tokens each of them has."""
    state = SimpleNamespace(config=VllmConfig(), method=None, logged=[], group=None, sizes=None)

    class Choosing(RoutedExperts):
        def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
            return state.method()

    def module(name: str, **members: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)
        parent, _, leaf = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], leaf, made)
        return made

    def init_logger(name: str) -> Any:
        return SimpleNamespace(info=state.logged.append, warning=lambda text, *values: state.logged.append(text % values))

    module("vllm")
    module("vllm.envs", VLLM_BATCH_INVARIANT=False)
    module("vllm.config", VllmConfig=VllmConfig, get_current_vllm_config=lambda: state.config)
    module("vllm.logger", init_logger=init_logger)
    for name in ("vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.layers.fused_moe", "vllm.v1", "vllm.v1.worker"):
        module(name)
    fused_moe = "vllm.model_executor.layers.fused_moe"
    module(f"{fused_moe}.config", FUSED_MOE_UNQUANTIZED_CONFIG="no quantisation of its own")
    module(f"{fused_moe}.routed_experts", RoutedExperts=Choosing)
    module("vllm.distributed")
    module("vllm.distributed.parallel_state", get_ep_group=lambda: state.group)
    module("vllm.v1.worker.workspace", current_workspace_manager=None, is_workspace_manager_initialized=lambda: False)
    metadata = SimpleNamespace(get_chunk_sizes_across_dp_rank=lambda: state.sizes)
    module("vllm.forward_context", get_forward_context=lambda: SimpleNamespace(dp_metadata=metadata))
    for name in PLUGIN:
        monkeypatch.delitem(sys.modules, name, raising=False)
    state.layer_class = Choosing
    return state
