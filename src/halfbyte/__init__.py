"""halfbyte: FP4 (NVFP4, MXFP4) Mixture-of-Experts models, fast, on the GPUs people have."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from halfbyte.version import __version__

if TYPE_CHECKING:
    from halfbyte import distributed, moe
    from halfbyte.checkpoint import load_experts, load_router
    from halfbyte.device import Target
    from halfbyte.errors import CheckpointError, HalfbyteError, InputError, UnsupportedError
    from halfbyte.experts import Activation, ExpertMap, ExpertWeights
    from halfbyte.formats import MXFP4, NVFP4, BlockFormat, Fp8Tensor, QuantTensor, swizzle_scales, unswizzle_scales
    from halfbyte.kernels.quantize import QuantizedExperts, quantize, quantize_experts, quantize_fp8, rms_norm_quantize, silu_mul_quantize
    from halfbyte.kernels.workspace import Workspace
    from halfbyte.loading import iter_prepared, load_prepared, prepare
    from halfbyte.moe import ExpertParallel, MoE, Routing, fused_moe, route, warm_up, workspace_nbytes
    from halfbyte.tuning.session import autotune
    from halfbyte.weights import PreparedExperts, ScaleChecks, trtllm_gen_row_order

__all__ = [
    "MXFP4",
    "NVFP4",
    "Activation",
    "BlockFormat",
    "CheckpointError",
    "ExpertMap",
    "ExpertParallel",
    "ExpertWeights",
    "Fp8Tensor",
    "HalfbyteError",
    "InputError",
    "MoE",
    "PreparedExperts",
    "QuantTensor",
    "QuantizedExperts",
    "Routing",
    "ScaleChecks",
    "Target",
    "UnsupportedError",
    "Workspace",
    "__version__",
    "autotune",
    "distributed",
    "fused_moe",
    "iter_prepared",
    "load_experts",
    "load_prepared",
    "load_router",
    "moe",
    "prepare",
    "quantize",
    "quantize_experts",
    "quantize_fp8",
    "rms_norm_quantize",
    "route",
    "silu_mul_quantize",
    "swizzle_scales",
    "trtllm_gen_row_order",
    "unswizzle_scales",
    "warm_up",
    "workspace_nbytes",
]

# Public name -> home. Resolved on first use, so that `halfbyte --help` and the plug-ins of the engines do not wait for torch.
_HOMES = {
    "halfbyte.tuning.session": ("autotune",),
    "halfbyte.checkpoint": ("load_experts", "load_router"),
    "halfbyte.experts": ("Activation", "ExpertMap", "ExpertWeights"),
    "halfbyte.device": ("Target",),
    "halfbyte.errors": ("CheckpointError", "HalfbyteError", "InputError", "UnsupportedError"),
    "halfbyte.formats": ("MXFP4", "NVFP4", "BlockFormat", "Fp8Tensor", "QuantTensor", "swizzle_scales", "unswizzle_scales"),
    "halfbyte.kernels.quantize": ("QuantizedExperts", "quantize", "quantize_experts", "quantize_fp8", "rms_norm_quantize", "silu_mul_quantize"),
    "halfbyte.kernels.workspace": ("Workspace",),
    "halfbyte.moe": ("ExpertParallel", "MoE", "Routing", "fused_moe", "route", "warm_up", "workspace_nbytes"),
    "halfbyte.loading": ("iter_prepared", "load_prepared", "prepare"),
    "halfbyte.weights": ("PreparedExperts", "ScaleChecks", "trtllm_gen_row_order"),
}
_MODULES = ("distributed", "moe")  # whose functions are called by their module
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"halfbyte.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
