"""Tokens of vLLM's data-parallel ranks over peer memory: halfbyte's `ExpertParallel` in the place of the group that would gather them with NCCL.

What is decided here is decided alike on all ranks: by the configuration, and by answers that every rank hears. A rank that decided otherwise would
wait for the others for ever.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.distributed as dist
from vllm.distributed.parallel_state import get_ep_group
from vllm.forward_context import get_forward_context

from halfbyte.distributed.peer_memory import Capacity, why_not
from halfbyte.distributed.placement import contiguous, round_robin
from halfbyte.errors import HalfbyteError
from halfbyte.integrations.engines import FAILURES, EngineModel
from halfbyte.integrations.vllm.methods import Layer
from halfbyte.moe.parallel import ExpertParallel


class Peers:
    """What one layer knows of the other ranks while it is loaded.

    Attributes:
        max_tokens: the most tokens of one rank in a call.
    """

    def __init__(self, model: EngineModel, max_tokens: int) -> None:
        self.model, self.max_tokens = model, max_tokens

    def way(self, layer: Layer) -> ExpertParallel | None:
        """How tokens of a layer travel; None where vLLM moves them. A collective: every rank calls it for the same layers in the same order."""
        manager, hidden = layer.expert_map_manager, layer.moe_config.hidden_dim
        way = _expert_parallel(manager.global_num_experts, manager.placement_strategy, hidden, layer.top_k, self.max_tokens)
        if isinstance(way, str):
            self.model.note(f"halfbyte lets vLLM move tokens between ranks: {way}")
            return None
        nbytes = Capacity(self.max_tokens, hidden, layer.top_k).offsets(way.num_ranks)["end"]
        self.model.note(f"halfbyte moves tokens between {way.num_ranks} ranks over peer memory, {nbytes >> 20} MiB of each GPU")
        return way


@functools.cache
def _expert_parallel(num_experts: int, strategy: str, hidden: int, top_k: int, max_tokens: int) -> ExpertParallel | str:
    """One for all layers of a kind, or why there is none; a collective."""
    group = get_ep_group()
    reason, made = why_not(group.device_group, group.device), None
    if reason is not None:
        return reason
    place = round_robin if strategy == "round_robin" else contiguous
    try:
        made = ExpertParallel(
            group.device_group, num_experts, placement=place(num_experts, group.world_size), capacity=Capacity(max_tokens, hidden, top_k)
        )
    except (HalfbyteError, *FAILURES) as error:
        reason = f"{type(error).__name__}: {error}"
    reason = agreed(reason)
    return made if reason is None and made is not None else str(reason)


def agreed(reason: str | None) -> str | None:
    """The reason of the first rank that has one, None where no rank has; a collective."""
    group = get_ep_group()
    everyone: list[str | None] = [None] * group.world_size
    dist.all_gather_object(everyone, reason, group=group.cpu_group)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text is not None), None)


def sizes_of_ranks() -> list[int]:
    """Tokens of every rank in this step, as vLLM has told all of them before it: equal and padded where CUDA graphs are captured or replayed."""
    metadata: Any = get_forward_context().dp_metadata
    sizes: list[int] = metadata.get_chunk_sizes_across_dp_rank()
    return sizes
