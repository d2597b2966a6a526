"""What halfbyte's plug-in relies on in vLLM, read from vLLM's source: PYTHONPATH=tests python contracts.py FOLDER [RELEASE.json]

FOLDER        the package `vllm`: of a source tree, of an unpacked wheel, or where an installed vLLM lies
RELEASE.json  where the facts go; without it they are compared with those of the release of this version, if there is one in releases/

Facts only: names of parameters, attributes and classes. The tests compare them with what the plug-in uses, without vLLM.
"""

from __future__ import annotations

import sys
from pathlib import Path

from engine_sources import Relied, facts_of, record_or_compare

_LAYERS = "model_executor/layers"
_COMPRESSED = f"{_LAYERS}/quantization/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe"

# File to the classes and the top-level names of it that the plug-in knows.
RELIED_ON: Relied = {
    f"{_LAYERS}/fused_moe/routed_experts.py": (("RoutedExperts",), ("RoutedExperts",)),
    f"{_LAYERS}/fused_moe/fused_moe_method_base.py": (("FusedMoEMethodBase",), ()),
    f"{_LAYERS}/fused_moe/expert_map_manager.py": (("ExpertMapManager",), ()),
    f"{_LAYERS}/fused_moe/activation.py": (("MoEActivation",), ()),
    f"{_LAYERS}/fused_moe/config.py": (("FusedMoEConfig", "FusedMoEParallelConfig"), ("FUSED_MOE_UNQUANTIZED_CONFIG",)),
    f"{_LAYERS}/quantization/modelopt.py": (("ModelOptNvFp4FusedMoE",), ("select_nvfp4_moe_backend",)),
    f"{_LAYERS}/quantization/mxfp4.py": (
        ("GptOssMxfp4MoEMethod", "Mxfp4MoEMethod"),
        ("select_mxfp4_moe_backend", "select_deepseek_v4_mxfp4_moe_backend"),
    ),
    f"{_COMPRESSED}_w4a4_nvfp4.py": (("CompressedTensorsW4A4Nvfp4MoEMethod",), ("select_nvfp4_moe_backend",)),
    f"{_COMPRESSED}_w4a4_mxfp4.py": (("CompressedTensorsW4A4Mxfp4MoEMethod",), ()),
    f"{_COMPRESSED}_w4a8_mxfp4.py": (("CompressedTensorsW4A8Mxfp4MoEMethod",), ()),
    "config/__init__.py": ((), ("VllmConfig", "get_current_vllm_config")),
    "config/vllm.py": (("VllmConfig",), ()),
    "config/scheduler.py": (("SchedulerConfig",), ()),
    "config/parallel.py": (("ParallelConfig",), ()),
    "config/lora.py": (("LoRAConfig",), ()),
    "config/model.py": (("ModelConfig",), ()),
    "distributed/parallel_state.py": (("GroupCoordinator",), ("get_ep_group",)),
    "forward_context.py": (("DPMetadata", "ForwardContext"), ("get_forward_context",)),
    "envs.py": ((), ("VLLM_BATCH_INVARIANT",)),
    "logger.py": ((), ("init_logger",)),
    "v1/worker/workspace.py": (("WorkspaceManager",), ("current_workspace_manager", "is_workspace_manager_initialized")),
}
METHODS = (
    "_get_quant_method", "apply", "process_weights_after_loading", "create_weights", "maybe_roundup_sizes", "maybe_make_prepare_finalize",
    "get_fused_moe_quant_config", "load_weights", "get_simultaneous", "dispatch", "combine", "get_chunk_sizes_across_dp_rank",
)  # fmt: skip


if __name__ == "__main__":
    package = Path(sys.argv[1])
    record_or_compare(package, facts_of(package, RELIED_ON, METHODS), Path(__file__).parent / "releases")
