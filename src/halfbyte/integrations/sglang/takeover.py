"""`take_over`: in the place of one of SGLang's quantisation methods comes one whose experts run on halfbyte's kernels.

It inherits from SGLang's and has its attributes, so it is the same in all that loading asks of it: Parameters, their loaders, the runner, what it is
an instance of, and the name of its class, in which SGLang's loader looks for "ModelOpt".

While a layer serves, the Parameters that were consumed are empty, and the tensors that were made of them are Parameters beside them: where SGLang
moves experts, it moves each of these once. Before the first weight of an update is loaded, the layer gets its Parameters back with its weights, in
the memory where they lay if the prepared experts lie there: an update may replace all weights or a few.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput

from halfbyte.errors import HalfbyteError
from halfbyte.integrations.engines import FAILURES, PARAMETER_PREFIX, EngineModel
from halfbyte.integrations.sglang.methods import HOLDINGS, Holding, Layer, canonical_part, empty_parameter, experts_of, kind_of
from halfbyte.moe import fused_moe


def take_over(layer: Layer, method: Any, model: EngineModel, *, name: str, max_tokens: int) -> Any:
    """The method that runs on halfbyte; `methods.refusal` has said that it can.

    Args:
        layer: whose experts it holds.
        method: SGLang's, whose class or scheme is in `HOLDINGS`.
        model: what the process knows of the model.
        name: of the layer.
        max_tokens: the most tokens in a call.
    """
    cls: type = type(method)
    ours = _same(method, _subclass(cls))
    holding = HOLDINGS[kind_of(layer, method)]
    ours.halfbyte = State(holding, model, name, max_tokens)
    return ours


_unfinished: set[State] = set()  # of layers of this process whose first weights are still to come


class State:
    """What a method that was taken over keeps for its layer.

    Attributes:
        holding, model, name, max_tokens: as in `take_over`.
        loading: the layer has its Parameters.
    """

    def __init__(self, holding: Holding, model: EngineModel, name: str, max_tokens: int) -> None:
        self.holding, self.model, self.name, self.max_tokens = holding, model, name, max_tokens
        self.loading = True
        self._lock = threading.Lock()  # SGLang may load in several threads
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._memory: dict[str, torch.Tensor] = {}  # of Parameters in which the prepared experts lie
        _unfinished.add(self)

    def loader(self, layer: Layer, load: Callable[..., Any]) -> Callable[..., Any]:
        """SGLang's loader of one weight into a Parameter of `layer`, which gets its Parameters back before."""

        @functools.wraps(load)
        def loading(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                if not self.loading:
                    self.give_back_parameters(layer)
            return load(*args, **kwargs)

        return loading

    @torch.no_grad()
    def arrange(self, layer: Layer) -> None:
        """Prepare the experts that lie in the Parameters. Raises what `prepare` raises."""
        consumed = self.holding.consumed
        self._parameters = {name: layer._parameters[parameter] for name, parameter in consumed.items()}
        self._shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        memory = {name: parameter.detach().as_subclass(torch.Tensor) for name, parameter in self._parameters.items()}
        experts = experts_of(layer, self.holding)
        shared = [name for name, tensor in memory.items() if experts.tensors[name].data_ptr() == tensor.data_ptr()]
        self.model.take_over(layer, self.name, experts, consumed.values(), top_k=layer.top_k, max_tokens=self.max_tokens)
        self._memory = {name: memory[name] for name in shared if name in layer.halfbyte_experts.reused}
        for name, parameter in self._parameters.items():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            layer.register_parameter(consumed[name], parameter)
        self.loading = False

    @torch.no_grad()
    def give_back_parameters(self, layer: Layer) -> None:
        """The Parameters as SGLang made them, with the weights that the layer has."""
        tensors = layer.halfbyte_experts.unprepare().tensors
        for name, parameter in self._parameters.items():
            memory = self._memory.get(name)
            if memory is None:
                memory = empty_parameter(self.holding, name, self._shapes[name], parameter)
            part = canonical_part(layer, self.holding, name, memory)
            part.copy_(tensors[name].view(torch.uint8).view(part.shape))
            parameter.data = memory
            layer.register_parameter(self.holding.consumed[name], parameter)
        self.loading = True

    def give_up(self, layer: Layer) -> None:
        """Leave the layer as SGLang loaded it, whatever `arrange` has done to it."""
        if getattr(layer, "halfbyte_experts", None) is not None:
            self.give_back_parameters(layer)
            for parameter in [name for name in layer._parameters if name.startswith(PARAMETER_PREFIX)]:
                delattr(layer, parameter)
            del layer.halfbyte_experts
        self.finish()

    def finish(self) -> None:
        """The first weights of this layer have come; after those of the last layer, the log says what runs where."""
        _unfinished.discard(self)
        if not _unfinished:
            self.model.finish()


class _Method:
    """What differs from SGLang's method; mixed in before its class."""

    halfbyte: State

    def create_weights(self, layer: Layer, *args: Any, **kwargs: Any) -> None:
        """SGLang's Parameters, without what only Blackwell's kernels need. Their sizes say which kernels will be needed."""
        kwargs["weight_loader"] = self.halfbyte.loader(layer, kwargs["weight_loader"])
        super().create_weights(layer, *args, **kwargs)  # type: ignore[misc]
        for name in ("w13_blockscale_swizzled", "w2_blockscale_swizzled"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, None)
        state = self.halfbyte
        state.model.get_ready(lambda: experts_of(layer, state.holding), top_k=layer.top_k, max_tokens=state.max_tokens)

    def process_weights_after_loading(self, layer: Layer) -> None:
        state = self.halfbyte
        if not state.loading:
            return  # an update of other layers
        is_update = getattr(layer, "halfbyte_experts", None) is not None
        try:
            state.arrange(layer)
        except (HalfbyteError, *FAILURES) as error:
            if is_update:
                raise
            state.model.refuse(state.name, str(error))
            state.give_up(layer)
            layer.quant_method = _same(self, type(self).__mro__[2])
            layer.quant_method.process_weights_after_loading(layer)
            return
        state.finish()

    def restore_weights_before_loading(self, layer: Layer) -> None:
        """The loaders see to it, layer by layer."""

    def apply(self, layer: Layer, dispatch_output: Any) -> StandardCombineInput:
        """The experts of `layer` on the tokens that were dispatched."""
        topk = dispatch_output.topk_output
        ids, weights = (topk.topk_ids, topk.topk_weights) if hasattr(topk, "topk_weights") else _unpacked(topk.packed_topk_ids)
        x, batch_invariant = dispatch_output.hidden_states, self.halfbyte.model.batch_invariant
        return StandardCombineInput(hidden_states=fused_moe(x, layer.halfbyte_experts, ids, weights, batch_invariant=batch_invariant))


@functools.cache
def _subclass(cls: type) -> type:
    return type(f"Halfbyte{cls.__name__}", (_Method, cls), {"__doc__": f"{cls.__name__} whose experts run on halfbyte's kernels."})


def _same(method: Any, cls: Any) -> Any:
    """An object of class `cls` with the attributes of `method`. (Python does not let the class of one with an abstract base be changed.)"""
    result = cls.__new__(cls)
    result.__dict__.update(method.__dict__)
    return result


def _unpacked(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int32 and weights out of int32, which has the id in its upper half and a bf16 in its lower one."""
    return packed >> 16, packed.view(torch.bfloat16)[..., ::2].float()
