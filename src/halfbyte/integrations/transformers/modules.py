"""What replaces the dense layers of a transformers model: packed parameters on its own Experts modules, and `QuantLinear` for nn.Linear."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from halfbyte.device import Target
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.experts import GEGLU, GEGLU_TANH, RELU2, Activation, ExpertWeights
from halfbyte.formats import BlockFormat, QuantTensor
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.integrations.transformers.plan import PackedParameter
from halfbyte.kernels.reference.activation import activate
from halfbyte.kernels.table import Problem, obstacles
from halfbyte.moe.functional import fused_moe
from halfbyte.weights.prepared import PreparedExperts, hopper_layout, prepare

# A module of a class decorated with transformers' use_experts_implementation; no common base class says what that adds.
ExpertsModule = Any

# Suffix of each tensor behind the name of the projection it belongs to.
CODES, BLOCK_SCALE, GLOBAL_SCALE, INPUT_SCALE = "", "_scale", "_scale_2", "_input_scale"


@dataclass
class ExpertsState:
    """What halfbyte keeps beside the tensors of one Experts module.

    Attributes:
        layout: "auto" packs the experts in place where the kernels of the device read a layout of their own; "canonical" never does.
        prepared: what the next call uses, as long as its tensors are at `addresses`.
        prepared_for: the circumstances that `prepared` fits.
        replaced: while packed in place, the dtypes of the Parameters that are gone, by name.
    """

    format: BlockFormat
    activation: Activation
    activations: ActivationFormat = "bf16"
    layout: Literal["auto", "canonical"] = "auto"
    prepared: PreparedExperts | None = None
    addresses: tuple[int, ...] = ()
    prepared_for: str = ""
    replaced: dict[str, torch.dtype] = field(default_factory=dict)


def first_projection(module: ExpertsModule) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def pack_experts(module: ExpertsModule, format: BlockFormat, packed: dict[str, PackedParameter], where: str) -> None:
    """Replace the dense (meta) weights of a decorated Experts module by packed ones; `packed` by projection name.

    Raises:
        CheckpointError: the files do not hold both matrices of every expert.
        UnsupportedError: the activation, or something else in the module, is unknown to halfbyte.
    """
    first = first_projection(module)
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedError("experts with a norm behind them are not supported", where=where)
    module.halfbyte = ExpertsState(format, find_activation(module, where))
    for projection in (first, "down_proj"):
        dense = getattr(module, projection)
        experts, rows, columns = dense.shape if not module.is_transposed else (dense.shape[0], dense.shape[2], dense.shape[1])
        sources = 2 if projection == "gate_up_proj" else 1
        _check_complete(packed.get(projection), experts * sources, f"{where}.{projection}")
        groups = (experts, sources) if sources > 1 else (experts,)
        delattr(module, projection)
        _register(module, projection, projection, format, (experts, rows, columns), groups, packed[projection])
    module.register_state_dict_post_hook(_save_canonical)
    module.register_load_state_dict_pre_hook(_load_canonical)


def _check_complete(parameter: PackedParameter | None, tensors: int, where: str) -> None:
    """Every expert must be there: one tensor an expert and projection, or a single one that holds them all."""
    given = 0 if parameter is None else len(parameter.stems)
    if parameter is None or given != (1 if parameter.converter is None else tensors):
        raise CheckpointError("experts are missing from the files", where=where, given=f"{given} packed tensors", needed=tensors)


def _register(
    module: Any,
    name: str,
    input_scale_of: str,
    format: BlockFormat,
    shape: tuple[int, ...],
    groups: tuple[int, ...],
    parameter: PackedParameter,
) -> None:
    """Give `module` empty meta Parameters for codes and scales of a matrix [..., N, K]. Parameters, because transformers shards no buffers."""
    *leading, columns = shape
    tensors = {
        name + CODES: (torch.uint8, (*leading, columns // 2)),
        name + BLOCK_SCALE: (parameter.scale_dtype, (*leading, columns // format.block)),
    }
    if format.has_global_scale:
        tensors[name + GLOBAL_SCALE] = (torch.float32, groups)
    if parameter.has_input_scale:
        tensors[(input_scale_of + INPUT_SCALE).lstrip("_")] = (torch.float32, groups)
    for tensor_name, (dtype, tensor_shape) in tensors.items():
        empty = torch.empty(tensor_shape, dtype=dtype, device="meta")
        module.register_parameter(tensor_name, nn.Parameter(empty, requires_grad=False))
    module.packed_names = (*getattr(module, "packed_names", ()), *tensors)


class QuantLinear(nn.Module):
    """y = x W^T + b with W [N, K] held in FP4 and dequantised at each call: memory of 4 bits, speed of the dense layer or less.

    Parameters are named as ModelOpt names them: weight uint8 [N, K/2], weight_scale [N, K/block], weight_scale_2 and input_scale fp32 [].
    """

    def __init__(self, linear: nn.Linear, format: BlockFormat, parameter: PackedParameter):
        super().__init__()
        self.in_features, self.out_features, self.format = linear.in_features, linear.out_features, format
        _register(self, "weight", "", format, (linear.out_features, linear.in_features), (), parameter)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] to [..., N], computed in the dtype of x."""
        return F.linear(x, quant_tensor(self, "weight", self.format).dequantize(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, format={self.format!r}"


def packed_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every packed Parameter of the model: its module, its full name, itself."""
    for module_name, module in model.named_modules():
        for name in getattr(module, "packed_names", ()):
            yield module, f"{module_name}.{name}", module.get_parameter(name)


def quant_tensor(module: nn.Module, name: str, format: BlockFormat) -> QuantTensor:
    """The matrix `name` of a packed module as a QuantTensor that shares its storage."""
    codes, scales = (module.get_parameter(name + suffix).detach() for suffix in (CODES, BLOCK_SCALE))
    return QuantTensor(codes, scales, _tensor(module, name + GLOBAL_SCALE), format)


def _tensor(module: nn.Module, name: str) -> torch.Tensor | None:
    parameter = getattr(module, name, None)
    return None if parameter is None else parameter.detach()


def expert_weights(module: ExpertsModule) -> ExpertWeights:
    """The experts of a packed module in canonical form, sharing its storage (biases that alternate gate and up are copied)."""
    state, first = module.halfbyte, first_projection(module)
    w13_bias = _tensor(module, f"{first}_bias")
    if w13_bias is not None and not module.is_concatenated:
        w13_bias = halves_from_alternating(w13_bias, dim=1)
    return ExpertWeights(
        quant_tensor(module, first, state.format),
        quant_tensor(module, "down_proj", state.format),
        activation=state.activation,
        w13_bias=w13_bias,
        w2_bias=_tensor(module, "down_proj_bias"),
        w13_input_scale=_tensor(module, first + INPUT_SCALE),
        w2_input_scale=_tensor(module, "down_proj" + INPUT_SCALE),
    )


def experts_forward(self: ExpertsModule, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """The experts implementation "halfbyte": hidden [T, H], ids [T, k], weights [T, k] to [T, H]; `self` is the model's own Experts module.

    Layers that the checkpoint leaves dense run transformers' grouped_mm.

    Raises:
        UnsupportedError: a gradient is asked for.
    """
    if not hasattr(self, "halfbyte"):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    if torch.is_grad_enabled() and hidden_states.requires_grad:
        raise UnsupportedError(f"{type(self).__name__}: packed experts have no backward pass", next_step="run under torch.no_grad()")
    if torch.compiler.is_compiling():
        return _compiled_forward(self, hidden_states, top_k_index, top_k_weights)
    prepared = _prepared(self)
    return fused_moe(hidden_states, prepared, top_k_index, top_k_weights, activations=self.halfbyte.activations)


def _compiled_forward(module: ExpertsModule, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What torch.compile traces: the op that `fused_moe` is then, on the module's own tensors, so that a graph follows them when they move."""
    state = module.halfbyte
    # Nothing may look at the tensors of the module yet: torch.compile would go on with those that packing replaces.
    if state.prepared_for == _circumstances(module, hidden.device):
        description, layout = state.prepared.description, state.prepared.layout
    else:
        description, layout = _prepare_while_tracing(id(module))
    tensors = expert_weights(module).tensors if layout == "canonical" else _packed_tensors(module)
    return torch.ops.halfbyte.fused_moe(hidden, list(tensors.values()), description, layout, ids, weights, state.activations, 0, None, False)


@torch.compiler.assume_constant_result
def _prepare_while_tracing(address: int) -> tuple[str, str]:
    """Run by torch.compile, which ties the graph to the one module with this id; those prepared before can share a graph with their like.

    The id stands for the module, which is alive and which torch 2.11 cannot pass to a function that it runs while tracing.
    """
    module = ctypes.cast(address, ctypes.py_object).value
    prepared = _prepared(module)
    return prepared.description, prepared.layout


def _circumstances(module: ExpertsModule, device: torch.device) -> str:
    """What decides how experts are prepared; a string, because torch.compile guards that it stays the same."""
    return f"{module.halfbyte.layout} layout, activations {module.halfbyte.activations}, {device.type} {device.index}"


def _prepared(module: ExpertsModule) -> PreparedExperts:
    """Prepare the experts at the first call, and again when a tensor has moved (`model.to(device)`, offloading, a reload)."""
    state = module.halfbyte
    in_place = state.layout == "auto" and _hopper_kernels_run(_device(module), state.format, state.activations) and not _is_offloaded(module)
    is_as_wanted = in_place and state.prepared is not None and state.prepared.layout == hopper_layout(state.activations)
    if state.replaced and not is_as_wanted:
        restore_canonical(module)
    if in_place and not state.replaced:
        pack_in_place(module)
    addresses = tuple(tensor.data_ptr() for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    if state.prepared is None or state.addresses != addresses:
        state.prepared = _packed(module) if state.replaced else prepare(expert_weights(module), "canonical")
        state.addresses = addresses
    state.prepared_for = _circumstances(module, _device(module))
    return state.prepared


def pack_in_place(module: ExpertsModule) -> None:
    """Arrange the experts for the Hopper kernels in the memory of their Parameters, and put buffers, which state_dict does not see, in their place.

    `state_dict()` still holds the canonical tensors (in new memory, codes under a zero scale as zeros), `load_state_dict` fills them, and when the
    module is moved to a device without such kernels, or calls for activations that they do not take, they come back. For fp8 activations, and back,
    experts are packed anew.
    """
    state = module.halfbyte
    state.prepared = prepare(expert_weights(module), hopper_layout(state.activations), in_place=True)
    for name in (projection + suffix for projection in (first_projection(module), "down_proj") for suffix in (CODES, BLOCK_SCALE)):
        state.replaced[name] = module.get_parameter(name).dtype
        delattr(module, name)
    for name, tensor in state.prepared.experts.tensors.items():
        module.register_buffer(_buffer_name(name), tensor, persistent=False)


def restore_canonical(module: ExpertsModule) -> None:
    """Undo `pack_in_place`; nothing to do where the module is not packed."""
    state = module.halfbyte
    if not state.replaced:
        return
    packed = _packed(module)
    for name, tensor in _canonical_parameters(module, packed).items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    for name in packed.experts.tensors:
        delattr(module, _buffer_name(name))
    state.prepared, state.prepared_for, state.replaced = None, "", {}


def _packed(module: ExpertsModule) -> PreparedExperts:
    """The packed experts, in the module's buffers as they are now; errors as `_packed_tensors`."""
    prepared = module.halfbyte.prepared
    return replace(prepared, experts=prepared.experts.with_tensors(_packed_tensors(module)), target=Target.of(_device(module)))


def _packed_tensors(module: ExpertsModule) -> dict[str, torch.Tensor]:
    """The buffers that hold the packed experts, by the names of the layout.

    Raises:
        UnsupportedError: the module was cast to another dtype, which packed weights do not survive.
    """
    experts = module.halfbyte.prepared.experts
    tensors = {name: module.get_buffer(_buffer_name(name)) for name in experts.tensors}
    for name, tensor in experts.tensors.items():
        if tensors[name].dtype != tensor.dtype:
            raise UnsupportedError("packed experts cannot be cast", where=f"{type(module).__name__}.{name}", given=tensors[name].dtype)
    return tensors


def _canonical_parameters(module: ExpertsModule, packed: PreparedExperts) -> dict[str, torch.Tensor]:
    """The tensors that `pack_in_place` replaced, by the names of their Parameters."""
    canonical, dtypes = packed.unprepare(), module.halfbyte.replaced
    tensors: dict[str, torch.Tensor] = {}
    for projection, weight in ((first_projection(module), canonical.w13), ("down_proj", canonical.w2)):
        assert isinstance(weight, QuantTensor)
        tensors |= {projection + CODES: weight.codes, projection + BLOCK_SCALE: weight.scales}
    return {name: tensor.view(dtypes[name]) for name, tensor in tensors.items()}


def _save_canonical(module: ExpertsModule, state_dict: dict[str, torch.Tensor], prefix: str, _: object) -> None:
    if module.halfbyte.replaced:
        state_dict.update({prefix + name: tensor for name, tensor in _canonical_parameters(module, _packed(module)).items()})


def _load_canonical(module: ExpertsModule, *_: object) -> None:
    restore_canonical(module)


def _buffer_name(name: str) -> str:
    return f"packed_{name.replace('.', '_')}"


def _device(module: ExpertsModule) -> torch.device:
    return next(itertools.chain(module.buffers(recurse=False), module.parameters(recurse=False))).device


@functools.cache
def _hopper_kernels_run(device: torch.device, format: BlockFormat, activations: ActivationFormat) -> bool:
    problem = Problem("fused_moe", Target.of(device), format, "hopper", activations)
    return any(obstacle is None for _, obstacle in obstacles(problem))


def _is_offloaded(module: ExpertsModule) -> bool:
    """Whether accelerate brings other copies of the tensors to the device at every call: what is packed then would be gone at the next."""
    hook = getattr(module, "_hf_hook", None)
    return hook is not None and getattr(hook, "offload", True)


def halves_from_alternating(x: torch.Tensor, dim: int) -> torch.Tensor:
    """gate0, up0, gate1, up1, ... along `dim` to gate0, gate1, ..., up0, up1, ...

    >>> halves_from_alternating(torch.tensor([0, 10, 1, 11]), dim=0).tolist()
    [0, 1, 10, 11]
    """
    return x.unflatten(dim, (-1, 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def find_activation(module: ExpertsModule, where: str) -> Activation:
    """Return the `Activation` that computes what the module's own gate computes, found by comparing the two on a probe.

    Names of classes and of configuration fields differ from model to model; values do not.

    Raises:
        UnsupportedError: none of the known activations agrees.
    """
    gate = torch.linspace(-24.0, 24.0, 97, device="cpu", dtype=torch.float32)
    if not module.has_gate:
        probe, candidates = gate, [RELU2]
        expected = module.act_fn(probe)
    else:
        probe, candidates = torch.cat((gate, gate.roll(31))), [GEGLU, GEGLU_TANH, *_swiglus(module)]
        expected = module._apply_gate(probe if module.is_concatenated else probe.view(2, -1).T.flatten())
    for activation in candidates:
        if torch.allclose(activate(probe, activation), expected, rtol=1e-4, atol=1e-6):
            return activation
    raise UnsupportedError(
        "the activation between the expert matrices is none that halfbyte computes",
        where=where,
        given=f"{type(module).__name__} with {getattr(module, 'act_fn', None)}",
        needed=", ".join(str(activation) for activation in candidates),
    )


def _swiglus(module: ExpertsModule) -> Iterator[Activation]:
    """SwiGLU plain and clamped, with the constants the module carries."""
    limits: list[Any] = [None, *(getattr(module, name, None) for name in ("limit", "swiglu_limit"))]
    alphas: list[Any] = [1.0, *(getattr(module, name, None) for name in ("alpha", "swiglu_alpha"))]
    for limit, alpha, beta in itertools.product(limits, alphas, (0.0, 1.0)):
        if alpha is not None:
            yield Activation("swiglu", alpha=float(alpha), beta=beta, limit=None if limit is None else float(limit))
