"""Files to and from canonical `ExpertWeights`: every quantised and dense MoE checkpoint format, read tensor by tensor."""

from halfbyte.checkpoint.families import MoEConfig, RoutingRule
from halfbyte.checkpoint.load import RouterWeights, load_experts, load_router
from halfbyte.checkpoint.problems import Problem, find_problems
from halfbyte.checkpoint.quantization import Quantization
from halfbyte.checkpoint.source import Checkpoint, TensorInfo, resolve_model

__all__ = [
    "Checkpoint",
    "MoEConfig",
    "Problem",
    "Quantization",
    "RouterWeights",
    "RoutingRule",
    "TensorInfo",
    "find_problems",
    "load_experts",
    "load_router",
    "resolve_model",
]
