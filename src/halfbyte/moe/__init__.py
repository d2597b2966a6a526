"""The mixture-of-experts layer: routing, the pure function, the module."""

from halfbyte.moe import ops  # noqa: F401  # registers what `fused_moe` and `route` are under torch.compile
from halfbyte.moe.compilation import warm_up
from halfbyte.moe.functional import fused_moe
from halfbyte.moe.module import MoE
from halfbyte.moe.routing import Routing, route

__all__ = ["MoE", "Routing", "fused_moe", "route", "warm_up"]
