"""Other systems that carry tokens between ranks, for `bench dispatch`: torchtitan's MinimalAsyncEP (0.3.0, Triton over torch symmetric memory, bf16).

It sends one row per slot to where its expert's rows lie, and back; the weighted sum over a token's slots is part of its combine. Ours sends a token
once per rank, and each rank adds up its own rows in the last kernel of the layer. Every rank needs the same number of tokens.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from halfbyte.bench.inputs import Call
from halfbyte.bench.shapes import MoEShape
from halfbyte.errors import UnsupportedError


class MinimalAsyncEP:
    """Its two operations on tensors of one call."""

    name = "torchtitan MinimalAsyncEP bf16"

    def __init__(self, shape: MoEShape, num_tokens: int, device: torch.device) -> None:
        """Its buffers, once per process, for up to `num_tokens` on every rank.

        Raises:
            UnsupportedError: torchtitan is not installed.
        """
        self._api = _load_api()
        group = dist.group.WORLD
        assert group is not None
        self._shape, self._world = shape, group.size()
        held = shape.num_experts // self._world
        self._slots = min(shape.top_k, held)
        self._api.init_buffer(group, shape.hidden, num_tokens, held, shape.top_k, torch.bfloat16, device)

    def dispatch(self, call: Call, counts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rows of this rank's experts, and what `combine` needs. `counts` int64 [E]: slots of every expert here."""
        return self._api.dispatch_op(call.hidden, call.ids.long(), counts, self._world * len(call.ids) * self._slots, self._world)

    def combine(self, rows: torch.Tensor, sent: tuple[torch.Tensor, ...], call: Call) -> torch.Tensor:
        """Weighted sums of `rows` [capacity, H] for this rank's tokens."""
        _, dst_ranks, dst_rows, back_ranks, back_rows, valid, to_slot, to_row, _ = sent
        out, _ = self._api.combine_op(
            rows, dst_ranks, dst_rows, back_ranks, back_rows, valid, to_row, to_slot, call.weights.flatten(), len(call.ids), self._shape.top_k
        )
        return out

    def received_bytes(self, num_tokens: int) -> int:
        """By a rank from others, where routing is even."""
        return num_tokens * self._shape.top_k * (self._world - 1) // self._world * 2 * self._shape.hidden


def _load_api() -> Any:
    """The module without its package, which imports what trains models and needs a newer torch."""
    name = "torchtitan.distributed"
    found = importlib.util.find_spec("torchtitan")
    if found is None or found.origin is None:
        raise UnsupportedError("torchtitan is not installed", where="MinimalAsyncEP", next_step="pip install --no-deps torchtitan==0.3.0")
    if name not in sys.modules:
        stand_in = types.ModuleType(name)
        stand_in.__path__ = [str(Path(found.origin).parent / "distributed")]
        sys.modules[name] = stand_in
    return importlib.import_module(f"{name}.minimal_async_ep.api")
