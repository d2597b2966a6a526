"""Routing in one launch: logits [T, E] to the ids and the weights of the k experts of every token.

    key = score(logit) + bias;  ids = the k largest keys, equal keys by lowest id;  weight = scale * weigh(score[ids])

`logits` [T, E] fp32, bf16 or fp16, rows at any stride; `bias` [E], any float dtype, or None. Returns ids int32 [T, k] and weights fp32 [T, k].
Target: any CUDA GPU of compute capability 8.0 or newer, where a warp takes the maximum of 32 integers in one instruction (redux.sync).
Definition, and the table of methods: `kernels.reference.routing`.

Keys are mapped to int32 in the same order (NaN on top, -0 as 0). One warp holds the row of a token in registers; k times it finds the largest key,
then the lowest id that has it, and strikes that id out: two redux.sync. The winners' logits are read once more (they are in the cache) and their
scores computed again, rather than carried through the selection. A group's score is spread over its experts, so that choosing groups is the same.

Nothing is allocated but the result, nothing waits for the GPU, and the compiled kernel does not depend on T: it can be captured in a CUDA graph.
exp, division and square root are the GPU's approximations (2 ulp): two keys closer than that may come out in the other order than in torch.
Not measured yet. Compiled for sm_90 by Triton 3.9: 47 registers, no spills at E = 256 with 8 groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from halfbyte.device import current
from halfbyte.kernels.arithmetic import ceil_div, next_power_of_2
from halfbyte.kernels.problem import Problem, Size, Support, needs_capability
from halfbyte.kernels.reference.routing import METHODS

_LOWEST = tl.constexpr(-(2**31))  # below the order of every float: struck out, or padding
_HIGHEST = tl.constexpr(2**31 - 1)  # the order of NaN


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1] to fp32 precision (the GPU's log is not, near 1): 2 artanh(x / (2 + x)), whose argument is at most 1/3."""
    z = x / (2.0 + x)
    square = z * z
    series = 1.0 / 15.0
    series = series * square + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    return 2.0 * (z + z * square * series)


@triton.jit
def _score(x, SCORE: tl.constexpr):
    """The scores that depend on one logit alone; softmax is in the kernel."""
    if SCORE == "sigmoid":
        return _sigmoid(x)
    if SCORE == "sqrt_softplus":
        return tl.sqrt(tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x))))  # a NaN comes through the second term
    return x


@triton.jit
def _order_of(x):
    """int32 in the order of the fp32 values: NaN highest, whatever its sign, and -0 equal to 0."""
    bits = x.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & _HIGHEST)
    order = tl.where(order == -1, 0, order)
    return tl.where(x != x, _HIGHEST, order)


@triton.jit
def _value_of(order):
    """The fp32 value of an order; the inverse of `_order_of` for every order it returns."""
    return (order ^ ((order >> 31) & _HIGHEST)).to(tl.float32, bitcast=True)


@triton.jit
def _best(orders, ids):
    """Per row, as a column: the lowest id among those of the highest order."""
    highest = tl.max(orders, axis=1, keep_dims=True)
    return tl.min(tl.where(orders == highest, ids, _HIGHEST), axis=1, keep_dims=True)


@triton.jit
def _mask_groups(
    orders,
    groups,
    NUM_EXPERTS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_K_GROUPS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
):
    """Orders [BLOCK_T, PADDED_GROUPS * PADDED_SIZE] with the groups whose two best keys do not sum highest at -inf, padding unchanged."""
    BLOCK_T: tl.constexpr = orders.shape[0]
    grouped = tl.reshape(orders, (BLOCK_T, PADDED_GROUPS, PADDED_SIZE))
    first = tl.max(grouped, axis=2, keep_dims=True)
    if NUM_EXPERTS == NUM_GROUPS:
        group_order = first
    else:
        is_first = grouped == first
        below = tl.max(tl.where(is_first, _LOWEST, grouped), axis=2, keep_dims=True)
        second = tl.where(tl.sum(is_first.to(tl.int32), axis=2, keep_dims=True) > 1, first, below)
        group_order = _order_of(_value_of(first) + _value_of(second))
    scores = tl.reshape(tl.broadcast_to(group_order, (BLOCK_T, PADDED_GROUPS, PADDED_SIZE)), (BLOCK_T, PADDED_GROUPS * PADDED_SIZE))
    scores = tl.where(groups < NUM_GROUPS, scores, _LOWEST)
    kept = tl.zeros_like(scores)
    for _ in range(TOP_K_GROUPS):
        won = groups == _best(scores, groups)
        kept = tl.where(won, 1, kept)
        scores = tl.where(won, _LOWEST, scores)
    return tl.where((kept == 0) & (orders != _LOWEST), _order_of(tl.full(orders.shape, float("-inf"), tl.float32)), orders)


