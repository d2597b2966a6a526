"""What replaces the dense layers of a transformers model: packed parameters on its own Experts modules, and `QuantLinear` for nn.Linear."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from halfbyte.checkpoint.source import TensorInfo
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.experts import GEGLU, GEGLU_TANH, RELU2, Activation, ExpertWeights
from halfbyte.formats import BlockFormat, QuantTensor
from halfbyte.integrations.packing import Host, Packing, attach, circumstances, packed_tensors, prepared_experts
from halfbyte.integrations.transformers import fp8
from halfbyte.integrations.transformers.conversion import Recipe, halves_from_alternating
from halfbyte.integrations.transformers.plan import PackedParameter
from halfbyte.integrations.transformers.stored import BLOCK_SCALE, CODES, GLOBAL_SCALE, INPUT_SCALE, PRE_QUANT_SCALE, Stored, parameter_dtype
from halfbyte.kernels.reference.activation import activate
from halfbyte.moe import fused_moe

# A module of a class decorated with transformers' use_experts_implementation; no common base class says what that adds.
ExpertsModule = Any
Headers = Mapping[str, TensorInfo]  # of the files
_HELD = "held_weight"


def first_projection(module: ExpertsModule) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def is_dispatched(module: nn.Module) -> bool:
    """Whether the class is decorated with transformers' use_experts_implementation."""
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate")


