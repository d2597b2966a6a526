"""`take_over`: one of vLLM's quantisation methods becomes one whose experts run on halfbyte's kernels.

The method stays what it is in all that loading asks of it: Parameters, their loaders, and its class name, in which vLLM's loader looks for "ModelOpt"
and "compressed". Only its class is replaced, by a subclass that arranges the experts when they are loaded and calls `fused_moe`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from vllm.distributed.parallel_state import get_ep_group
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from halfbyte.distributed.wire import Wire
from halfbyte.errors import HalfbyteError
from halfbyte.experts import ExpertMap, ExpertWeights
from halfbyte.integrations.engines import FAILURES, PARAMETER_PREFIX, EngineModel
from halfbyte.integrations.vllm.methods import HOLDINGS, Holding, Layer, expert_map_of, experts_of, parameters_of, rows_as_loaded, wire_of
from halfbyte.integrations.vllm.peers import Peers, agreed, sizes_of_ranks
from halfbyte.kernels.problem import Hidden
from halfbyte.kernels.workspace import ALIGNMENT, Workspace
from halfbyte.moe import fused_moe
from halfbyte.moe.parallel import ExpertParallel


def take_over(method: Any, model: EngineModel, max_tokens: int, peers: Peers | None = None) -> None:
    """Let `method` run on halfbyte; `methods.refusal` has said that it can.

    Args:
        method: vLLM's, whose class is in `HOLDINGS`.
        model: what the process knows of the model.
        max_tokens: the most tokens in a call.
        peers: the ranks whose tokens may travel over peer memory, if any.
    """
    cls: type = type(method)
    holding = HOLDINGS[cls.__name__]
    method.__class__ = _subclass(cls)
    method.halfbyte = State(holding, model, max_tokens, peers)


class State:
    """What a method that was taken over keeps for its layer.

    Attributes:
        holding, model, max_tokens, peers: as in `take_over`.
        way: over which tokens travel between ranks, if it is halfbyte's.
        wire: how tokens come from other ranks through vLLM's group, where vLLM does not gather them itself.
    """

    def __init__(self, holding: Holding, model: EngineModel, max_tokens: int, peers: Peers | None) -> None:
        self.holding, self.model, self.max_tokens, self.peers = holding, model, max_tokens, peers
        self.way: ExpertParallel | None = None
        self.wire: Wire | None = None
        self._mapped: torch.Tensor | None = None
        self._map: ExpertMap | None = None

    def expert_map(self, layer: Layer) -> ExpertMap | None:
        """The map of the layer, made again when vLLM has changed its own."""
        if layer._expert_map is not self._mapped:
            self._mapped, self._map = layer._expert_map, expert_map_of(layer)
        return self._map

    def parameters(self, module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        """What vLLM has loaded, by canonical name."""
        names = self.holding.parameters.items()
        return {name: parameter for name, leaf in names if (parameter := module._parameters.get(leaf)) is not None}

    @torch.no_grad()
    def give_back(self, module: torch.nn.Module, loaded: Mapping[str, torch.nn.Parameter], experts: ExpertWeights | None) -> None:
        """Leave the layer as vLLM loaded it, whatever was done to it since.

        Args:
            module: the layer.
            loaded: its Parameters as `parameters` gave them.
            experts: what was made of them, if it was.
        """
        held = getattr(module, "halfbyte_experts", None)
        if held is not None:
            experts = held.unprepare()
            for name in [name for name in module._parameters if name.startswith(PARAMETER_PREFIX)]:
                delattr(module, name)
            del module.halfbyte_experts
        for name, parameter in loaded.items():
            if experts is not None and name.endswith((".codes", ".scales", "_bias")):
                memory, values = (t.view(torch.uint8) if t.element_size() == 1 else t for t in (parameter.data, experts.tensors[name]))
                memory.copy_(rows_as_loaded(module, name, values))
            module.register_parameter(self.holding.parameters[name], parameter)


def still_to_load(layer: Layer, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that a layer is given, by name within it, but for those of experts that other ranks hold once it has all of its own.

    When it reloads, vLLM processes a layer as soon as it is complete. For what comes later it would look up Parameters that are no longer there, only
    to find that the experts are not this rank's.
    """
    state: State | None = getattr(layer.quant_method, "halfbyte", None)
    elsewhere: set[str] | None = None
    for name, values in weights:
        if state is not None and not state.parameters(layer):
            elsewhere = _experts_elsewhere(layer) if elsewhere is None else elsewhere
            if any(part in f"{layer.layer_name}.{name}" for part in elsewhere):
                continue
        yield name, values


def _experts_elsewhere(layer: Layer) -> set[str]:
    """Of the names of matrices in a checkpoint the parts that belong to experts of other ranks."""
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for _, part, expert, _ in layer.get_expert_mapping():
        names[layer._map_global_expert_id_to_local_expert_id(expert) >= 0].add(part)
    return names[False] - names[True]


