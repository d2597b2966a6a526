"""What replaces the dense layers of a transformers model: packed parameters on its own Experts modules, and `QuantLinear` for nn.Linear."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.experts import GEGLU, GEGLU_TANH, RELU2, Activation, ExpertWeights
from halfbyte.formats import BlockFormat, QuantTensor
from halfbyte.integrations.packing import Host, Packing, attach, circumstances, packed_tensors, prepared_experts
from halfbyte.integrations.transformers.plan import PackedParameter
from halfbyte.kernels.reference.activation import activate
from halfbyte.moe import fused_moe

# A module of a class decorated with transformers' use_experts_implementation; no common base class says what that adds.
ExpertsModule = Any

# Suffix of each tensor behind the name of the projection it belongs to.
CODES, BLOCK_SCALE, GLOBAL_SCALE, INPUT_SCALE = "", "_scale", "_scale_2", "_input_scale"


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
    weights = partial(expert_weights, format=format, activation=find_activation(module, where))
    for projection in (first, "down_proj"):
        dense = getattr(module, projection)
        experts, rows, columns = dense.shape if not module.is_transposed else (dense.shape[0], dense.shape[2], dense.shape[1])
        sources = 2 if projection == "gate_up_proj" else 1
        _check_complete(packed.get(projection), experts * sources, f"{where}.{projection}")
        groups = (experts, sources) if sources > 1 else (experts,)
        delattr(module, projection)
        _register(module, projection, projection, format, (experts, rows, columns), groups, packed[projection])
    attach(module, Packing(Host(weights, _replaceable, _keeps_storage), format))


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


def packed_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
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


def expert_weights(module: ExpertsModule, format: BlockFormat, activation: Activation) -> ExpertWeights:
    """The experts of a packed module in canonical form, sharing its storage (biases that alternate gate and up are copied)."""
    first = first_projection(module)
    w13_bias = _tensor(module, f"{first}_bias")
    if w13_bias is not None and not module.is_concatenated:
        w13_bias = halves_from_alternating(w13_bias, dim=1)
    return ExpertWeights(
        quant_tensor(module, first, format),
        quant_tensor(module, "down_proj", format),
        activation=activation,
        w13_bias=w13_bias,
        w2_bias=_tensor(module, "down_proj_bias"),
        w13_input_scale=_tensor(module, first + INPUT_SCALE),
        w2_input_scale=_tensor(module, "down_proj" + INPUT_SCALE),
    )


def _replaceable(module: ExpertsModule) -> dict[str, str]:
    """The Parameters that packing replaces, by the names of their canonical tensors."""
    sides = {"w13": first_projection(module), "w2": "down_proj"}
    return {f"{side}.{part}": name + suffix for side, name in sides.items() for part, suffix in (("codes", CODES), ("scales", BLOCK_SCALE))}


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
    return fused_moe(hidden_states, prepared_experts(self), top_k_index, top_k_weights, activations=self.halfbyte.activations)


def _compiled_forward(module: ExpertsModule, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """What torch.compile traces: the op that `fused_moe` is then, on the module's own tensors, so that a graph follows them when they move."""
    packing = module.halfbyte
    # Nothing may look at the tensors of the module yet: torch.compile would go on with those that packing replaces.
    if packing.prepared_for == circumstances(module, hidden.device):
        description, layout = packing.prepared.description, packing.prepared.layout
    else:
        description, layout = _prepare_while_tracing(id(module))
    tensors = packing.host.weights(module).tensors if layout == "canonical" else packed_tensors(module)
    held = (0, None, None)  # all experts
    return torch.ops.halfbyte.fused_moe(
        hidden, list(tensors.values()), description, layout, topk_ids, topk_weights, packing.activations, *held, None, False
    )


@torch.compiler.assume_constant_result
def _prepare_while_tracing(address: int) -> tuple[str, str]:
    """Run by torch.compile, which ties the graph to the one module with this id; those prepared before can share a graph with their like.

    The id stands for the module, which is alive and which torch 2.11 cannot pass to a function that it runs while tracing.
    """
    module = ctypes.cast(address, ctypes.py_object).value
    prepared = prepared_experts(module)
    return prepared.description, prepared.layout


def _keeps_storage(module: ExpertsModule) -> bool:
    """Not where accelerate brings other copies of the tensors to the device at every call: what is packed then would be gone at the next."""
    hook = getattr(module, "_hf_hook", None)
    return hook is None or not getattr(hook, "offload", True)


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
