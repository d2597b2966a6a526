"""The function between the two expert matrices, computed in the dtype of its input (fp32 in the reference); formulas in `Activation`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from halfbyte.experts import Activation


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Apply `activation` to x [..., 2I], gate columns then up columns ([..., I] without a gate): [..., I] of the same dtype.

    >>> from halfbyte.experts import RELU2
    >>> activate(torch.tensor([-1.0, 3.0]), RELU2).tolist()
    [0.0, 9.0]
    """
    if activation.kind == "relu2":
        return x.relu().square()
    gate, up = x.chunk(2, dim=-1)
    if activation.kind != "swiglu":
        return F.gelu(gate, approximate="tanh" if activation.kind == "geglu_tanh" else "none") * up
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return (up + activation.beta) * gate * torch.sigmoid(activation.alpha * gate)
