"""`fused_moe` and `route` as ops of torch.library, for torch.compile: it sees what goes in and the shape of what comes out, and nothing between.

Prepared experts go in as their tensors, which the compiler then knows as inputs like any other (`PreparedExperts.update_` keeps working, CUDA graphs
read them in place), and a description of the rest, a constant of the graph (`weights.description`). Only traced code calls the ops: the
dispatcher costs more than the functions themselves need before they launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from halfbyte.device import Target
from halfbyte.errors import UnsupportedError
from halfbyte.experts import ExpertMap
from halfbyte.moe import functional, routing
from halfbyte.moe.checks import check_call
from halfbyte.weights.description import rebuild

_ARGUMENTS = (
    "Tensor hidden, Tensor[] experts, str description, str layout, Tensor topk_ids, Tensor topk_weights, str activations, SymInt expert_offset, "
    "Tensor? local_of_copy, Tensor? copies, str? backend, bool batch_invariant"
)


@torch.library.custom_op("halfbyte::fused_moe", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def fused_moe(hidden: torch.Tensor, experts: Sequence[torch.Tensor], *arguments: Any) -> torch.Tensor:
    return _run(hidden.contiguous(), experts, *arguments)  # contiguous: so is the result then, as the compiler was told


@torch.library.custom_op("halfbyte::fused_moe_out", mutates_args=("out",), schema=f"({_ARGUMENTS}, Tensor(a!) out) -> ()")
def fused_moe_out(hidden: torch.Tensor, experts: Sequence[torch.Tensor], *arguments: Any) -> None:
    _run(hidden, experts, *arguments)


def _run(
    hidden: torch.Tensor, tensors: Sequence[torch.Tensor], description: str, layout: str, topk_ids: torch.Tensor, topk_weights: torch.Tensor,
    activations: Any, expert_offset: int, local_of_copy: torch.Tensor | None, copies: torch.Tensor | None, backend: str | None,
    batch_invariant: bool, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    experts, expert_map = rebuild(description, tensors), ExpertMap(expert_offset, local_of_copy, copies)
    call = functional.Call(layout, Target.of(experts.device), activations, batch_invariant, backend, None, expert_map)
    return functional.run(hidden, experts, topk_ids, topk_weights, call, out)


@fused_moe.register_fake
def _(hidden: torch.Tensor, experts: Sequence[torch.Tensor], *arguments: Any) -> torch.Tensor:
    _check(hidden, experts, *arguments)
    return hidden.new_empty(hidden.shape)


@fused_moe_out.register_fake
def _(hidden: torch.Tensor, experts: Sequence[torch.Tensor], *arguments: Any) -> None:
    _check(hidden, experts, *arguments[:-1], out=arguments[-1])


def _check(
    hidden: torch.Tensor, tensors: Sequence[torch.Tensor], description: str, layout: str, topk_ids: torch.Tensor, topk_weights: torch.Tensor,
    activations: str, *others: Any, out: torch.Tensor | None = None,
) -> None:  # fmt: skip
    check_call(hidden, rebuild(description, tensors), topk_ids, topk_weights, activations, out)


@torch.library.custom_op(
    "halfbyte::route",
    mutates_args=(),
    schema="(Tensor logits, int top_k, str method, Tensor? bias, int num_groups, int top_k_groups, float scale) -> (Tensor, Tensor)",
)
def route(
    logits: torch.Tensor, top_k: int, method: str, bias: torch.Tensor | None, num_groups: int, top_k_groups: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return routing.run(logits, top_k, method, bias, num_groups, top_k_groups, scale)


@route.register_fake
def _(
    logits: torch.Tensor, top_k: int, method: str, bias: torch.Tensor | None, num_groups: int, top_k_groups: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    routing.check(logits, top_k, method, bias, num_groups, top_k_groups, scale)
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("halfbyte::invariant_linear", mutates_args=(), schema="(Tensor x, Tensor weight) -> Tensor")
def invariant_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return routing.run_invariant_linear(x, weight)


@invariant_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _refuse_gradients(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise UnsupportedError(f"{name} has no gradient under torch.compile", where=name, next_step="run under torch.no_grad(), or uncompiled")

    return backward


for _op, _name in ((fused_moe, "fused_moe"), (route, "route"), (invariant_linear, "MoE")):
    _op.register_autograd(_refuse_gradients(_name))
