"""`route`: logits to the experts of each token and their weights."""

from __future__ import annotations

from typing import NamedTuple

import torch

from halfbyte.arguments import check_integers, check_name, check_numbers, check_tensors
from halfbyte.device import Target
from halfbyte.errors import InputError
from halfbyte.kernels.problem import Problem
from halfbyte.kernels.reference.routing import METHODS
from halfbyte.kernels.table import choose

INVARIANT_ROWS = 64
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Routing(NamedTuple):
    """`ids` int32 [T, k] and `weights` fp32 [T, k]: the experts of each token, best first, and what their outputs are multiplied by."""

    ids: torch.Tensor
    weights: torch.Tensor


def route(
    logits: torch.Tensor,
    top_k: int,
    method: str = "renormalize",
    *,
    bias: torch.Tensor | None = None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    scale: float = 1.0,
) -> Routing:
    """Pick `top_k` experts for each token; the methods and their formulas are in `kernels.reference.routing`.

    Everything is computed in fp32. Equal keys go to the lowest expert id. A NaN logit ranks above every number and makes the token's weights NaN:
    the error stays visible in the output, without a check that would stop a GPU.

    Args:
        logits: [T, E], fp32 (bf16 and fp16 are accepted, but rounded logits change the selection of a few per cent of the tokens).
        top_k: experts per token, 1..E.
        method: "default", "renormalize", "deepseek_v3", "llama4", "renormalize_naive", "topk", "sigmoid_renorm", "minimax2", "sigmoid",
            "topk_sigmoid" or "deepseek_v4".
        bias: [E], any float dtype, read in fp32: added for the selection only ("deepseek_v3", "minimax2", "deepseek_v4").
        num_groups, top_k_groups: "deepseek_v3" only: of `num_groups` equal groups of experts keep `top_k_groups`.
        scale: multiplies every weight (`routed_scaling_factor`).

    Raises:
        InputError: an argument does not fit, or belongs to another method.

    >>> routing = halfbyte.route(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), 2)
    >>> routing.ids.tolist(), routing.weights.tolist()
    ([[1, 2]], [[0.5, 0.5]])
    """
    if torch.compiler.is_compiling():
        return Routing(*torch.ops.halfbyte.route(logits, top_k, method, bias, num_groups, top_k_groups, scale))
    return Routing(*run(logits, top_k, method, bias, num_groups, top_k_groups, scale))


def run(
    logits: torch.Tensor, top_k: int, method: str, bias: torch.Tensor | None, num_groups: int, top_k_groups: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route` without regard to torch.compile."""
    check(logits, top_k, method, bias, num_groups, top_k_groups, scale)
    kernel = choose(Problem("route", Target.of(logits.device), num_experts=logits.shape[1], num_groups=num_groups))
    return kernel.run(logits, top_k, method, bias=bias, num_groups=num_groups, top_k_groups=top_k_groups, scale=float(scale))


def check(logits: torch.Tensor, top_k: int, method: str, bias: torch.Tensor | None, num_groups: int, top_k_groups: int, scale: float) -> None:
    """Raise what `route` raises for these arguments."""
    where = "route"
    check_tensors(where, logits=logits, **({} if bias is None else {"bias": bias}))
    check_name("routing method", method, METHODS, where)
    check_integers(where, 1, top_k=top_k, num_groups=num_groups, top_k_groups=top_k_groups)
    check_numbers(where, scale=scale)
    rule = METHODS[method]
    if logits.ndim != 2 or logits.dtype not in _FLOATS:
        raise InputError("logits do not fit", where=where, given=f"{logits.dtype} {tuple(logits.shape)}", needed="float [T, E]")
    num_experts = logits.shape[1]
    if top_k > num_experts:
        raise InputError("top_k does not fit the logits", where=where, given=top_k, needed=f"1 to {num_experts} experts")
    if rule.max_top_k is not None and top_k > rule.max_top_k:
        raise InputError(f"{method} picks fewer experts", where=where, given=f"top_k {top_k}", needed=rule.max_top_k, next_step="use topk_sigmoid")
    if bias is not None:
        if not rule.has_bias:
            biased = " or ".join(name for name, other in METHODS.items() if other.has_bias)
            raise InputError(f"{method} has no selection bias", where=where, given=tuple(bias.shape), needed=f"bias=None, or method {biased}")
        if bias.shape != (num_experts,) or not bias.is_floating_point() or bias.device != logits.device:
            given = f"{bias.dtype} {tuple(bias.shape)} on {bias.device}"
            raise InputError("the bias does not fit the logits", where=where, given=given, needed=f"float ({num_experts},) on {logits.device}")
    if (num_groups, top_k_groups) == (1, 1):
        return
    if not rule.has_groups:
        raise InputError(f"{method} has no expert groups", where=where, given=f"{num_groups} groups", needed="1, or method deepseek_v3")
    if num_experts % num_groups:
        raise InputError("groups do not divide the experts", where=where, given=f"{num_groups} groups", needed=f"a divisor of {num_experts}")
    if top_k_groups > num_groups or top_k > top_k_groups * (num_experts // num_groups):
        given = f"{top_k_groups} of {num_groups} groups of {num_experts // num_groups}, top_k {top_k}"
        raise InputError(
            "the kept groups cannot supply top_k experts", where=where, given=given, needed="top_k_groups <= num_groups, enough for top_k"
        )


def invariant_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, H] @ weight [E, H]^T, for router logits whose bits do not depend on the other tokens."""
    return torch.ops.halfbyte.invariant_linear(x, weight) if torch.compiler.is_compiling() else run_invariant_linear(x, weight)


def run_invariant_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`invariant_linear` without regard to torch.compile.

    Libraries choose a kernel by the number of rows, so that is always the same here: one on a CPU, whose kernels treat the last rows differently,
    blocks filled up with zeros on a GPU, where all rows of a product take the same steps.
    """
    rows = 1 if x.device.type == "cpu" else INVARIANT_ROWS
    result = torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    for block, logits in zip(x.split(rows), result.split(rows), strict=True):
        filled = torch.nn.functional.pad(block, (0, 0, 0, rows - len(block)))
        logits.copy_(torch.nn.functional.linear(filled, weight)[: len(block)])
    return result
