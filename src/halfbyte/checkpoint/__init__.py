"""Files to and from canonical `ExpertWeights`: every quantised and dense MoE checkpoint format, read tensor by tensor."""

from halfbyte.checkpoint.defects import Defect, find_defects
from halfbyte.checkpoint.families import MoEConfig, RoutingRule
from halfbyte.checkpoint.load import load_experts
from halfbyte.checkpoint.quantization import Quantization
from halfbyte.checkpoint.router import RouterWeights, load_router
from halfbyte.checkpoint.source import Checkpoint, TensorInfo, resolve_model

__all__ = [
    "Checkpoint",
    "Defect",
    "MoEConfig",
    "Quantization",
    "RouterWeights",
    "RoutingRule",
    "TensorInfo",
    "find_defects",
    "load_experts",
    "load_router",
    "resolve_model",
]
