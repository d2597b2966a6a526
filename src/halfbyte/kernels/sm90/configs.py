"""Which kernels serve which numbers of tokens on Hopper, and with what tiles. Plain Python: nothing here needs Triton or a device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from halfbyte.formats import MXFP4, NVFP4
from halfbyte.kernels.problem import Problem, Size

DECODE_ROWS = 8  # of x per program of the decode kernel
MAX_DIRECT_TOKENS = 8
MAX_DIRECT_SLOTS = 64


@dataclass(frozen=True)
class DecodeConfig:
    """Whether programs find their rows in the expert ids themselves, or in the work list of `sort`. See `gemm_decode`."""

    direct: bool

    @property
    def max_rows(self) -> int:
        """Of an item of the work list."""
        return DECODE_ROWS


@dataclass(frozen=True)
class PrefillConfig:
    """Tiles and stages of `gemm_prefill`.

    Attributes:
        sizes: token counts that a tile can have, each as (first, second accumulator).
        consumers: warpgroups that multiply.
        step_k, x_stages: columns per stage of x, and how many stages; box: rows that are copied at once.
        w_stages: stages of 256 columns of weights.
        consumer_registers: registers per thread of the consumers after the first; launch_registers: of the launch, which bounds the first.
        row_tiles_per_consumer: tiles of 64 weight rows.
        fp8: x is e4m3, for fp8 tensor cores.
    """

    sizes: tuple[tuple[int, int], ...]
    consumers: int
    step_k: int
    x_stages: int
    w_stages: int
    box: int
    consumer_registers: int
    launch_registers: int
    row_tiles_per_consumer: int = 1
    fp8: bool = False

    @property
    def max_rows(self) -> int:
        return sum(self.sizes[-1])


Config: TypeAlias = DecodeConfig | PrefillConfig

DIRECT, DECODE = DecodeConfig(direct=True), DecodeConfig(direct=False)

# Measured on an H200, 2026-11-26 (docs/kernels.md): many consumers hide the latency of decoding for few tokens, two row tiles per consumer halve the
# reads of x, and large tiles amortise decoding.
TINY = PrefillConfig(((16, 0), (32, 0)), consumers=4, step_k=256, x_stages=4, w_stages=4, box=16, consumer_registers=112, launch_registers=96)
SMALL = PrefillConfig(
    ((16, 0), (32, 0), (64, 0)), consumers=4, step_k=128, x_stages=6, w_stages=3, box=16, consumer_registers=112, launch_registers=96
)
MEDIUM = PrefillConfig(
    ((32, 0), (64, 0), (64, 16), (64, 32)),
    consumers=2, row_tiles_per_consumer=2, step_k=128, x_stages=4, w_stages=3, box=16, consumer_registers=240, launch_registers=168,
)  # fmt: skip
LARGE = PrefillConfig(
    ((64, 0), (128, 0), (128, 16), (128, 32)),
    consumers=2, row_tiles_per_consumer=2, step_k=64, x_stages=6, w_stages=2, box=32, consumer_registers=240, launch_registers=168,
)  # fmt: skip
HUGE = PrefillConfig(
    ((64, 0), (128, 0), (128, 64), (256, 0), (256, 16), (256, 32)),
    consumers=2, step_k=64, x_stages=4, w_stages=2, box=32, consumer_registers=240, launch_registers=168,
)  # fmt: skip

# Decoding a tile for fp8 keeps the integer pipe busy for about 90 cycles of a scheduler, or 60 where words are coded for it, and reading it from
# memory takes about as long; the product takes 1 cycle a token, that of bf16 2. Measured beside the kernels for bf16: docs/activations.md.
FP8_TINY = replace(TINY, fp8=True)
FP8_SMALL = PrefillConfig(
    ((32, 0), (64, 0), (64, 32)),
    consumers=4, step_k=256, x_stages=4, w_stages=3, box=32, consumer_registers=112, launch_registers=96, fp8=True,
)  # fmt: skip
FP8_MEDIUM = PrefillConfig(
    ((32, 0), (64, 0), (64, 32), (128, 0)),
    consumers=3, step_k=128, x_stages=6, w_stages=3, box=32, consumer_registers=160, launch_registers=128, fp8=True,
)  # fmt: skip
FP8_LARGE = PrefillConfig(
    ((64, 0), (128, 0), (128, 32), (128, 64)),
    consumers=3, step_k=128, x_stages=5, w_stages=3, box=64, consumer_registers=160, launch_registers=128, fp8=True,
)  # fmt: skip
FP8_HUGE = PrefillConfig(
    ((64, 0), (128, 0), (128, 64), (256, 0), (256, 16), (256, 32)),
    consumers=2, step_k=128, x_stages=4, w_stages=3, box=32, consumer_registers=240, launch_registers=168, fp8=True,
)  # fmt: skip
# Rows per expert, on average, from which on fp8 tensor cores gain enough with words for bf16: weights in NVFP4 are rounded for it, those in MXFP4 are
# not (`weights.hopper.rounding_fp8`). Words for fp8 take the kernels for bf16 8 to 25 % longer, and fp8 tensor cores gain as soon as there are tokens
# enough, or tiles of 64 weight rows for all multiprocessors: with 1 and 2 tokens FP8_TINY takes 8 and 15 % less time than the direct kernel for
# DeepSeek-R1 (512 tiles a token), but for Qwen3-235B (384) 8 % more and as long, for Qwen3-30B (192) 35 and 20 % more (H200, MXFP4, 2026-11-28).
MIN_FP8_ROWS = {NVFP4: 24, MXFP4: 12}
MIN_FP8_TOKENS, MIN_FP8_TILES = 3, 512

PREFILL = (TINY, SMALL, MEDIUM, LARGE, HUGE)
PREFILL_FP8 = (FP8_TINY, FP8_SMALL, FP8_MEDIUM, FP8_LARGE, FP8_HUGE)


def configs(problem: Problem) -> tuple[Config, ...]:
    """Every configuration that can run the problem; "expert_rows" has no direct one, because its rows are sorted."""
    exact = PREFILL if problem.batch_invariant else (*((DIRECT,) if problem.op == "fused_moe" else ()), DECODE, *PREFILL)
    if not takes_fp8(problem):
        return exact
    return PREFILL_FP8 if problem.batch_invariant else (*exact, *PREFILL_FP8)


def choose_config(problem: Problem, size: Size) -> Config:
    """Pick the kernels from what the host knows: the average number of rows per expert.

    >>> problem = Problem("fused_moe", halfbyte.Target.of("cpu"), halfbyte.NVFP4, "hopper", "bf16", num_experts=256, hidden=7168, intermediate=2048)
    >>> [choose_config(problem, Size(num_tokens, 8)).max_rows for num_tokens in (1, 64, 1024, 4096)]
    [8, 8, 64, 160]
    >>> problem = problem._replace(activations="fp8")
    >>> choose_config(problem, Size(512, 8)).fp8, choose_config(problem, Size(1024, 8)).fp8
    (False, True)
    """
    average = size.num_rows / max(1, problem.num_experts)
    if takes_fp8(problem) and (problem.batch_invariant or _gains_from_fp8(problem, size)):
        limits = ((24, FP8_TINY), (72, FP8_SMALL), (112, FP8_MEDIUM), (160, FP8_LARGE))
        return next((config for limit, config in limits if average <= limit), FP8_HUGE)
    if not problem.batch_invariant:
        is_small = size.num_tokens <= MAX_DIRECT_TOKENS and size.num_rows <= MAX_DIRECT_SLOTS
        if average <= 12 and is_small and problem.op == "fused_moe":
            return DIRECT
        if average <= 4:
            return DECODE
    return next((config for limit, config in ((24, TINY), (48, SMALL), (80, MEDIUM), (240, LARGE)) if average <= limit), HUGE)


def rounds_weights(problem: Problem, size: Size) -> bool:
    config = choose_config(problem, size)
    return isinstance(config, PrefillConfig) and config.fp8


def takes_fp8(problem: Problem) -> bool:
    """Whether fp8 tensor cores can multiply: hidden states that come in another format than one-scale fp8 would have to be rounded again."""
    return problem.activations == "fp8" and problem.quantized in (None, "fp8")


def _gains_from_fp8(problem: Problem, size: Size) -> bool:
    assert problem.format is not None
    if problem.layout != "hopper_fp8":
        return size.num_rows > MIN_FP8_ROWS[problem.format] * problem.num_experts
    row_tiles = min((2 if problem.gated else 1) * -(-problem.intermediate // 64), -(-problem.hidden // 64))  # of the projection with fewer
    return size.num_tokens >= MIN_FP8_TOKENS or size.num_rows * row_tiles >= MIN_FP8_TILES
