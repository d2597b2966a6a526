"""The gate before the clock: a system whose result is wrong gets no time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from halfbyte.bench.inputs import Call
from halfbyte.bench.shapes import MoEShape
from halfbyte.experts import ExpertWeights
from halfbyte.formats import QuantTensor
from halfbyte.formats.activation_formats import ActivationFormat, round_trip
from halfbyte.kernels.reference.activation import activate
from halfbyte.weights.hopper.rounding_fp8 import round_to_fp8

# Relative, because absolute tolerances let zeros, halves and dropped experts through. Rounding to bf16 between the two products alone gives 2.5e-3.
TOKEN_LIMIT, GLOBAL_LIMIT = 1e-2, 5e-3
_WRONGLY_REFUSED = 1e-4  # how often, at most, a right result is beyond what `Allowance` says


@dataclass(frozen=True)
class Allowance:
    """What a system may lose beyond the standard limits by rounding between the two products, with any number of tokens.

    Few tokens scatter more than many: the squared error of one is a sum over its k * I elements of h, of which a few carry most of it.

    Attributes:
        many: relative L2 error of many tokens together.
        spread: variance of the squared error of one token, in units of its squared mean.
    """

    many: float
    spread: float

    def of(self, num_tokens: int) -> float:
        """The error of so many tokens together that a right result exceeds once in 10,000 times, or less often.

        Squared errors are taken for gamma distributed with that mean and variance. Their sum over tokens is so too, and has the tail of Laurent and
        Massart (Adaptive estimation of a quadratic functional by model selection, 2000, lemma 1).

        >>> [f"{Allowance(1.5e-2, 1).of(tokens):.1e}" for tokens in (1, 2, 16, 4096)]
        ['5.7e-02', '4.4e-02', '2.4e-02', '1.6e-02']
        """
        t = -math.log(_WRONGLY_REFUSED) * self.spread / max(num_tokens, 1)
        return self.many * math.sqrt(1 + math.sqrt(2 * t) + t)

    def limits(self, num_tokens: int) -> tuple[float, float]:
        """For all tokens, and for the worst one: as `judge` takes them."""
        return self.of(num_tokens), self.of(1)


# Of peers. Public W4A16 systems gave 3.4e-3 to 6.0e-3 over all tokens on an H200. They round to bf16 in seven places: emulated on a CPU, that is
# 5.4e-3, with a spread of 0.02 (k * I = 6144) to 0.25 (32). A row records a limit that is not the standard one.
PEER_LIMIT, PEER_SPREAD = 7e-3, 0.25


def fp8_allowance(shape: MoEShape) -> Allowance:
    """Of a kernel on fp8 tensor cores.

    They sum in a precision of their own, 1.2e-3 away from fp32 (H100, 2026-11-25), after which h is rounded to e4m3: a few codes in a hundred move by
    a whole step of 2^-3. Measured: 1.1e-2 to 1.4e-2 over all tokens, 3.3e-2 for the worst; each product alone, 2.1e-3. Emulated on a CPU: 1.2e-2,
    with a spread of 0.6 (k * I = 6144), 1.5 (512) and 6 (32). Codes that move are rare among few elements. And a row's scale follows its largest
    element and moves all codes at once, however many.
    """
    return Allowance(1.5e-2, 1 + 300 / (shape.top_k * shape.intermediate))


@dataclass(frozen=True)
class Verdict:
    """Relative L2 error of the worst token, and of all tokens together, with their limits."""

    token_error: float
    global_error: float
    global_limit: float = GLOBAL_LIMIT
    token_limit: float = TOKEN_LIMIT

    @property
    def passed(self) -> bool:
        return self.token_error <= self.token_limit and self.global_error <= self.global_limit

    def __str__(self) -> str:
        return f"worst token {self.token_error:.1e} (limit {self.token_limit:.1e}), all {self.global_error:.1e} (limit {self.global_limit:.1e})"


def judge(actual: torch.Tensor, expected: torch.Tensor, global_limit: float = GLOBAL_LIMIT, token_limit: float = TOKEN_LIMIT) -> Verdict:
    """Compare actual [T, H] with expected [T, H], token by token and as a whole; NaN and a wrong shape are infinite errors.

    >>> expected = torch.randn(3, 64)
    >>> judge(expected, expected).passed, judge(expected / 2, expected)
    (True, Verdict(token_error=0.5, global_error=0.5, global_limit=0.005, token_limit=0.01))
    """
    if actual.shape != expected.shape:
        return Verdict(torch.inf, torch.inf, global_limit, token_limit)
    difference = (actual.float() - expected).norm(dim=1).nan_to_num(nan=torch.inf, posinf=torch.inf)
    norm = expected.norm(dim=1)
    per_token = torch.where(difference == 0, 0.0, difference / norm)
    return Verdict(per_token.max().item(), (difference.norm() / norm.norm()).item(), global_limit, token_limit)


def poison_free_memory(like: torch.Tensor) -> None:
    """Fill memory that the allocator hands out next with NaN: a system that writes nothing must not return what the one before it left there."""
    for tensor in [torch.empty_like(like) for _ in range(8)]:
        tensor.fill_(torch.nan)


@torch.no_grad()
def expected_output(experts: ExpertWeights, call: Call, activations: ActivationFormat, fp8_weights: bool = False) -> torch.Tensor:
    """The layer in fp32 from dequantised weights, one expert after the other, on the device of the weights: fp32 [T, H].

    Nothing is rounded between the two products when activations are "bf16"; other kinds are quantised where `kernels.reference.fused_moe` says.
    `fp8_weights`: for a kernel that rounds its weights to e4m3; what that costs the weights is `rounding_fp8.weight_error`, not this gate's to judge.
    Needs one dequantised expert and its rows beside the result.
    """
    values = round_to_fp8 if fp8_weights else QuantTensor.dequantize
    output = torch.zeros(call.hidden.shape, dtype=torch.float32, device=call.hidden.device)
    input_scales = [None if scale is None else scale.max() for scale in (experts.w13_input_scale, experts.w2_input_scale)]
    with _exact_matmuls():
        for expert in call.ids.unique().tolist():
            token, slot = (call.ids == expert).nonzero(as_tuple=True)
            x = round_trip(call.hidden[token], activations, input_scales[0])
            h = activate(_linear(x, experts.w13, experts.w13_bias, expert, values), experts.activation)
            if activations != "bf16":
                h = round_trip(h.to(call.hidden.dtype), activations, input_scales[1])
            rows = _linear(h, experts.w2, experts.w2_bias, expert, values)
            output.index_add_(0, token, rows * call.weights[token, slot, None])
    return output


def _linear(
    x: torch.Tensor, weight: QuantTensor | torch.Tensor, bias: torch.Tensor | None, expert: int, values: Callable[[QuantTensor], torch.Tensor]
) -> torch.Tensor:
    dense = values(weight[expert]) if isinstance(weight, QuantTensor) else weight[expert].float()
    return x @ dense.T if bias is None else x @ dense.T + bias[expert].float()


@contextmanager
def _exact_matmuls() -> Iterator[None]:
    """fp32 products without TF32, whatever a peer has set for the process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
