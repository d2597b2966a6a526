"""Other systems that carry tokens between ranks, for `bench dispatch`, where every rank has the same number of tokens.

* NCCL's symmetric kernels: collectives on memory that every rank has registered (`symmetric_collectives`).
* torchtitan's MinimalAsyncEP (0.3.0, Triton over torch symmetric memory, bf16). It sends one row per slot to where its expert's rows lie, and back;
  the weighted sum over a token's slots is part of its combine. Ours sends a token once per rank, and each rank adds up its own rows in the last
  kernel of the layer.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from halfbyte.bench.inputs import Call
from halfbyte.bench.shapes import MoEShape
from halfbyte.bench.together import Way
from halfbyte.distributed.collectives import gather_equal, scatter_equal
from halfbyte.distributed.wire import Wire
from halfbyte.errors import UnsupportedError


def symmetric_collectives(device: torch.device, hidden: torch.Tensor) -> Iterator[Way]:
    """All-gathers of bf16 rows and of FP4 rows with their scales, and a reduce-scatter in bf16, on registered memory. `hidden` [T, H]: own rows."""
    group = dist.group.WORLD
    assert group is not None
    world, rows = group.size(), len(hidden)
    backend: Any = group._get_backend(device)  # torch 2.11 to 2.15 have no public name for it
    pool = torch.cuda.MemPool(backend.mem_allocator)
    fp4_bytes = Wire("fp4", hidden.shape[1]).row_bytes
    with torch.cuda.use_mem_pool(pool):
        sources = {"bf16": hidden.clone(), "fp4": torch.zeros((rows, fp4_bytes), dtype=torch.uint8, device=device)}
        gathered = {name: tensor.new_empty((world * rows, tensor.shape[1])) for name, tensor in sources.items()}
        partial, out = hidden.repeat(world, 1), torch.empty_like(hidden)
    backend.register_mem_pool(pool, symm=True)
    try:
        for name, tensor in sources.items():
            nbytes = (world - 1) * rows * tensor.shape[1] * tensor.itemsize
            yield Way("dispatch", f"nccl symmetric all-gather {name}", _gather(gathered[name], tensor), nbytes)
            if not torch.equal(gathered[name][dist.get_rank() * rows :][:rows], tensor):
                raise AssertionError(f"NCCL's symmetric all-gather of {name} brings other bits")
        yield Way(
            "combine", "nccl symmetric reduce-scatter bf16", lambda: scatter_equal(out, partial, None), (world - 1) * rows * 2 * hidden.shape[1]
        )
    finally:
        backend.deregister_mem_pool(pool)


def _gather(out: torch.Tensor, tensor: torch.Tensor) -> Callable[[], object]:
    return lambda: gather_equal(out, tensor, None)


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

    def ways(self, call: Call) -> Iterator[Way]:
        """Its two steps with the tokens of `call`; bytes are those of even routing.

        Raises:
            AssertionError: it loses tokens.
        """
        counts = torch.bincount(call.ids.flatten(), minlength=self._shape.num_experts)
        moved = len(call.ids) * self._shape.top_k * (self._world - 1) // self._world * 2 * self._shape.hidden
        sent = self.dispatch(call, counts)
        rows = sent[0].clone()
        got = self.combine(rows, sent, call)
        expected = call.hidden.float() * call.weights.sum(dim=1, keepdim=True)  # its experts here give back what they are given
        if not torch.allclose(got.float(), expected, rtol=2e-2, atol=2e-2):
            raise AssertionError(f"{self.name} loses tokens")
        yield Way("dispatch", self.name, lambda: self.dispatch(call, counts), moved)
        yield Way("combine", self.name, lambda: self.combine(rows, sent, call), moved)


def _load_api() -> Any:
    """The module without its package, which imports what trains models and needs a newer torch."""
    name = "torchtitan.distributed"
    found = importlib.util.find_spec("torchtitan")
    if found is None or found.origin is None:
        raise UnsupportedError("torchtitan is not installed", where="MinimalAsyncEP", next_step="run: pip install --no-deps torchtitan==0.3.0")
    if name not in sys.modules:
        stand_in = types.ModuleType(name)
        stand_in.__path__ = [str(Path(found.origin).parent / "distributed")]
        sys.modules[name] = stand_in
    return importlib.import_module(f"{name}.minimal_async_ep.api")
