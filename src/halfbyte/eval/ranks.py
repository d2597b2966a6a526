"""Measuring on several ranks: each takes rows of its own of every batch, and all of them call the model equally often, as `ExpertParallel` needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """All ranks of torch.distributed, or by default this process alone."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def of_group() -> Ranks:
        """Those of the default process group."""
        return Ranks(dist.get_rank(), dist.get_world_size())

    def own(self, rows: Sequence[int]) -> list[int]:
        """This rank's share; without rows of its own it still has to call the model, with any of them.

        >>> [Ranks(rank, 2).own([7, 8, 9]) for rank in range(2)]
        [[7, 9], [8]]
        """
        return list(rows[self.rank :: self.world])

    def add(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The sums over the ranks, each value in fp64.

        >>> Ranks().add([0.5, 2.0], torch.device("cpu"))
        [0.5, 2.0]
        """
        total = torch.tensor(values, dtype=torch.float64, device=device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def merge(self, mine: Mapping[int, str]) -> dict[int, str]:
        """What all ranks have.

        >>> Ranks().merge({3: "three"})
        {3: 'three'}
        """
        everyone: list[Any] = [dict(mine)] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, dict(mine))
        return {key: value for part in everyone for key, value in part.items()}


ALONE = Ranks()
