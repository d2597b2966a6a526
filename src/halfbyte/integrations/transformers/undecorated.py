"""Experts classes of transformers that its use_experts_implementation does not decorate, made to look as if it did.

| class | what its forward does |
|---|---|
| Llama4TextExperts | every expert on every token, whose input the router has scaled, to zero where the token was not routed there |
| LongcatFlashExperts | ids behind the real experts stand for the identity |
| Step3p7Experts | as a decorated class |
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from halfbyte.integrations.transformers.modules import ExpertsModule, experts_forward


def adapt(module: nn.Module) -> None:
    """Give a module of these classes, whose weights come packed, the attributes and the forward of a dispatched one; leave others alone."""
    if type(module).__name__ in _FORWARDS:
        stock: Any = type(module)
        module.__class__ = _adapted(stock.__name__, stock)


@functools.cache
def _adapted(name: str, stock: Any) -> Any:
    is_transposed = name == "Llama4TextExperts"
    attributes: dict[str, Any] = {"has_gate": True, "is_concatenated": True, "is_transposed": is_transposed, "forward": _FORWARDS[name]}
    if not hasattr(stock, "_apply_gate"):
        attributes["_apply_gate"] = _apply_gate
    return type(name, (stock,), attributes)


def _apply_gate(module: ExpertsModule, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def _every_expert(self: ExpertsModule, hidden_states: torch.Tensor) -> torch.Tensor:
    """[E * T, H], the tokens once for every expert, to the same shape. Rows of zeros, of tokens routed elsewhere, are not computed."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    expert = torch.arange(self.num_experts, dtype=torch.int64, device=rows.device).repeat_interleave(len(rows) // self.num_experts)
    ids = torch.where((rows != 0).any(-1), expert, -1).unsqueeze(-1)
    return experts_forward(self, rows, ids, rows.new_ones(ids.shape))


def _with_identities(self: ExpertsModule, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """hidden [T, H], ids and weights [T, k] to [T, H]."""
    is_identity = top_k_index >= self.num_routed_experts
    routed = experts_forward(self, hidden_states, torch.where(is_identity, -1, top_k_index), top_k_weights)
    kept = torch.where(is_identity, top_k_weights, 0).sum(-1, keepdim=True)
    return routed + (hidden_states * kept).to(routed.dtype)


_FORWARDS: dict[str, Callable[..., torch.Tensor]] = {
    "Llama4TextExperts": _every_expert,
    "LongcatFlashExperts": _with_identities,
    "Step3p7Experts": experts_forward,
}
