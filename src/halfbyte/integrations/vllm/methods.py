"""How vLLM's quantisation methods hold the experts of a layer, and which of these layers halfbyte runs. Nothing here imports vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from halfbyte.distributed.wire import Wire
from halfbyte.experts import Activation, ExpertMap, ExpertWeights, W13Order
from halfbyte.formats import MXFP4, NVFP4, BlockFormat
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.integrations.engines import Options, refusal_of_device

Layer = Any  # vLLM's RoutedExperts


@dataclass(frozen=True)
class Holding:
    """How one of vLLM's methods holds experts between loading and processing.

    Attributes:
        format: of the weights.
        codes, global_scale, input_scale: the Parameters after "w13_" and "w2_"; block scales are "weight_scale" in every method.
        inverse: global and input scales are encode multipliers.
        padded: Parameters are zeros before they are loaded, so the intermediate size may be rounded up.
    """

    format: BlockFormat
    codes: str = "weight"
    global_scale: str | None = None
    input_scale: str | None = None
    inverse: bool = False
    padded: bool = False

    @property
    def parameters(self) -> dict[str, str]:
        """Canonical tensor to Parameter; not every layer has all of them."""
        parts = {"codes": self.codes, "scales": "weight_scale", "global_scale": self.global_scale}
        names = {f"{side}.{part}": f"{side}_{leaf}" for side in ("w13", "w2") for part, leaf in parts.items() if leaf}
        vectors = {"input_scale": self.input_scale, "bias": "bias"}
        return names | {f"{side}_{part}": f"{side}_{leaf}" for side in ("w13", "w2") for part, leaf in vectors.items() if leaf}


_COMPRESSED = {"codes": "weight_packed", "global_scale": "weight_global_scale", "input_scale": "input_global_scale", "inverse": True}

# Names of vLLM's classes; a class that inherits from one of them may hold its experts in another way.
HOLDINGS: dict[str, Holding] = {
    "ModelOptNvFp4FusedMoE": Holding(NVFP4, global_scale="weight_scale_2", input_scale="input_scale"),
    "CompressedTensorsW4A4Nvfp4MoEMethod": Holding(NVFP4, **_COMPRESSED),  # type: ignore[arg-type]
    "CompressedTensorsW4A4Mxfp4MoEMethod": Holding(MXFP4, codes="weight_packed"),
    "CompressedTensorsW4A8Mxfp4MoEMethod": Holding(MXFP4, codes="weight_packed", padded=True),
    "GptOssMxfp4MoEMethod": Holding(MXFP4, padded=True),
    "Mxfp4MoEMethod": Holding(MXFP4, padded=True),
}

# vLLM's MoEActivation by value, where halfbyte has it: its kind, and the order of the rows of w13.
_ACTIVATIONS: dict[str, tuple[Any, W13Order]] = {
    "silu": ("swiglu", "gate_up"),
    "gelu": ("geglu", "gate_up"),
    "gelu_tanh": ("geglu_tanh", "gate_up"),
    "relu2_no_mul": ("relu2", "gate_up"),
    "swigluoai": ("swiglu", "interleaved"),
    "swigluoai_uninterleave": ("swiglu", "gate_up"),
}
_GPT_OSS = {"alpha": 1.702, "beta": 1.0, "limit": 7.0}  # which "swigluoai" means in vLLM, whatever the layer says
_TRAVELLING: dict[str, Literal["token", "mx"]] = {"fp8": "token", "mxfp8": "mx"}  # activations whose scales are made of one token alone
_GATHERED = ("naive", "allgather_reducescatter")  # all-to-all backends in which every rank gets the tokens of all


def activation_of(layer: Layer) -> tuple[Activation, W13Order] | None:
    """The activation of a layer and the order of its rows; None where halfbyte has no such activation."""
    name = layer.activation.value
    if name not in _ACTIVATIONS:
        return None
    kind, order = _ACTIVATIONS[name]
    given = {"alpha": layer.swiglu_alpha, "beta": layer.swiglu_beta, "limit": layer.swiglu_limit} if kind == "swiglu" else {}
    constants = _GPT_OSS if name == "swigluoai" else {key: value for key, value in given.items() if value is not None}
    return Activation(kind, **constants), order


def refusal(layer: Layer, method: Any, options: Options, lora: Any) -> str | None:
    """Why a layer with FP4 experts is left to vLLM; None where halfbyte runs it.

    Args:
        layer: whose `quant_method` is still to be set.
        method: vLLM's own.
        options: the user's.
        lora: vLLM's LoRAConfig or None.
    """
    holding, config = HOLDINGS.get(type(method).__name__), layer.moe_config
    if not options.enabled:
        return "switched off by option enabled"
    if holding is None:
        return f"it does not know how {type(method).__name__} holds experts"
    if config.moe_backend != "auto":
        return f"moe_backend {config.moe_backend!r} was asked for"
    parallel = config.moe_parallel_config
    if parallel.use_all2all_kernels and parallel.all2all_backend not in _GATHERED:
        return f"all2all_backend {parallel.all2all_backend!r} moves tokens itself; {' and '.join(_GATHERED)} gather them"
    if layer.apply_router_weight_on_input:
        return "router weights are applied to the input of the experts"
    if config.in_dtype != torch.bfloat16:
        return f"its kernels multiply bf16, the model is {config.in_dtype}"
    if activation_of(layer) is None:
        return f"it has no activation {layer.activation.value!r}"
    if lora is not None and (lora.target_modules is None or any("expert" in name for name in lora.target_modules)):
        return "LoRA may be applied to the experts; with lora_target_modules that name none of them it is not"
    block = holding.format.block
    sizes = (config.hidden_dim, config.intermediate_size_per_partition)
    if sizes[0] % block or (sizes[1] % block and not holding.padded):
        return f"hidden {sizes[0]} and intermediate {sizes[1]} on this rank do not divide into blocks of {block}"
    return refusal_of_device(config.device, options)


def refusal_of_peers(layer: Layer, options: Options, config: Any) -> str | None:
    """Why tokens of a layer do not travel over peer memory, the same on all ranks; None where the ranks may ask each other whether they can.

    Args:
        layer: which halfbyte runs.
        options: the user's.
        config: vLLM's VllmConfig.
    """
    parallel, whole = layer.moe_config.moe_parallel_config, config.parallel_config
    if not parallel.use_ep or parallel.dp_size == 1:
        return "no data-parallel ranks share the experts"
    if not options.peer_memory:
        return "switched off by option peer_memory"
    if parallel.ep_size != parallel.dp_size:
        return f"{parallel.ep_size} ranks share the experts, but {parallel.dp_size} have tokens of their own"
    if parallel.enable_eplb or whole.enable_elastic_ep:
        return "experts move between ranks"
    if whole.use_ubatching:
        return "two micro-batches are under way at once"
    if config.model_config.enable_sleep_mode:
        return "sleep mode takes the memory"
    return None


def experts_of(layer: Layer, holding: Holding, options: Options) -> ExpertWeights:
    """The experts of a layer whose weights vLLM has loaded: no copy, but of rows that do not lie gate first, one expert at a time."""
    found = activation_of(layer)
    assert found is not None, "refusal() has looked"
    activation, order = found
    tensors = {name: getattr(layer, parameter, None) for name, parameter in holding.parameters.items()}
    if options.activations != "nvfp4":  # the only ones with calibrated scales
        tensors |= {"w13_input_scale": None, "w2_input_scale": None}
    return ExpertWeights.from_engine_tensors(
        tensors,
        holding.format,
        activation,
        w13_order=order,
        inverse_global_scales=holding.inverse,
        first_expert=first_expert(layer.expert_map_manager),
        num_global_experts=layer.global_num_experts,
    )


def rows_as_loaded(layer: Layer, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Canonical tensor `name`, rows in dimension 1, as vLLM's Parameter has it."""
    found = activation_of(layer)
    if found is None or found[1] != "interleaved" or not name.startswith("w13"):
        return tensor
    return torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)


