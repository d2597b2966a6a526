"""Tokens between ranks: collectives of uneven sizes over any `torch.distributed` group, and the same over the symmetric memory of one host's GPUs."""

from halfbyte.distributed.collectives import all_gatherv, reduce_scatterv
from halfbyte.distributed.failures import tell_others

__all__ = ["all_gatherv", "reduce_scatterv", "tell_others"]
