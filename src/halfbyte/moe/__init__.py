"""The mixture-of-experts layer: routing, the pure function, the module."""

from halfbyte.moe.functional import fused_moe
from halfbyte.moe.routing import Routing, route

__all__ = ["Routing", "fused_moe", "route"]