@triton.jit(do_not_specialize=["num_tokens"])
def route_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    num_tokens,
    row_stride,
    scale,
    SCORE: tl.constexpr,
    WEIGH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_K_GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    PADDED_TOP_K: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    in_batch = tokens < num_tokens
    # Every group is padded to a power of two, so that a row can be viewed as [group, expert of the group]. Ids still rise along it.
    SIZE: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    columns = tl.arange(0, PADDED_GROUPS * PADDED_SIZE)[None, :]
    groups = columns // PADDED_SIZE
    if SIZE == PADDED_SIZE:
        ids = columns
        is_expert = columns < NUM_EXPERTS
    else:
        ids = groups * SIZE + columns % PADDED_SIZE
        is_expert = (columns % PADDED_SIZE < SIZE) & (groups < NUM_GROUPS)

    x = tl.load(logits_ptr + tokens * row_stride + ids, mask=in_batch & is_expert, other=float("-inf")).to(tl.float32)
    if SCORE == "softmax":
        row_max = tl.max(x, axis=1, keep_dims=True)
        powers = tl.exp(x - row_max)
        row_sum = tl.sum(powers, axis=1, keep_dims=True)
        keys = powers / row_sum
    else:
        keys = _score(x, SCORE)
    if bias_ptr is not None:
        keys += tl.load(bias_ptr + ids, mask=is_expert, other=0.0).to(tl.float32)
    orders = tl.where(is_expert, _order_of(keys), _LOWEST)
    if NUM_GROUPS > 1:
        orders = _mask_groups(orders, groups, NUM_EXPERTS, NUM_GROUPS, TOP_K_GROUPS, PADDED_GROUPS, PADDED_SIZE)

    ranks = tl.arange(0, PADDED_TOP_K)[None, :]
    is_ranked = in_batch & (ranks < TOP_K)
    chosen = tl.zeros((BLOCK_T, PADDED_TOP_K), tl.int32)
    for rank in range(TOP_K):
        best = _best(orders, ids)
        chosen = tl.where(ranks == rank, best, chosen)
        orders = tl.where(ids == best, _LOWEST, orders)

    x = tl.load(logits_ptr + tokens * row_stride + chosen, mask=is_ranked, other=float("-inf")).to(tl.float32)
    scores = tl.exp(x - row_max) / row_sum if SCORE == "softmax" else _score(x, SCORE)
    if WEIGH == "softmax":
        powers = tl.exp(scores - tl.max(scores, axis=1, keep_dims=True))
        weights = powers / tl.sum(powers, axis=1, keep_dims=True)
    elif WEIGH == "sigmoid":
        weights = _sigmoid(scores)
    elif WEIGH == "same":
        weights = scores
    else:
        total = tl.sum(tl.where(ranks < TOP_K, scores, 0.0), axis=1, keep_dims=True)
        divisor = total + 1e-20 if WEIGH == "normalize" else tl.where(total < 1e-20, 1e-20, total)  # where, as a maximum would drop a NaN
        weights = scores / divisor
    tl.store(ids_ptr + tokens * TOP_K + ranks, chosen, mask=is_ranked)
    tl.store(weights_ptr + tokens * TOP_K + ranks, weights * scale, mask=is_ranked)


@dataclass(frozen=True)
class Config:
    """Block sizes of a launch: `block_tokens` tokens per program, the padded shape of a row, and the warps that share it."""

    block_tokens: int
    padded_groups: int
    padded_size: int
    padded_top_k: int
    num_warps: int


def supports(problem: Problem) -> Support:
    return needs_capability(problem.target, 80) or Support.yes("Triton, one launch")


def choose_config(problem: Problem, size: Size) -> Config:
    """Return the blocks for E experts: one warp up to 1024 (nothing crosses warps then), and several tokens per program below 128.

    >>> choose_config(Problem("route", halfbyte.Target.of("cpu"), num_experts=256, num_groups=8), Size(1, 8))
    Config(block_tokens=1, padded_groups=8, padded_size=32, padded_top_k=8, num_warps=1)
    """
    return _blocks(problem.num_experts, size.top_k, problem.num_groups)


def _blocks(num_experts: int, top_k: int, num_groups: int) -> Config:
    padded_groups = next_power_of_2(num_groups)
    padded_size = next_power_of_2(num_experts // num_groups)
    width = padded_groups * padded_size
    return Config(
        block_tokens=min(16, max(1, 128 // width)),
        padded_groups=padded_groups,
        padded_size=padded_size,
        padded_top_k=next_power_of_2(top_k),
        num_warps=min(16, max(1, width // 1024)),
    )


def run(
    logits: torch.Tensor,
    top_k: int,
    method: str,
    *,
    bias: torch.Tensor | None = None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    scale: float = 1.0,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids int32 [T, k] and weights fp32 [T, k] for logits [T, E]; `moe.routing.route` checks the arguments."""
    rule = METHODS[method]
    num_tokens, num_experts = logits.shape
    ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    if num_tokens == 0:
        return ids, weights
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    if bias is not None:
        bias = (bias.float() if bias.element_size() == 1 else bias).contiguous()  # Triton cannot read fp8 on every GPU
    config = _blocks(num_experts, top_k, num_groups) if config is None else config
    with current(logits.device):
        route_kernel[(ceil_div(num_tokens, config.block_tokens),)](
            logits,
            bias,
            ids,
            weights,
            num_tokens,
            logits.stride(0),
            float(scale),
            SCORE=rule.score,
            WEIGH=rule.weigh,
            NUM_EXPERTS=num_experts,
            TOP_K=top_k,
            NUM_GROUPS=num_groups,
            TOP_K_GROUPS=top_k_groups,
            BLOCK_T=config.block_tokens,
            PADDED_GROUPS=config.padded_groups,
            PADDED_SIZE=config.padded_size,
            PADDED_TOP_K=config.padded_top_k,
            num_warps=config.num_warps,
            enable_fp_fusion=True,
        )
    return ids, weights
