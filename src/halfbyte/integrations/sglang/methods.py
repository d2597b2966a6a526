"""How SGLang's quantisation methods hold the experts of a layer, and which of these layers halfbyte runs. Nothing here imports SGLang.

halfbyte takes the place of SGLang's Marlin: its Parameters have gate rows first, expert ids are local ones (-1 for experts of other ranks), and the
routed scaling factor is left to the method.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.device import Target
from halfbyte.experts import Activation, ExpertWeights
from halfbyte.formats import MXFP4, NVFP4, BlockFormat
from halfbyte.integrations.engines import Options, refusal_of_device

Layer = Any  # SGLang's FusedMoE
Arguments = Any  # SGLang's ServerArgs

_ONE = 127  # the e8m0 byte of 1


@dataclass(frozen=True)
class Holding:
    """How one of SGLang's methods holds experts between loading and processing.

    Attributes:
        format: of the weights.
        codes, scales, global_scale, bias: the Parameters after "w13_" and "w2_".
        inverse: global scales are encode multipliers.
        scales_result: SGLang's Marlin multiplies the result by the layer's routed scaling factor; elsewhere, router weights or the model have it.
        padded: Parameters are zeros before they are loaded, so the intermediate size may be rounded up.
        only_marlin: SGLang has this method for Marlin alone; others run on Marlin where that was asked for.
    """

    format: BlockFormat
    codes: str = "weight"
    scales: str = "weight_scale"
    global_scale: str | None = None
    bias: str | None = None
    inverse: bool = False
    scales_result: bool = False
    padded: bool = False
    only_marlin: bool = False

    @property
    def parameters(self) -> dict[str, str]:
        """Canonical tensor to Parameter; not every layer has biases."""
        parts = {".codes": self.codes, ".scales": self.scales, ".global_scale": self.global_scale, "_bias": self.bias}
        return {f"{side}{part}": f"{side}_{leaf}" for side in ("w13", "w2") for part, leaf in parts.items() if leaf}

    @property
    def consumed(self) -> dict[str, str]:
        """Those whose memory processing takes: all that are large."""
        return {name: parameter for name, parameter in self.parameters.items() if name.endswith((".codes", ".scales"))}


# Names of SGLang's classes, methods or the schemes of compressed-tensors; one that inherits from these may hold its experts in another way.
HOLDINGS: dict[str, Holding] = {
    "ModelOptNvFp4FusedMoEMethod": Holding(NVFP4, global_scale="weight_scale_2", scales_result=True),
    "CompressedTensorsW4A16Nvfp4MoE": Holding(
        NVFP4, "weight_packed", global_scale="weight_global_scale", inverse=True, scales_result=True, only_marlin=True
    ),
    "Mxfp4MoEMethod": Holding(MXFP4, bias="weight_bias", padded=True),
    "Mxfp4MarlinMoEMethod": Holding(MXFP4, scales="weight_scale_inv", only_marlin=True),
}


def kind_of(layer: Layer, method: Any) -> str:
    """The name of the class that holds the experts: the scheme's where the method has one for each layer."""
    scheme = getattr(layer, "scheme", None)
    return type(method if scheme is None else scheme).__name__


def activation_of(config: Any) -> Activation | None:
    """The activation of a layer, by SGLang's MoeRunnerConfig; None where halfbyte has no such activation."""
    if not config.is_gated:
        return Activation("relu2") if config.activation == "relu2" else None
    if config.activation != "silu":
        return None
    if config.gemm1_alpha is None:
        return Activation("swiglu", limit=config.swiglu_limit or None)
    beta = getattr(config, "gemm1_beta", None)  # not in 0.5.17
    return Activation("swiglu", config.gemm1_alpha, 1.0 if beta is None else beta, config.gemm1_clamp_limit)


def is_interleaved(layer: Layer, holding: Holding) -> bool:
    """Whether gate and up rows come in turns: in gpt-oss and where the model says so."""
    config = layer.moe_runner_config
    if holding.format == MXFP4:
        return config.gemm1_alpha is not None and config.gate_up_interleaved
    return bool(getattr(layer, "inference_moe_w13_interleaved", False))