class _Method:
    """What differs from vLLM's method: the members of the subclass."""

    halfbyte: State
    moe_quant_config: Any
    is_monolithic = False
    supports_eplb = True
    skip_forward_padding = False
    has_unpadded_output = False
    supports_pre_processed_weights = False
    topk_indices_dtype = torch.int32

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size_per_partition: int, *_: Any, **__: Any) -> tuple[int, int]:
        """Whole blocks; the rest of the padding is the layout's."""
        block = self.halfbyte.holding.format.block
        return hidden_size, -(-intermediate_size_per_partition // block) * block

    def create_weights(self, layer: Layer, *args: Any, **kwargs: Any) -> None:
        """vLLM's Parameters, whose sizes say which kernels will be needed."""
        type(self).__mro__[1].create_weights(self, layer, *args, **kwargs)  # type: ignore[attr-defined]
        state = self.halfbyte
        state.model.get_ready(lambda: experts_of(layer, state.holding, state.model.options), top_k=layer.top_k, max_tokens=state.max_tokens)

    @property
    def supports_internal_mk(self) -> bool:
        """Whether `apply` gets the tokens of other ranks itself: over peer memory, or rounded where it would round them anyway."""
        return self.halfbyte.way is not None or self.halfbyte.wire is not None

    def maybe_make_prepare_finalize(self, *_: Any, **__: Any) -> None:
        """There is no modular kernel: `apply` is the whole layer."""

    def get_fused_moe_quant_config(self, layer: Layer) -> Any:
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def process_weights_after_loading(self, layer: Layer) -> None:
        state = self.halfbyte
        loaded = state.parameters(layer)
        is_reload = getattr(layer, "halfbyte_experts", None) is not None
        experts = failure = None
        state.wire = wire_of(layer.moe_config, state.model.options.activations)
        try:
            experts = experts_of(layer, state.holding, state.model.options)
            names = parameters_of(state.holding)
            state.model.take_over(layer, layer.layer_name, experts, names, top_k=layer.top_k, max_tokens=state.max_tokens)
        except (HalfbyteError, *FAILURES) as error:
            if is_reload:
                raise
            failure = f"{type(error).__name__}: {error}"
        if not is_reload and (state.peers is not None or state.wire is not None):  # ranks that moved tokens differently would wait for ever
            failure = agreed(failure)
        if not is_reload and state.peers is not None:
            state.way = state.peers.way(layer) if failure is None else None
        if failure is not None:
            state.model.refuse(layer.layer_name, failure)
            state.give_back(layer, loaded, experts)
            self.__class__ = type(self).__mro__[1]
            self.process_weights_after_loading(layer)
            return
        self.moe_quant_config = FUSED_MOE_UNQUANTIZED_CONFIG

    def apply(
        self,
        layer: Layer,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The experts of `layer` on x bf16 [T, H]; shared experts are the runner's, before or beside this call."""
        state = self.halfbyte
        state.model.finish()
        if state.way is not None:
            return _over_peers(state.way, state, layer, x, topk_ids, topk_weights)
        if state.wire is None:
            return _experts(state, layer, x, topk_ids, topk_weights)
        group, is_sequence_parallel = get_ep_group(), layer.moe_config.is_sequence_parallel
        codes, *others = (part.view(torch.uint8) for part in state.wire.encode(x))
        codes, topk_weights, topk_ids, others = group.dispatch(codes, topk_weights, topk_ids, is_sequence_parallel, others)
        arrived = [rows.view(part.dtype) for rows, part in zip((codes, *others), state.wire.parts, strict=True)]
        return group.combine(_experts(state, layer, state.wire.decode(arrived), topk_ids, topk_weights), is_sequence_parallel)


def _over_peers(way: ExpertParallel, state: State, layer: Layer, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    activations = state.model.options.activations
    travelling = "bf16" if activations == "nvfp4" else activations  # its scales are the experts' own, so tokens travel as they are
    sent = way.dispatch(x, topk_ids, topk_weights, sizes=sizes_of_ranks(), activations=travelling)
    partial = _experts(state, layer, sent.hidden, sent.topk_ids, sent.topk_weights, out=way.partial(sent, x.shape[1]))
    return way.combine(partial, sent)


def _experts(
    state: State, layer: Layer, hidden: Hidden, topk_ids: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    return fused_moe(
        hidden,
        layer.halfbyte_experts,
        topk_ids,
        topk_weights,
        expert_map=state.expert_map(layer),
        batch_invariant=state.model.batch_invariant,
        workspace=_workspace(state.model.workspace_nbytes),
        out=out,
    )


@functools.cache
def _subclass(cls: type) -> type:
    """A subclass of `cls` alone: with a second base, Python would not let an object of `cls` become one of it."""
    members = {name: member for name, member in vars(_Method).items() if not name.startswith("__")}
    return type(f"Halfbyte{cls.__name__}", (cls,), members)


_workspaces: dict[int, Workspace] = {}


def _workspace(nbytes: int) -> Workspace | None:
    """vLLM's buffer for this micro-batch, which its own kernels use too; none before vLLM has made its manager, and where nothing is taken of it."""
    if not nbytes or not is_workspace_manager_initialized():
        return None
    (buffer,) = current_workspace_manager().get_simultaneous(((nbytes + ALIGNMENT,), torch.uint8))
    address = buffer.data_ptr()
    found = _workspaces.get(address)
    if found is None or found.nbytes < nbytes:
        for stale in list(_workspaces):  # vLLM has let go of a buffer that was too small: so must we
            del _workspaces[stale]
        found = _workspaces[address] = Workspace(buffer)
    return found