def pack_experts(module: ExpertsModule, packed: dict[str, PackedParameter], headers: Headers, where: str) -> dict[str, Recipe]:
    """Replace the dense (meta) weights of a decorated Experts module by packed ones; `packed` by projection name. Recipes by parameter name.

    Raises:
        CheckpointError: the files do not hold both matrices of every expert, or hold them in other shapes.
        UnsupportedError: the activation, or something else in the module, is unknown to halfbyte.
    """
    first = first_projection(module)
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedError("experts with a norm behind them are not supported", where=where)
    format = _one_format(packed, where)
    weights = partial(expert_weights, format=format, activation=find_activation(module, where))
    recipes: dict[str, Recipe] = {}
    num_experts = module.down_proj.shape[0]  # LongCat's gate_up_proj has rows for its zero experts too
    for projection in (first, "down_proj"):
        dense = getattr(module, projection)
        rows, columns = (dense.shape[2], dense.shape[1]) if module.is_transposed else dense.shape[1:]
        parts = 2 if projection == "gate_up_proj" else 1
        parameter = packed.get(projection)
        if parameter is None:
            raise _missing_experts(f"{where}.{projection}", 0, num_experts * parts)
        if parameter.merges_experts:
            _check_places(parameter, num_experts, dense.shape[0], parts, f"{where}.{projection}")
        if not parameter.merges_experts and len(parameter.places) not in (1, parts):
            raise _missing_experts(f"{where}.{projection}", len(parameter.places), parts)
        shape = (rows // parts, columns) if parameter.merges_experts else (num_experts, rows // len(parameter.places), columns)
        transposed = {_check_shapes(stored, shape, headers) for stored in parameter.places.values()} == {True}
        alternating = parts == 2 and len(parameter.places) == 1 and not module.is_concatenated
        recipe = Recipe(parameter, CODES, num_experts, parts, alternating, transposed)
        delattr(module, projection)
        groups = (num_experts, parts) if parts > 1 else (num_experts,)
        recipes |= _register(module, projection, projection, format, (num_experts, rows, columns), groups, recipe)
    attach(module, Packing(Host(weights, _replaceable, _keeps_storage), format))
    return recipes


def _one_format(packed: dict[str, PackedParameter], where: str) -> BlockFormat:
    stored = [stored for parameter in packed.values() for stored in parameter.places.values()]
    for one in stored:
        if PRE_QUANT_SCALE in one.tensors:
            raise UnsupportedError(
                "the inputs of experts cannot be scaled one by one",
                where=one.tensors[PRE_QUANT_SCALE],
                given="a pre_quant_scale (NVFP4_AWQ)",
                needed="experts quantised without AWQ",
            )
        if one.dialect is not stored[0].dialect:
            raise UnsupportedError(
                "the experts of a layer are stored in several ways", where=one.stem, given=one.dialect.name, needed=stored[0].dialect.name
            )
    format = stored[0].dialect.format
    assert format is not None, where
    return format


def _check_places(parameter: PackedParameter, num_experts: int, rows: int, parts: int, where: str) -> None:
    """Every expert and part must be there once; ids from 0, without gaps."""
    for expert in range(num_experts):
        for part in range(parts):
            if (expert, part) not in parameter.places:
                raise _missing_experts(
                    where, len(parameter.places), num_experts * parts, f": no {'up' if part else 'first'} matrix of expert {expert}"
                )
    for (expert, _), stored in parameter.places.items():
        if expert >= rows:
            raise CheckpointError("more experts than the configuration has", where=stored.stem, given=f"expert {expert}", needed=f"0 .. {rows - 1}")


def _missing_experts(where: str, given: int, needed: int, which: str = "") -> CheckpointError:
    return CheckpointError(
        f"experts are missing from the files{which}",
        where=where,
        given=f"{given} packed tensors",
        needed=needed,
        next_step="download the missing files, or correct num_experts in config.json",
    )


def _check_shapes(stored: Stored, shape: tuple[int, ...], headers: Headers) -> bool:
    """Whether the matrices [.., N, K] lie transposed.

    Raises:
        CheckpointError: they have neither shape.
    """
    *leading, rows, columns = shape
    format = stored.dialect.format
    assert format is not None
    codes, scales = (headers[stored.tensors[role]].shape for role in (CODES, BLOCK_SCALE))
    width, blocks = stored.dialect.codes_shape(columns), columns // format.block
    if codes == (*leading, rows, *width) and scales == (*leading, rows, blocks):
        return False
    if leading and codes == (*leading, columns // 2, rows) and scales == (*leading, blocks, rows):
        return True
    raise CheckpointError(
        "a packed matrix has another shape than the model's",
        where=stored.tensors[CODES],
        given=f"{codes}, scales {scales}",
        needed=f"{(*leading, rows, *width)}, scales {(*leading, rows, blocks)}",
        next_step="run `halfbyte inspect` on the checkpoint; its config.json may belong to another model",
    )


def _register(
    module: Any, name: str, scalars_of: str, format: BlockFormat, shape: tuple[int, ...], groups: tuple[int, ...], recipe: Recipe
) -> dict[str, Recipe]:
    """Give `module` empty meta Parameters for codes and scales of a matrix [..., N, K]. Parameters, because transformers shards no buffers."""
    *leading, columns = shape
    roles = {role for stored in recipe.parameter.places.values() for role in stored.tensors}
    tensors = {
        CODES: (name, (*leading, columns // 2)),
        BLOCK_SCALE: (name + BLOCK_SCALE, (*leading, columns // format.block)),
        GLOBAL_SCALE: (name + GLOBAL_SCALE, groups),
        INPUT_SCALE: ((scalars_of + INPUT_SCALE).lstrip("_"), groups),
        PRE_QUANT_SCALE: ((scalars_of + PRE_QUANT_SCALE).lstrip("_"), (columns,)),
    }
    wanted = {role: tensor for role, tensor in tensors.items() if role in roles}
    _add_parameters(module, {parameter: (parameter_dtype(role, format), shape) for role, (parameter, shape) in wanted.items()})
    return {parameter: recipe._replace(role=role) for role, (parameter, _) in wanted.items()}


def _add_parameters(module: Any, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    for name, (dtype, shape) in tensors.items():
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined] # the plan says that the files have it; on disk it stays without data
        module.register_parameter(name, parameter)
    module.packed_names = (*getattr(module, "packed_names", ()), *tensors)


class QuantLinear(nn.Module):
    """y = x W^T + b with W [N, K] held in FP4 and dequantised at each call: memory of 4 bits, speed of the dense layer or less.

    Parameters are named as ModelOpt names them: weight uint8 [N, K/2], weight_scale [N, K/block], weight_scale_2 and input_scale fp32 [],
    pre_quant_scale [K], by which the input is multiplied.
    """

    def __init__(self, linear: nn.Linear, parameter: PackedParameter, headers: Headers):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        stored = parameter.first
        assert stored.dialect.format is not None
        self.format = stored.dialect.format
        _check_shapes(stored, (self.out_features, self.in_features), headers)
        recipe = Recipe(parameter, CODES)
        self.recipes = _register(self, "weight", "", self.format, (self.out_features, self.in_features), (), recipe)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] to [..., N], computed in the dtype of x."""
        scale = _tensor(self, PRE_QUANT_SCALE.lstrip("_"))
        scaled = x if scale is None else x * scale.to(x.dtype)
        return F.linear(scaled, quant_tensor(self, "weight", self.format).dequantize(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, format={self.format!r}"


class FP8Linear(nn.Module):
    """y = x W^T + b with W [N, K] held in e4m3; `fp8` says which device multiplies it as it is, and which dequantises it at each call.

    weight e4m3 [N, K]; weight_scale fp32 [], [N, 1] or [N/128, K/128], rounded up.
    """

    def __init__(self, linear: nn.Linear, parameter: PackedParameter, headers: Headers):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.recipes = _register_fp8(self, "weight", (self.out_features, self.in_features), parameter, headers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] to [..., N], computed in the dtype of x."""
        return fp8.linear(x, self.get_parameter("weight"), self.get_parameter("weight" + BLOCK_SCALE), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def hold_fp8_weight(linear: Any, parameter: PackedParameter, headers: Headers) -> dict[str, Recipe]:
    """Keep the weight of a linear layer with a forward of its own in e4m3: `weight` is dequantised at each use. Recipes by parameter name."""
    shape, linear.weight_dtype = tuple(linear.weight.shape), linear.weight.dtype
    delattr(linear, "weight")
    stock: Any = type(linear)
    linear.__class__ = _holding_fp8(stock)
    return _register_fp8(linear, _HELD, shape, parameter, headers)


@functools.cache
def _holding_fp8(stock: Any) -> Any:
    def weight(self: Any) -> torch.Tensor:
        return fp8.dequantize(self.get_parameter(_HELD), self.get_parameter(_HELD + BLOCK_SCALE), self.weight_dtype)

    return type(stock.__name__, (stock,), {"weight": property(weight)})


def _register_fp8(module: Any, name: str, shape: tuple[int, ...], parameter: PackedParameter, headers: Headers) -> dict[str, Recipe]:
    """Give `module` empty meta Parameters for an e4m3 matrix [N, K] and its scales."""
    stored = parameter.first
    if stored.shape != shape:
        raise CheckpointError("a weight has another shape than the model's", where=stored.tensors[CODES], given=stored.shape, needed=shape)
    scales = headers[stored.tensors[BLOCK_SCALE]].shape
    shapes = {CODES: shape, BLOCK_SCALE: () if math.prod(scales) == 1 else (*scales, 1)[:2]}
    _add_parameters(module, {name + role: (parameter_dtype(role, None), held) for role, held in shapes.items()})
    return {name + role: Recipe(parameter, role) for role in shapes}


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
    first, parallel = first_projection(module), module.halfbyte.parallel
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
        num_global_experts=None if parallel is None else parallel.num_experts,
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
    layer = fused_moe if self.halfbyte.parallel is None else self.halfbyte.parallel.forward
    return layer(hidden_states, prepared_experts(self), top_k_index, top_k_weights, activations=self.halfbyte.activations)


def _compiled_forward(module: ExpertsModule, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """What torch.compile traces: the op that `fused_moe` is then, on the module's own tensors, so that a graph follows them when they move."""
    packing = module.halfbyte
    if packing.parallel is not None:
        raise UnsupportedError("experts that are spread over ranks are not traced by torch.compile", where=type(module).__name__)
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