def wire_of(config: Any, activations: ActivationFormat) -> Wire | None:
    """How tokens travel between ranks where the experts would round each of them anyway; None where vLLM gathers them, or where they stay.

    Args:
        config: vLLM's FusedMoEConfig.
        activations: what the experts compute on. NVFP4 has scales of the experts' own, so such tokens travel as they are.
    """
    if activations not in _TRAVELLING or config.pcp_size > 1 or not (config.dp_size > 1 or config.is_sequence_parallel):
        return None
    return Wire("fp8", config.hidden_dim, config.in_dtype, _TRAVELLING[activations])


def first_expert(manager: Any) -> int:
    """The id of the first expert held here, where they are a contiguous slice: experts left over go to the first ranks, one each."""
    if manager.expert_map is None or manager.placement_strategy != "linear":
        return 0
    base, left_over = divmod(manager.global_num_experts, manager.ep_size)
    return manager.ep_rank * base + min(manager.ep_rank, left_over)


def expert_map_of(layer: Layer) -> ExpertMap | None:
    """The map of a layer; None where the experts held here are all, or a contiguous slice, which the weights know."""
    if layer._expert_map is None or layer.expert_map_manager.placement_strategy == "linear":
        return None
    local = layer._expert_map.to(torch.int32).unsqueeze(1)
    return ExpertMap(0, local, torch.ones(len(local), dtype=torch.int64, device=local.device))


def parameters_of(holding: Holding) -> Iterable[str]:
    """Every Parameter that processing consumes."""
    return holding.parameters.values()
