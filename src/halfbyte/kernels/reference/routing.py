"""Routing: which k experts a token goes to, and with what weights. Plain torch, any device; the definition of `halfbyte.route`.

    score  = MAPS[score](logit)                     [T, E] fp32
    key    = score + bias                           (methods with a bias; experts outside the kept groups become -inf)
    ids    = the k largest keys, equal keys by lowest expert id
    weight = scale * MAPS[weigh](score[ids])        the bias selects, it never weighs

| method | score | weights from the k scores | who |
|---|---|---|---|
| default | softmax over all experts | as they are | Qwen2-MoE, DBRX |
| renormalize, renormalize_naive | logit | softmax over the k | Mixtral, Qwen3-MoE, gpt-oss |
| deepseek_v3 | sigmoid; groups by the sum of their 2 best keys | s / (sum s + 1e-20) | DeepSeek-V3, Kimi-K2, GLM-4.5 |
| llama4 | logit, k = 1 | sigmoid | Llama 4, which multiplies the expert's *input* by it |
| topk | logit | as they are | |
| sigmoid_renorm | sigmoid | s / max(sum s, 1e-20) | |
| minimax2 | sigmoid | s / (sum s + 1e-20) | MiniMax-M2 |
| sigmoid | sigmoid | as they are | |
| topk_sigmoid | logit | sigmoid | |
| deepseek_v4 | sqrt(softplus) | s / (sum s + 1e-20) | DeepSeek-V4 |

The first ten carry FlashInfer's names. Softmax over all experts, top-k, then renormalise is softmax over the k: `renormalize_naive` is computed so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from halfbyte.kernels.problem import Problem, Support, plain_torch

Map = Callable[[torch.Tensor], torch.Tensor]


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return x.softmax(dim=-1)


def _sqrt_softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.softplus(x).sqrt()


def _normalize(scores: torch.Tensor) -> torch.Tensor:
    return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)


def _normalize_clamped(scores: torch.Tensor) -> torch.Tensor:
    return scores / scores.sum(dim=-1, keepdim=True).clamp(min=1e-20)


MAPS: dict[str, Map] = {
    "same": lambda x: x,
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": _sqrt_softplus,
    "normalize": _normalize,
    "normalize_clamped": _normalize_clamped,
}


@dataclass(frozen=True)
class Method:
    """One row of the table above: names of `MAPS`, for every kernel, and what else belongs to the method."""

    score: str
    weigh: str = "same"
    has_bias: bool = False
    has_groups: bool = False
    max_top_k: int | None = None


METHODS: dict[str, Method] = {
    "default": Method("softmax"),
    "renormalize": Method("same", "softmax"),
    "deepseek_v3": Method("sigmoid", "normalize", has_bias=True, has_groups=True),
    "llama4": Method("same", "sigmoid", max_top_k=1),
    "renormalize_naive": Method("same", "softmax"),
    "topk": Method("same"),
    "sigmoid_renorm": Method("sigmoid", "normalize_clamped"),
    "minimax2": Method("sigmoid", "normalize", has_bias=True),
    "sigmoid": Method("sigmoid"),
    "topk_sigmoid": Method("same", "sigmoid"),
    "deepseek_v4": Method("sqrt_softplus", "normalize", has_bias=True),
}


def supports(problem: Problem) -> Support:
    return plain_torch(problem)


def run(
    logits: torch.Tensor,
    top_k: int,
    method: str,
    *,
    bias: torch.Tensor | None = None,
    num_groups: int = 1,
    top_k_groups: int = 1,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids int32 [T, k] and weights fp32 [T, k] for logits [T, E]; `moe.routing.route` checks the arguments."""
    rule = METHODS[method]
    scores = MAPS[rule.score](logits.float())
    keys = scores if bias is None else scores + bias.float()
    if num_groups > 1:
        keys = _mask_groups(keys, num_groups, top_k_groups)
    ids = _largest(keys, top_k)
    weights = MAPS[rule.weigh](scores.gather(-1, ids))
    return ids.int(), weights if scale == 1.0 else weights * scale


def _largest(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest keys in descending order, the lowest index first among equals (torch.topk leaves ties open)."""
    return keys.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _mask_groups(keys: torch.Tensor, num_groups: int, top_k_groups: int) -> torch.Tensor:
    """Keep the groups whose two best keys sum highest. The rest becomes -inf: 0 would beat kept experts whose key is negative."""
    grouped = keys.unflatten(-1, (num_groups, -1))
    group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(group_score, dtype=torch.bool).scatter_(-1, _largest(group_score, top_k_groups), True)
    return grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
