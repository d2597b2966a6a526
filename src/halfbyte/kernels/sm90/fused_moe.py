"""The mixture-of-experts layer on Hopper: FP4 weights, activations in any format. Equation and semantics: `kernels.reference.fused_moe`.

    up to 8 tokens        GEMM1, GEMM2 (both direct), combine
    few tokens an expert  permute, GEMM1, GEMM2 (decode), combine
    many                  permute, gather, GEMM1, GEMM2 (prefill), combine
    many, fp8             permute, quantise tokens, GEMM1, quantise rows, GEMM2 (prefill on fp8 tensor cores), combine

Activations "mxfp8" and "nvfp4", and "fp8" up to `MIN_FP8_ROWS` rows an expert (where words are coded for fp8, with one or two tokens, unless experts
are large), where memory limits and fp8 tensor cores gain nothing: the W4A16 kernels on quantised activations, which bf16 holds exactly, and exact
weights. Two more launches, `encode_rows` before each GEMM, which move 4 T H and 4 R I bytes. That is never faster than "bf16": it is for the numbers
that a Blackwell GPU would give. Above, with "fp8", weights are rounded to e4m3 too (`weights.hopper.rounding_fp8`): `rounds_weights`.

h gets one scale a row, which needs the largest value of the whole row and so a pass of its own. It moves 3 R I bytes where GEMM2 computes 2 R H I
operations: at 3 TB/s and 1.3 Pflop/s 650 / H of GEMM2's time, 3 % of a DeepSeek-R1 layer and 10 % of a Qwen3-30B one. A scale for every 64 columns
would save 2 of the 3 bytes and cost GEMM2 a multiply-add on every accumulator at every step: at 128 tokens 64 of them a thread, twice the decoding.

Nothing synchronises with the host, and launch shapes depend on the number of tokens alone, so a captured CUDA graph serves any routing. Every sum has
a fixed order: equal inputs give equal bits. Consecutive kernels overlap by programmatic dependent launch, except around prefill GEMMs.

Workspace of a call, from torch's allocator: with R = T * k rows, 2 R I bytes, 2 R H bytes (4 R H for direct), and for prefill 2 R H more
(fp8: R H and R I).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from halfbyte.device import Target
from halfbyte.errors import UnsupportedError
from halfbyte.formats import MXFP4, NVFP4, BlockFormat
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.gluon_compat import fix_cache_keys, tma_descriptor
from halfbyte.kernels.shared.combine import block_size, combine
from halfbyte.kernels.shared.encode_rows import encode_rows
from halfbyte.kernels.shared.sort import Items, permute, variant
from halfbyte.kernels.sm90.epilogue import KINDS
from halfbyte.kernels.sm90.gather import gather
from halfbyte.kernels.sm90.gemm_decode import NUM_WARPS, ROWS, grouped_gemm_w4a16_decode
from halfbyte.kernels.sm90.gemm_prefill import grouped_gemm_prefill
from halfbyte.kernels.sm90.quantize_rows import quantize_rows, quantize_tokens
from halfbyte.weights.hopper.bits import WordsFor
from halfbyte.weights.hopper.layout import HopperExperts, HopperMatrix, padded_size

fix_cache_keys(grouped_gemm_w4a16_decode, grouped_gemm_prefill)

MAX_DIRECT_TOKENS = 8
MAX_DIRECT_SLOTS = 64

# The direct kernel divides the columns of w2 among this many programs where there are that many columns. One token takes 22 to 27 % less with
# Mixtral's 14,336 and 10 % less with gpt-oss' 2,880, but 6 % more with DeepSeek-R1's 2,048 (H100 and H200, 2026-11-26).
W2_PARTS = 4
MIN_COLUMNS_OF_PARTS = 2816

# Of a thread. With 64 a multiprocessor holds eight programs: two tokens of DeepSeek-R1, whose w13 has 7.8 for each, take 101 us, with 66 (seven
# programs) 116. Those of the direct w2 start while w13 is at work: with 64 one token takes 61.8 us, with 72 (seven) 60.0 (H200, 2026-11-27).
DECODE_REGISTERS = 64
WIDE_REGISTERS = 72  # of the direct w2, and of the direct w13 with quantised activations, which would keep some in memory


@dataclass(frozen=True)
class DecodeConfig:
    """Whether programs find their rows in `ids`, or in the work list of `permute`. See `grouped_gemm_w4a16_decode`."""

    direct: bool


@dataclass(frozen=True)
class PrefillConfig:
    """`sizes`: token counts of a tile, each (first, second accumulator). A consumer has `tiles` tiles of 64 weight rows. x is copied in boxes of
    `box` rows and `step_k` columns, in `x_stages` stages, weights in `w_stages` stages of 256 columns; `fp8`: x is e4m3. See
    `grouped_gemm_prefill`."""

    sizes: tuple[tuple[int, int], ...]
    consumers: int
    step_k: int
    x_stages: int
    w_stages: int
    box: int
    registers: int
    max_registers: int
    tiles: int = 1
    fp8: bool = False

    @property
    def max_rows(self) -> int:
        return sum(self.sizes[-1])


# Measured on an H200, 2026-11-26 (docs/kernels.md): many consumers hide the latency of decoding for few tokens, two row tiles a consumer halve the
# reads of x, and large tiles amortise decoding.
TINY = PrefillConfig(((16, 0), (32, 0)), consumers=4, step_k=256, x_stages=4, w_stages=4, box=16, registers=112, max_registers=96)
SMALL = PrefillConfig(((16, 0), (32, 0), (64, 0)), consumers=4, step_k=128, x_stages=6, w_stages=3, box=16, registers=112, max_registers=96)
MEDIUM = PrefillConfig(
    ((32, 0), (64, 0), (64, 16), (64, 32)),
    consumers=2, tiles=2, step_k=128, x_stages=4, w_stages=3, box=16, registers=240, max_registers=168,
)  # fmt: skip
LARGE = PrefillConfig(
    ((64, 0), (128, 0), (128, 16), (128, 32)),
    consumers=2, tiles=2, step_k=64, x_stages=6, w_stages=2, box=32, registers=240, max_registers=168,
)  # fmt: skip
HUGE = PrefillConfig(
    ((64, 0), (128, 0), (128, 64), (256, 0), (256, 16), (256, 32)),
    consumers=2, step_k=64, x_stages=4, w_stages=2, box=32, registers=240, max_registers=168,
)  # fmt: skip

# Decoding a tile for fp8 keeps the integer pipe busy for about 90 cycles of a scheduler, or 60 where words are coded for it, and reading it from
# memory takes about as long; the product takes 1 cycle a token, that of bf16 2. Measured beside the kernels for bf16: docs/activations.md.
FP8_TINY = replace(TINY, fp8=True)
FP8_SMALL = PrefillConfig(
    ((32, 0), (64, 0), (64, 32)),
    consumers=4, step_k=256, x_stages=4, w_stages=3, box=32, registers=112, max_registers=96, fp8=True,
)  # fmt: skip
FP8_MEDIUM = PrefillConfig(
    ((32, 0), (64, 0), (64, 32), (128, 0)),
    consumers=3, step_k=128, x_stages=6, w_stages=3, box=32, registers=160, max_registers=128, fp8=True,
)  # fmt: skip
FP8_LARGE = PrefillConfig(
    ((64, 0), (128, 0), (128, 32), (128, 64)),
    consumers=3, step_k=128, x_stages=5, w_stages=3, box=64, registers=160, max_registers=128, fp8=True,
)  # fmt: skip
FP8_HUGE = PrefillConfig(
    ((64, 0), (128, 0), (128, 64), (256, 0), (256, 16), (256, 32)),
    consumers=2, step_k=128, x_stages=4, w_stages=3, box=32, registers=240, max_registers=168, fp8=True,
)  # fmt: skip
# Rows an expert, on average, from which on fp8 tensor cores gain enough with words for bf16: weights in NVFP4 are rounded for it, those in MXFP4 are
# not (`weights.hopper.rounding_fp8`). Words for fp8 take the kernels for bf16 8 to 25 % longer, and fp8 tensor cores gain as soon as there are tokens
# enough, or tiles of 64 weight rows for all multiprocessors: with 1 and 2 tokens FP8_TINY takes 8 and 15 % less time than the direct kernel for
# DeepSeek-R1 (512 tiles a token), but for Qwen3-235B (384) 8 % more and as long, for Qwen3-30B (192) 35 and 20 % more (H200, MXFP4, 2026-11-28).
MIN_FP8_ROWS = {NVFP4: 24, MXFP4: 12}
MIN_FP8_TOKENS, MIN_FP8_TILES = 3, 512


def choose_config(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    activations: ActivationFormat = "bf16",
    format: BlockFormat = NVFP4,
    words_for: WordsFor = "bf16",
    *,
    row_tiles: int = 0,
    batch_invariant: bool = False,
) -> DecodeConfig | PrefillConfig:
    """Pick the kernels from what the host knows: the average number of rows an expert.

    `format`, `words_for` and `row_tiles` (an expert's, in the projection with fewer) of the weights matter for fp8 only. `batch_invariant`: among
    those that add up a token's products in one order, which are the prefill kernels of one kind of activations.

    >>> choose_config(1, 8, 256).direct, choose_config(64, 8, 256).direct, choose_config(4096, 8, 256).max_rows
    (True, False, 160)
    >>> choose_config(512, 8, 256, "fp8").fp8, choose_config(1024, 8, 256, "fp8").fp8
    (False, True)
    """
    rows = num_tokens * top_k
    average = rows / num_experts
    enough = num_tokens >= MIN_FP8_TOKENS or rows * row_tiles >= MIN_FP8_TILES
    gains_from_fp8 = enough if words_for == "fp8" else average > MIN_FP8_ROWS[format]
    if activations == "fp8" and (gains_from_fp8 or batch_invariant):
        return next(
            (config for limit, config in ((24, FP8_TINY), (72, FP8_SMALL), (112, FP8_MEDIUM), (160, FP8_LARGE)) if average <= limit), FP8_HUGE
        )
    if not batch_invariant and average <= 12 and num_tokens <= MAX_DIRECT_TOKENS and rows <= MAX_DIRECT_SLOTS:
        return DecodeConfig(direct=True)
    if not batch_invariant and average <= 4:
        return DecodeConfig(direct=False)
    for limit, config in ((24, TINY), (48, SMALL), (80, MEDIUM), (240, LARGE)):
        if average <= limit:
            return config
    return HUGE


def _chosen(
    num_tokens: int, top_k: int, experts: HopperExperts, activations: ActivationFormat, batch_invariant: bool = False
) -> DecodeConfig | PrefillConfig:
    row_tiles = min(experts.w13.row_tiles, experts.w2.row_tiles)
    return choose_config(
        num_tokens, top_k, experts.num_experts, activations, experts.format, experts.words_for, row_tiles=row_tiles, batch_invariant=batch_invariant
    )


def rounds_weights(num_tokens: int, top_k: int, experts: HopperExperts, activations: ActivationFormat) -> bool:
    """Whether a call multiplies by weights rounded to e4m3 (`weights.hopper.rounding_fp8.round_to_fp8`) instead of by the FP4 values."""
    config = _chosen(num_tokens, top_k, experts, activations)
    return isinstance(config, PrefillConfig) and config.fp8


def warm_up_calls(
    experts: HopperExperts, top_k: int, max_tokens: int, activations: ActivationFormat, batch_invariant: bool
) -> list[tuple[list[int], dict[str, Any]]]:
    """(numbers of tokens, options) of calls, as small as possible, that launch every kernel that calls of up to `max_tokens` tokens launch."""
    num_experts, hidden = experts.num_experts, experts.hidden
    calls: dict[DecodeConfig | PrefillConfig, list[int]] = {}
    seen: set[Any] = set()
    for num_tokens in range(1, max_tokens + 1):
        config = _chosen(num_tokens, top_k, experts, activations, batch_invariant)
        numbers = calls.setdefault(config, [])
        for launch in _small_launches(num_tokens, top_k, num_experts, hidden, config) - seen:
            seen.add(launch)
            numbers.append(next(n for n in range(1, num_tokens + 1) if launch in _small_launches(n, top_k, num_experts, hidden, config)))
    return [(sorted(set(numbers)) or [1], {"config": config}) for config, numbers in calls.items()]


def _small_launches(num_tokens: int, top_k: int, num_experts: int, hidden: int, config: DecodeConfig | PrefillConfig) -> set[Any]:
    """What the kernels around the GEMMs are compiled for, where that depends on the number of tokens."""
    is_decode = isinstance(config, DecodeConfig)
    is_direct = is_decode and config.direct
    combined = (is_direct, block_size(num_tokens, hidden))
    max_rows = ROWS.value if is_decode else config.max_rows
    return {combined} if is_direct else {combined, (max_rows, *variant(num_tokens * top_k, num_experts, max_rows))}


def fused_moe(
    hidden: torch.Tensor,
    experts: HopperExperts,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    activations: ActivationFormat = "bf16",
    expert_offset: int = 0,
    out: torch.Tensor | None = None,
    batch_invariant: bool = False,
    config: DecodeConfig | PrefillConfig | None = None,
) -> torch.Tensor:
    """hidden [T, H] bf16, ids int [T, k], weights float [T, k] to [T, H]; `moe.functional.fused_moe` checks the arguments.

    Raises:
        UnsupportedError: hidden is not bf16, or a gradient is asked for.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
        raise UnsupportedError(
            "the Hopper kernels have no backward pass", where="fused_moe", next_step="run under torch.no_grad(), or prepare(w, 'canonical')"
        )
    if hidden.dtype != torch.bfloat16:
        raise UnsupportedError(
            "the Hopper kernels multiply bf16", where="fused_moe", given=hidden.dtype, needed=torch.bfloat16, next_step="pass hidden.bfloat16()"
        )
    if out is None:
        out = torch.empty_like(hidden)
    num_tokens, top_k = ids.shape
    if num_tokens == 0:
        return out
    if config is None:
        config = _chosen(num_tokens, top_k, experts, activations, batch_invariant)
    hidden, ids, weights = hidden.contiguous(), ids.contiguous(), weights.contiguous()
    run = _decode if isinstance(config, DecodeConfig) else _prefill_fp8 if config.fp8 else _prefill
    y, row_of_slot = run(hidden, experts, ids, expert_offset, config, activations)
    result = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    combine(y, row_of_slot, ids, weights, result, expert_offset, experts.num_experts, launch_early=True)
    return out if result is out else out.copy_(result)


def _decode(
    hidden: torch.Tensor, experts: HopperExperts, ids: torch.Tensor, expert_offset: int, config: DecodeConfig, activations: ActivationFormat
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows, device = ids.numel(), hidden.device
    h = torch.empty((rows, padded_size(experts.intermediate)), dtype=torch.bfloat16, device=device)
    parts = W2_PARTS if config.direct and experts.intermediate >= MIN_COLUMNS_OF_PARTS else 1
    y = torch.empty((parts * rows, experts.hidden), dtype=torch.float32 if config.direct else torch.bfloat16, device=device)
    items = None if config.direct else permute(ids, expert_offset, experts.num_experts, ROWS.value, launch_early=True)
    x, x_scale = encode_rows(hidden, activations, experts.w13_input_scale, launch_early=True)
    _decode_gemm(x, x_scale, experts.w13, h, experts, ids, items, expert_offset, is_w13=True)
    _, h_scale = encode_rows(h, activations, experts.w2_input_scale, out=h, launch_early=True)
    _decode_gemm(h, h_scale, experts.w2, y, experts, ids, items, expert_offset, is_w13=False)
    return y, None if items is None else items.row_of_slot


def _decode_gemm(
    x: torch.Tensor, x_scale: torch.Tensor | None, matrix: HopperMatrix, y: torch.Tensor, experts: HopperExperts, ids: torch.Tensor,
    items: Items | None, expert_offset: int, *, is_w13: bool,
) -> None:  # fmt: skip
    work = ids.numel() if items is None else items.items.shape[0]
    token_of_row, item_list, num_items = (ids, ids, ids) if items is None else (items.token_of_row, items.items, items.num_items)
    k = experts.hidden if is_w13 else experts.intermediate
    parts = y.shape[0] // ids.numel()
    grouped_gemm_w4a16_decode[(work * matrix.row_tiles, parts)](
        x, x if x_scale is None else x_scale, matrix.words, matrix.scales, *_optional(matrix), y, ids, item_list, num_items, token_of_row,
        ids.shape[0], expert_offset, experts.num_experts,
        ids.shape[1], k, x.stride(0), matrix.row_tiles, y.shape[1], y.shape[1], experts.format == NVFP4, experts.words_for, is_w13,
        *_activation(experts), matrix.bias is not None, x_scale is not None, items is None, parts, True,
        num_warps=NUM_WARPS, launch_pdl=True, maxnreg=WIDE_REGISTERS if items is None and (x_scale is not None or not is_w13) else DECODE_REGISTERS,
    )  # fmt: skip


def _prefill(
    hidden: torch.Tensor, experts: HopperExperts, ids: torch.Tensor, expert_offset: int, config: PrefillConfig, activations: ActivationFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    items, h, y = _prefill_workspace(hidden, experts, ids, expert_offset, config)
    codes, scales = encode_rows(hidden, activations, experts.w13_input_scale, launch_early=True)
    x, x_scale = gather(codes, items, ids.shape[1], padded_size(experts.hidden), scales, launch_early=True)
    _prefill_gemm(x, x_scale, experts.w13, h, experts, items, config, is_w13=True)
    _, h_scale = encode_rows(h, activations, experts.w2_input_scale, in_fragment_order=True, out=h)
    _prefill_gemm(h, h_scale, experts.w2, y, experts, items, config, is_w13=False)
    return y, items.row_of_slot


def _prefill_fp8(
    hidden: torch.Tensor, experts: HopperExperts, ids: torch.Tensor, expert_offset: int, config: PrefillConfig, activations: ActivationFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    assert activations == "fp8", "this configuration has fp8 tensor cores multiply"
    items, h, y = _prefill_workspace(hidden, experts, ids, expert_offset, config)
    x, x_scale = quantize_tokens(hidden, items, ids.shape[1], padded_size(experts.hidden), launch_early=True)
    _prefill_gemm(x, x_scale, experts.w13, h, experts, items, config, is_w13=True)
    h_codes, h_scale = quantize_rows(h)
    _prefill_gemm(h_codes, h_scale, experts.w2, y, experts, items, config, is_w13=False)
    return y, items.row_of_slot


def _prefill_workspace(
    hidden: torch.Tensor, experts: HopperExperts, ids: torch.Tensor, expert_offset: int, config: PrefillConfig
) -> tuple[Items, torch.Tensor, torch.Tensor]:
    """The rows sorted by expert, and memory for h [rows, I padded] and y [rows, H]."""
    items = permute(ids, expert_offset, experts.num_experts, config.max_rows, launch_early=True)
    h = torch.empty((ids.numel(), padded_size(experts.intermediate)), dtype=torch.bfloat16, device=hidden.device)
    return items, h, torch.empty((ids.numel(), experts.hidden), dtype=torch.bfloat16, device=hidden.device)


def _prefill_gemm(
    x: torch.Tensor, x_scale: torch.Tensor | None, matrix: HopperMatrix, y: torch.Tensor, experts: HopperExperts, items: Items,
    config: PrefillConfig, *, is_w13: bool,
) -> None:  # fmt: skip
    """Multiply x, bf16 or (with a `config` for it) e4m3; rows times `x_scale` where there is one."""
    whole_runs = matrix.column_tiles % 4 == 0
    shift, multiplier, bias = _optional(matrix)
    grouped_gemm_prefill[(Target.of(x.device).num_sms,)](
        tma_descriptor(x, config.box, config.step_k), tma_descriptor(matrix.words.view(-1, 32), 64 if whole_runs else 16, 32),
        tma_descriptor(matrix.scales.view(torch.int32).view(-1, matrix.scales.shape[-1] // 4), 8, matrix.scales.shape[-1] // 4),
        shift, multiplier, matrix.row_exponent, multiplier if x_scale is None else x_scale, bias, y, items.items, items.num_items,
        matrix.row_tiles, matrix.column_tiles, y.shape[1], y.shape[1], experts.format == NVFP4, experts.words_for, x_scale is not None,
        is_w13, *_activation(experts), matrix.bias is not None, config.sizes, config.consumers, config.tiles, config.x_stages, config.w_stages,
        config.registers,
        num_warps=4, maxnreg=config.max_registers,
    )  # fmt: skip


def _optional(matrix: HopperMatrix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shift, multiplier and bias; what the matrix does not have is never read and stands in as the multiplier."""
    multiplier = matrix.multiplier
    return multiplier if matrix.shift is None else matrix.shift, multiplier, multiplier if matrix.bias is None else matrix.bias


def _activation(experts: HopperExperts) -> tuple[Any, ...]:
    activation = experts.activation
    return KINDS[activation.kind], activation.alpha, activation.beta, activation.limit or 0.0
