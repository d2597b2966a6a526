"""Tokens between ranks: collectives of uneven sizes over any `torch.distributed` group, and the same over the symmetric memory of one host's GPUs."""

from halfbyte.distributed.collectives import all_gatherv, reduce_scatterv
from halfbyte.distributed.costs import Costs
from halfbyte.distributed.failures import PeerError, tell_others
from halfbyte.distributed.peer_memory import Capacity

__all__ = ["Capacity", "Costs", "PeerError", "all_gatherv", "reduce_scatterv", "tell_others"]
