"""The layers that are measured: their sizes, and what one call of each must read and compute at least."""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.bench.ceilings import Ceilings
from halfbyte.errors import InputError
from halfbyte.experts import GPT_OSS_SWIGLU, SWIGLU, Activation
from halfbyte.formats import MXFP4, NVFP4, BlockFormat

_FP32_BYTES = 4
_BF16_BYTES = 2


@dataclass(frozen=True)
class MoEShape:
    """The sizes of one MoE layer; `published` is the format its checkpoint comes in, where there is one in FP4."""

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    activation: Activation = SWIGLU
    has_bias: bool = False
    published: BlockFormat = NVFP4

    def __post_init__(self) -> None:
        sizes = (self.hidden, self.intermediate, self.num_experts, self.top_k)
        if min(sizes) < 1 or self.top_k > self.num_experts:
            raise InputError("not a MoE layer", where=self.name, given=sizes, needed="positive hidden, intermediate, experts, top_k <= experts")

    @property
    def halves(self) -> int:
        """Row groups of w13: gate and up, or up alone."""
        return self.activation.halves

    def expert_bytes(self, format: BlockFormat) -> int:
        """Bytes of one expert, each read once: codes, block scales, global scales (fp32, one per projection), biases (bf16).

        >>> MoEShape("tiny", hidden=64, intermediate=32, num_experts=4, top_k=2).expert_bytes(halfbyte.NVFP4)
        3468
        """
        weights = (self.halves + 1) * self.hidden * self.intermediate
        codes = weights // 2
        block_scales = weights // format.block
        global_scales = (self.halves + 1) * _FP32_BYTES if format.has_global_scale else 0
        biases = (self.halves * self.intermediate + self.hidden) * _BF16_BYTES if self.has_bias else 0
        return codes + block_scales + global_scales + biases

    def call_bytes(self, format: BlockFormat, num_tokens: int, experts_touched: float) -> float:
        """Bytes one call must move: the experts some token chose, hidden read once and the result written once, both bf16."""
        return experts_touched * self.expert_bytes(format) + 2 * _BF16_BYTES * num_tokens * self.hidden

    def call_flops(self, num_tokens: int) -> int:
        """Operations of the matrix products: a multiplication and an addition for each weight of each of a token's k experts."""
        return 2 * num_tokens * self.top_k * (self.halves + 1) * self.hidden * self.intermediate


NAMED_SHAPES = {
    shape.name: shape
    for shape in (
        MoEShape("qwen3-30b", 2048, 768, 128, 8),
        MoEShape("qwen3-235b", 4096, 1536, 128, 8),
        MoEShape("dsr1", 7168, 2048, 256, 8),
        MoEShape("gptoss", 2880, 2880, 128, 4, GPT_OSS_SWIGLU, has_bias=True, published=MXFP4),
        MoEShape("mixtral", 4096, 14336, 8, 2),
    )
}


@dataclass(frozen=True)
class Floor:
    """The shortest time a call can take; `bound` is "memory" or "compute", whichever needs it."""

    us: float
    bound: str


def floor_of(shape: MoEShape, format: BlockFormat, num_tokens: int, experts_touched: float, ceilings: Ceilings, activations: str) -> Floor:
    """max(bytes / read bandwidth, flops / matmul rate)."""
    memory_us = shape.call_bytes(format, num_tokens, experts_touched) / (ceilings.read_gbps * 1e3)
    compute_us = shape.call_flops(num_tokens) / (ceilings.matmul_tflops(activations) * 1e6)
    return Floor(memory_us, "memory") if memory_us >= compute_us else Floor(compute_us, "compute")
