"""Which kernels serve which numbers of tokens on Hopper, and with what tiles. Plain Python: nothing here needs Triton or a device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

from halfbyte.formats import MXFP4, NVFP4
from halfbyte.kernels.problem import Problem, Size

sources = tuple(
    f"halfbyte.{module}"
    for module in (
        "kernels.sm90.gemm_decode",
        "kernels.sm90.decode_spec",
        "kernels.sm90.rows_in_shared",
        "kernels.sm90.gemm_prefill",
        "kernels.sm90.prefill_spec",
        "kernels.sm90.products",
        "kernels.sm90.operands",
        "kernels.sm90.rings",
        "kernels.sm90.tiles",
        "kernels.sm90.epilogue",
        "weights.hopper.dequant_bf16",
        "weights.hopper.dequant_fp8",
    )
)  # what the products are made of; the kernels around them take as long whatever the configuration

DECODE_ROWS = 8  # of x per program of the decode kernel
MAX_DIRECT_TOKENS = 8
MAX_DIRECT_SLOTS = 64

# A tile begins with words that nothing was in flight for, and ends without registers for those of the next: with fewer columns than 1,536 that costs
# Qwen3-30B (TINY, w2 of 768) 1 % of a layer. With more, layers take 0 to 5 % less, equal bits (H200, 2026-11-30). Tiles of 64 columns.
MIN_TILES_AHEAD = 24


@dataclass(frozen=True)
class DecodeConfig:
    """Whether programs find their rows in the expert ids themselves, or in the work list of `sort`. See `gemm_decode`."""

    direct: bool

    def __str__(self) -> str:
        return _NAMES.get(self) or repr(self)

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
        words_ahead: weights are loaded from shared memory a run of 256 columns ahead, where the matrix has `MIN_TILES_AHEAD`.
        product_tiles: tiles of 64 columns that are then multiplied at once: 1, or as many as a stage of x has.
        one_ring: 256 columns of x and of the weights are filled and given back together, so x has as many stages as the weights.
        warp_rows: tiles of at most so many tokens are multiplied by mma.sync, one warp apart from the others; only with `one_ring`.
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
    words_ahead: bool = True
    product_tiles: int = 1
    one_ring: bool = False
    warp_rows: int = 0

    def __str__(self) -> str:
        return _NAMES.get(self) or repr(self)

    @property
    def max_rows(self) -> int:
        return sum(self.sizes[-1])


Config: TypeAlias = DecodeConfig | PrefillConfig

DIRECT, DECODE = DecodeConfig(direct=True), DecodeConfig(direct=False)

# Measured on an H200, 2026-11-26 (docs/kernels.md): many consumers hide the latency of decoding for few tokens, two row tiles per consumer halve the
# reads of x, and large tiles amortise decoding. SMALL and FP8_WIDE as of 2026-11-30 (docs/tuning.md). A product of 256 columns needs 64 registers for
# its operand (fp8: 32), four times those of one tile. FP8_SMALL, with accumulators for 96 tokens, has no room: words ahead cost it 1 to 2 %.
# LARGE, with two for 160, would keep 136 bytes per thread in memory (gpt-oss, Triton 3.9); DeepSeek-R1 gained 1 %. One ring takes TINY and FP8_SMALL
# 1 % less time, up to 3; SMALL 2 % more with gpt-oss and 1 % less with others. Products by warps leave out what a warpgroup waits for: with 8 tokens
# DeepSeek-R1 takes 3 to 7 % less; with 16 they are slower (2026-12-01).
TINY = PrefillConfig(
    ((16, 0), (32, 0)),
    consumers=4, step_k=256, x_stages=4, w_stages=4, box=16, consumer_registers=112, launch_registers=96, product_tiles=4, one_ring=True,
)  # fmt: skip
MICRO = replace(TINY, sizes=((8, 0), *TINY.sizes), warp_rows=8)
SMALL = PrefillConfig(
    ((16, 0), (32, 0), (64, 0)), consumers=4, step_k=256, x_stages=3, w_stages=3, box=16, consumer_registers=112, launch_registers=96
)
MEDIUM = PrefillConfig(
    ((32, 0), (64, 0), (64, 16), (64, 32)),
    consumers=2, row_tiles_per_consumer=2, step_k=128, x_stages=4, w_stages=3, box=16, consumer_registers=240, launch_registers=168,
)  # fmt: skip
LARGE = PrefillConfig(
    ((64, 0), (128, 0), (128, 16), (128, 32)),
    consumers=2, row_tiles_per_consumer=2, step_k=64, x_stages=6, w_stages=2, box=32, consumer_registers=240, launch_registers=168, words_ahead=False,
)  # fmt: skip
HUGE = PrefillConfig(
    ((64, 0), (128, 0), (128, 64), (256, 0), (256, 16), (256, 32)),
    consumers=2, step_k=64, x_stages=4, w_stages=2, box=32, consumer_registers=240, launch_registers=168,
)  # fmt: skip

# Decoding a tile for fp8 keeps the integer pipe busy for about 90 cycles of a scheduler, or 60 where words are coded for it, and reading it from
# memory takes about as long; the product takes 1 cycle a token, that of bf16 2. Measured beside the kernels for bf16: docs/activations.md.
FP8_TINY = replace(TINY, fp8=True)
FP8_WIDE = replace(FP8_TINY, sizes=SMALL.sizes)
FP8_SMALL = PrefillConfig(
    ((32, 0), (64, 0), (64, 32)),
    consumers=4, step_k=256, x_stages=3, w_stages=3, box=32, consumer_registers=112, launch_registers=96, fp8=True, words_ahead=False, one_ring=True,
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
# not (`weights.hopper.rounding_fp8`). Words for fp8 take the kernels for bf16 8 to 25 % longer, so fp8 tensor cores gain as soon as there are weights
# enough to read that the two launches more do not count: 400 million, of the experts that tokens chose; 580 where the direct kernel can serve, which
# rounds activations itself. FP8_TINY instead of it takes, with 1 and 2 tokens of DeepSeek-R1 (352 and 705 million) 16 % more and 6 % less, with 3, 4
# and 8 of Qwen3-235B (453, 604, 1,208) 5 and 2 % more and 7 % less, with 4 and 6 of gpt-oss (398, 597) 7 % more and 6 % less, with 2 and 4 of GLM-4.5
# (377, 755) 24 % more and 2 % less, with 4 and 8 of MiniMax-M2 (453, 906) 6 % more and as long, with 2 of Mixtral (705) 20 % more (H200, 2026-11-30).
MIN_FP8_ROWS = {NVFP4: 24, MXFP4: 12}
MIN_FP8_WEIGHTS, MIN_FP8_WEIGHTS_DIRECT = 400e6, 580e6
MIN_FP8_AVERAGE = 4  # from this average on, whatever the size: decoding would read weights twice

INVARIANT = (TINY, SMALL, MEDIUM, LARGE, HUGE)  # add up a token's products in one order
PREFILL = (MICRO, *INVARIANT)
PREFILL_FP8 = (FP8_TINY, FP8_WIDE, FP8_SMALL, FP8_MEDIUM, FP8_LARGE, FP8_HUGE)
_NAMES = {value: name for name, value in globals().items() if isinstance(value, DecodeConfig | PrefillConfig)}

# The largest average of rows per expert that each serves, raced with three routings (docs/tuning.md). The host does not know how a call is routed:
# where routings want different tiles, the rule takes what loses least. So from 16 to 24 rows TINY serves, 7 % faster than SMALL if all experts are
# alike, 2 % slower with Zipf, and FP8_WIDE, 3 % slower than FP8_TINY and 7 % faster with Zipf (means of 13 models, H200, 2026-12-01). From 24 to 38
# rows FP8_WIDE takes 1.6 % less than FP8_SMALL, 2 to 5 % less on another card. Of eight experts (Mixtral) the hot one has more than two of its tiles:
# 17 % more with Zipf at 30 rows, and nothing less otherwise. With 32 experts it loses nothing; between them none was raced. Between 320 and 448 rows
# an expert has three items of about 128 for LARGE, two of about 192 for FP8_LARGE: 2 and 5 % faster than two of HUGE or FP8_HUGE.
LIMITS_INVARIANT = ((24, TINY), (56, SMALL), (80, MEDIUM), (150, LARGE), (320, HUGE), (448, LARGE), (math.inf, HUGE))
LIMITS = ((4.5, DECODE), *LIMITS_INVARIANT)
LIMITS_FP8 = (
    (16, FP8_TINY), (38, FP8_WIDE), (84, FP8_SMALL), (112, FP8_MEDIUM), (176, FP8_LARGE), (320, FP8_HUGE), (448, FP8_LARGE), (math.inf, FP8_HUGE),
)  # fmt: skip
MIN_EXPERTS_WIDE = 16
# Where an expert has so many weights. MICRO instead of DECODE, with 3 rows per expert on average, takes 3 % less to 2 % more, with Zipf 7 to 15 %
# less; instead of TINY, with 4 to 8 rows, 7 % less to 1 % more, with Mixtral 3 % more. Smaller experts have tiles that are too short: Qwen3-30B takes
# 5 % more (H200, 2026-12-01).
LIMITS_MICRO = ((2.5, DECODE), (8.5, MICRO), *LIMITS_INVARIANT)
MIN_WEIGHTS_MICRO = 20e6


def configs(problem: Problem) -> tuple[Config, ...]:
    """Every configuration that can run the problem; "expert_rows" has no direct one, because its rows are sorted."""
    exact = INVARIANT if problem.batch_invariant else (*((DIRECT,) if problem.op == "fused_moe" else ()), DECODE, *PREFILL)
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
        config = _within(LIMITS_FP8, average)
        return FP8_SMALL if config == FP8_WIDE and problem.num_experts < MIN_EXPERTS_WIDE else config
    if problem.batch_invariant:
        return _within(LIMITS_INVARIANT, average)
    if average <= 12 and takes(problem, size, DIRECT):
        return DIRECT
    return _within(LIMITS_MICRO if _weights_of_an_expert(problem) >= MIN_WEIGHTS_MICRO else LIMITS, average)


def takes(problem: Problem, size: Size, config: Config) -> bool:
    """Whether a configuration can run so many tokens, and rounds their hidden states to no other format than `problem` says."""
    if rounds_weights(config):
        return takes_fp8(problem)
    return config != DIRECT or (problem.op == "fused_moe" and size.num_tokens <= MAX_DIRECT_TOKENS and size.num_rows <= MAX_DIRECT_SLOTS)


def rivals(problem: Problem, size: Size, config: Config) -> tuple[Config, ...]:
    """What else than `config` may be fastest for so many tokens: up to two tiles smaller and two larger."""
    has_fp8 = config.fp8 if isinstance(config, PrefillConfig) else takes_fp8(problem) and problem.layout == "hopper_fp8"
    decode = () if problem.batch_invariant else tuple(other for other in (DIRECT, DECODE) if takes(problem, size, other))
    exact = INVARIANT if problem.batch_invariant else PREFILL
    order: tuple[Config, ...] = (*decode, *(PREFILL_FP8 if has_fp8 else exact))
    place = order.index(config)
    return tuple(other for other in order[max(0, place - 2) : place + 3] if other != config)


def rounds_weights(config: Config) -> bool:
    return isinstance(config, PrefillConfig) and config.fp8


def takes_fp8(problem: Problem) -> bool:
    """Whether fp8 tensor cores can multiply: hidden states that come in another format than one-scale fp8 would have to be rounded again."""
    return problem.activations == "fp8" and problem.quantized in (None, "fp8")


def _gains_from_fp8(problem: Problem, size: Size) -> bool:
    assert problem.format is not None
    if problem.layout != "hopper_fp8":
        return size.num_rows > MIN_FP8_ROWS[problem.format] * problem.num_experts
    weights = min(size.num_rows, problem.num_experts) * _weights_of_an_expert(problem)
    enough = MIN_FP8_WEIGHTS_DIRECT if takes(problem, size, DIRECT) else MIN_FP8_WEIGHTS
    return weights >= enough or size.num_rows > MIN_FP8_AVERAGE * problem.num_experts


def _weights_of_an_expert(problem: Problem) -> int:
    return (3 if problem.gated else 2) * problem.hidden * problem.intermediate


def _within(limits: tuple[tuple[float, Config], ...], average: float) -> Config:
    return next(config for limit, config in limits if average <= limit)
