"""`ExpertWeights`: the experts of one MoE layer in canonical form, whatever checkpoint they came from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from halfbyte.errors import InputError
from halfbyte.formats import BlockFormat, QuantTensor

ActivationKind = Literal["swiglu", "geglu", "geglu_tanh", "relu2"]


@dataclass(frozen=True)
class Activation:
    """The function between the two expert matrices (computed by `kernels.reference.activation`).

    swiglu      (clamp(up, -limit, limit) + beta) * g * sigmoid(alpha * g) with g = min(gate, limit)
    geglu       gelu(gate) * up (exact gelu; "geglu_tanh": its tanh form)
    relu2       relu(x)^2, no gate: w13 has I rows, not 2I
    """

    kind: ActivationKind = "swiglu"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    @property
    def gated(self) -> bool:
        return self.kind != "relu2"


SWIGLU = Activation()
GPT_OSS_SWIGLU = Activation("swiglu", alpha=1.702, beta=1.0, limit=7.0)
DEEPSEEK_V4_SWIGLU = Activation("swiglu", limit=10.0)
GEGLU = Activation("geglu")
GEGLU_TANH = Activation("geglu_tanh")
RELU2 = Activation("relu2")


@dataclass(frozen=True)
class ExpertWeights:
    """The experts of one layer; E experts, hidden size H, intermediate size I.

    Attributes:
        w13: [E, 2I, H], gate rows then up rows ([E, I, H] when the activation has no gate). A QuantTensor in scale layout "linear", whose
            NVFP4 global scale is [E, 2] (gate, up) for gated and [E] for plain experts; or a dense bf16/fp16/fp32 tensor.
        w2: [E, H, I], likewise; NVFP4 global scale [E].
        activation: what lies between the two.
        w13_bias, w2_bias: [E, 2I] (same row order as w13) and [E, H], or None.
        w13_input_scale, w2_input_scale: fp32 decode multipliers of calibrated NVFP4 activations, one an expert of the *whole* layer:
            [E_global, 2] (gate, up; [E_global] when plain) and [E_global]; None where the checkpoint has none.
        first_expert, num_global_experts: which slice of the layer's experts this is (expert parallel); all of them by default.
    """

    w13: QuantTensor | torch.Tensor
    w2: QuantTensor | torch.Tensor
    activation: Activation = field(default_factory=Activation)  # SWIGLU; torch 2.11 compiles no constructor with an object as its default
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    w13_input_scale: torch.Tensor | None = None
    w2_input_scale: torch.Tensor | None = None
    first_expert: int = 0
    num_global_experts: int | None = None

    def __post_init__(self) -> None:
        if self.num_global_experts is None:
            object.__setattr__(self, "num_global_experts", self.num_experts)
        if len(self.w13.shape) != 3 or len(self.w2.shape) != 3:
            raise InputError(
                "expert weights are 3-D", given=f"w13 {tuple(self.w13.shape)}, w2 {tuple(self.w2.shape)}", needed="[E, 2I, H] and [E, H, I]"
            )
        halves = 2 if self.activation.gated else 1
        experts, hidden, intermediate = self.w2.shape
        if tuple(self.w13.shape) != (experts, halves * intermediate, hidden):
            raise InputError(
                "w13 and w2 do not belong together",
                given=f"w13 {tuple(self.w13.shape)}, w2 {tuple(self.w2.shape)}, activation {self.activation.kind}",
                needed=f"w13 {(experts, halves * intermediate, hidden)}",
            )
        for name, bias, rows in (("w13_bias", self.w13_bias, halves * intermediate), ("w2_bias", self.w2_bias, hidden)):
            if bias is not None and tuple(bias.shape) != (experts, rows):
                raise InputError(f"{name} has the wrong shape", given=tuple(bias.shape), needed=(experts, rows))
        if _format_name(self.w13) != _format_name(self.w2):
            raise InputError(
                "w13 and w2 are in different formats", given=f"{_format_name(self.w13)} and {_format_name(self.w2)}", needed="one format"
            )

    @property
    def num_experts(self) -> int:
        """Experts held here (E)."""
        return self.w2.shape[0]

    @property
    def hidden(self) -> int:
        return self.w2.shape[1]

    @property
    def intermediate(self) -> int:
        return self.w2.shape[2]

    @property
    def format(self) -> BlockFormat | None:
        """NVFP4, MXFP4, or None for dense weights."""
        return self.w13.format if isinstance(self.w13, QuantTensor) else None

    @property
    def device(self) -> torch.device:
        return self.w2.device

    @property
    def nbytes(self) -> int:
        return self.w13.nbytes + self.w2.nbytes + sum(bias.nbytes for bias in (self.w13_bias, self.w2_bias) if bias is not None)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by name: "w13.codes", "w13.scales", "w13.global_scale", ... (or "w13", dense), "w13_bias", ..."""
        result: dict[str, torch.Tensor] = {}
        for name, value in ((name, getattr(self, name)) for name in _TENSOR_FIELDS):
            if isinstance(value, QuantTensor):
                parts = {f"{name}.codes": value.codes, f"{name}.scales": value.scales, f"{name}.global_scale": value.global_scale}
                result |= {part: tensor for part, tensor in parts.items() if tensor is not None}
            elif value is not None:
                result[name] = value
        return result

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> ExpertWeights:
        """The same experts with other storage; names as in `tensors`."""

        def renewed(name: str, value: QuantTensor | torch.Tensor | None) -> QuantTensor | torch.Tensor | None:
            if isinstance(value, QuantTensor):
                return replace(
                    value, codes=tensors[f"{name}.codes"], scales=tensors[f"{name}.scales"], global_scale=tensors.get(f"{name}.global_scale")
                )
            return tensors.get(name)

        fields: dict[str, Any] = {name: renewed(name, getattr(self, name)) for name in _TENSOR_FIELDS}
        return replace(self, **fields)

    def __getitem__(self, experts: slice) -> ExpertWeights:
        """The experts of a contiguous slice, sharing storage; input scales go on to cover all experts of the layer."""
        first, last, step = experts.indices(self.num_experts)
        if step != 1:
            raise InputError("experts are taken in contiguous slices", given=experts, needed="a step of 1")
        parts = {name: tensor if name.endswith("input_scale") else tensor[first:last] for name, tensor in self.tensors.items()}
        return replace(self.with_tensors(parts), first_expert=self.first_expert + first)

    def to(self, device: torch.device | str) -> ExpertWeights:
        """Copy every tensor to `device`."""
        return self.with_tensors({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> ExpertWeights:
        """Return the same experts dense in `dtype`."""
        return replace(self, w13=_dense(self.w13, dtype), w2=_dense(self.w2, dtype))


_TENSOR_FIELDS = ("w13", "w2", "w13_bias", "w2_bias", "w13_input_scale", "w2_input_scale")


def _dense(weight: QuantTensor | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.dequantize(dtype) if isinstance(weight, QuantTensor) else weight.to(dtype)


def _format_name(weight: QuantTensor | torch.Tensor) -> str:
    return repr(weight.format) if isinstance(weight, QuantTensor) else str(weight.dtype)
