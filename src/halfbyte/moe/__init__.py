"""The mixture-of-experts layer: routing, the pure function and its stages, the module."""

from halfbyte.moe import ops  # noqa: F401  # registers what `fused_moe` and `route` are under torch.compile
from halfbyte.moe.functional import fused_moe, workspace_nbytes
from halfbyte.moe.module import MoE
from halfbyte.moe.parallel import Dispatched, ExpertParallel
from halfbyte.moe.routing import Routing, route
from halfbyte.moe.stages import SortedSlots, combine, expert_rows, sort
from halfbyte.moe.warm import warm_up

__all__ = [
    "Dispatched",
    "ExpertParallel",
    "MoE",
    "Routing",
    "SortedSlots",
    "combine",
    "expert_rows",
    "fused_moe",
    "route",
    "sort",
    "warm_up",
    "workspace_nbytes",
]