def refusal(layer: Layer, method: Any, backend: Any, all2all: Any, arguments: Arguments, options: Options) -> str | None:
    """Why a layer with FP4 experts is left to SGLang; None where halfbyte runs it.

    Args:
        layer: whose `quant_method` is still to be set.
        method: SGLang's own.
        backend, all2all: SGLang's MoeRunnerBackend and MoeA2ABackend.
        arguments: of the server.
        options: the user's.
    """
    holding, config = HOLDINGS.get(kind_of(layer, method)), layer.moe_runner_config
    if not options.enabled:
        return "switched off by option enabled"
    if holding is None:
        return f"it does not know how {kind_of(layer, method)} holds experts"
    if not _on_marlin(holding, backend, arguments):
        return f"it takes the place of Marlin, and the MoE runner is {backend.value!r}; start with --moe-runner-backend marlin"
    if not all2all.is_none():
        return f"MoE all-to-all backend {all2all.value!r} moves tokens itself"
    if not getattr(getattr(method, "quant_config", None), "is_checkpoint_nvfp4_serialized", True):
        return "weights are quantised while they are loaded"
    if activation_of(config) is None:
        return f"it has no activation {config.activation!r} {'with' if config.is_gated else 'without'} a gate"
    if config.apply_router_weight_on_input:
        return "router weights are applied to the input of the experts"
    if config.no_combine:
        return "results of the experts are wanted one by one"
    if layer.params_dtype != torch.bfloat16:
        return f"its kernels multiply bf16, the model is {layer.params_dtype}"
    block, sizes = holding.format.block, (layer.hidden_size, layer.intermediate_size_per_partition)
    if sizes[0] % block or (sizes[1] % block and not holding.padded):
        return f"hidden {sizes[0]} and intermediate {sizes[1]} on this rank do not divide into blocks of {block}"
    if unwanted := next(_unwanted_arguments(arguments), None):
        return unwanted
    return refusal_of_device(_device(arguments), options)


def _device(arguments: Arguments) -> str:
    """Where layers lie. In newer releases, arguments stay as they were given, and none is given as a rule."""
    return arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _on_marlin(holding: Holding, backend: Any, arguments: Arguments) -> bool:
    """Whether SGLang would run the layer on Marlin. "auto" means it for NVFP4 below Blackwell."""
    device = _device(arguments)
    below_blackwell = device == "cuda" and int(Target.of(device).arch.removeprefix("sm_")) < 100
    return backend.is_marlin() or holding.only_marlin or (backend.is_auto() and holding.format == NVFP4 and below_blackwell)


def _unwanted_arguments(arguments: Arguments) -> Iterator[str]:
    """What SGLang does with the Parameters of experts, or beside them, and cannot with halfbyte's."""
    given = {name: getattr(arguments, name, None) for name in ("cpu_offload_gb", "kt_weight_path", "enable_paged_experts")}
    yield from (f"--{name.replace('_', '-')} keeps experts elsewhere" for name, value in given.items() if value)
    for name, usual in (("dwdp_size", 1), ("offload_group_size", -1)):
        if getattr(arguments, name, None) not in (None, 0, usual):
            yield f"--{name.replace('_', '-')} keeps experts elsewhere"
    if getattr(arguments, "weight_cache_mode", "off") != "off":
        yield "the weight cache shares Parameters with other processes"
    if (arguments.enable_lora or arguments.lora_paths) and _may_adapt_experts(arguments.lora_target_modules):
        yield "LoRA may be applied to the experts; with --lora-target-modules that name none of them it is not"


def _may_adapt_experts(targets: Any) -> bool:
    return not targets or any(name in target for target in targets for name in ("all", "gate", "up_proj", "down_proj", "expert"))


def experts_of(layer: Layer, holding: Holding) -> ExpertWeights:
    """The experts of a layer whose weights SGLang has loaded. No copy, but of Parameters that are padded or have rows in turns."""
    config = layer.moe_runner_config
    activation = activation_of(config)
    assert activation is not None, "refusal() has looked"
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in holding.parameters.items():
        tensor = getattr(layer, parameter, None)
        if tensor is None:
            continue
        plain = tensor.detach().as_subclass(torch.Tensor)
        tensors[name] = plain if name.endswith("global_scale") else canonical_part(layer, holding, name, plain).flatten(1, 2)
    factor = config.routed_scaling_factor
    if holding.scales_result and factor is not None and factor != 1.0:
        scale = tensors["w2.global_scale"].float()
        tensors["w2.global_scale"] = scale / factor if holding.inverse else scale * factor
    return ExpertWeights.from_engine_tensors(tensors, holding.format, activation, inverse_global_scales=holding.inverse)


def canonical_part(layer: Layer, holding: Holding, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A view of what canonical tensor `name` has of the Parameter's `tensor`: [E, halves, rows, ...], halves of w13 where there is a gate, else 1."""
    block, hidden = holding.format.block, layer.hidden_size
    intermediate = -(-layer.intermediate_size_per_partition // block) * block
    rows, columns = (intermediate, hidden) if name.startswith("w13") else (hidden, intermediate)
    if tensor.element_size() == 1:
        tensor = tensor.view(torch.uint8)  # not every device can index fp8
    if tensor.ndim == 3:
        tensor = tensor[:, :, : columns // (2 if name.endswith("codes") else block)]
    if name.startswith("w2") or not layer.moe_runner_config.is_gated:
        return tensor[:, None, :rows]
    if is_interleaved(layer, holding):
        return tensor[:, : 2 * rows].unflatten(1, (rows, 2)).transpose(1, 2)
    return tensor.unflatten(1, (2, -1))[:, :, :rows]


def empty_parameter(holding: Holding, name: str, shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """Memory for a Parameter as SGLang makes it: its padding is worth zero."""
    fill = _ONE if holding.format == MXFP4 and name.endswith("scales") else 0
    return torch.full(shape, fill, dtype=torch.uint8, device=like.device).view(like.dtype)
