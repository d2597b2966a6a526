"""What halfbyte's plug-in relies on in SGLang, read from SGLang's source: PYTHONPATH=tests python contracts.py FOLDER [RELEASE.json]

FOLDER        the package `sglang`: of a source tree, of an unpacked wheel, or where an installed SGLang lies
RELEASE.json  where the facts go; without it they are compared with those of the release of this version, if there is one in releases/

Facts only: names of parameters, attributes and classes. The tests compare them with what the plug-in uses, without SGLang.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

from engine_sources import Relied, assigned_to_self, calls_of, facts_of, record_or_compare

_QUANTIZATION = "srt/layers/quantization"
_FUSED_MOE = "srt/layers/moe/fused_moe_triton/layer.py"
_FIELDS = "srt/arg_groups/fields"

RELIED_ON: Relied = {
    _FUSED_MOE: (("FusedMoE",), ()),
    f"{_QUANTIZATION}/base_config.py": (("FusedMoEMethodBase", "QuantizeMethodBase"), ()),
    f"{_QUANTIZATION}/modelopt_quant.py": (
        ("ModelOptFp4Config", "ModelOptMixedPrecisionConfig", "HybridFp8NvFp4Config", "ModelOptNvFp4FusedMoEMethod"),
        (),
    ),
    f"{_QUANTIZATION}/compressed_tensors/compressed_tensors.py": (("CompressedTensorsConfig", "CompressedTensorsFusedMoEMethod"), ()),
    f"{_QUANTIZATION}/compressed_tensors/schemes/compressed_tensors_w4a16_nvfp4_moe.py": (("CompressedTensorsW4A16Nvfp4MoE",), ()),
    f"{_QUANTIZATION}/fp8.py": (("Fp8Config",), ()),
    f"{_QUANTIZATION}/mxfp4.py": (("Mxfp4Config", "Mxfp4MoEMethod"), ()),
    f"{_QUANTIZATION}/mxfp4_marlin_moe.py": (("Mxfp4MarlinMoEMethod",), ()),
    "srt/layers/moe/moe_runner/base.py": (("MoeRunnerConfig",), ()),
    "srt/layers/moe/fused_moe_triton/fused_marlin_moe.py": ((), ("fused_marlin_moe",)),
    "srt/layers/moe/token_dispatcher/standard.py": (("StandardCombineInput", "StandardDispatchOutput"), ("StandardCombineInput",)),
    "srt/layers/moe/topk.py": (("StandardTopKOutput", "PackedTopKOutput"), ()),
    "srt/layers/moe/utils.py": (
        ("MoeRunnerBackend", "_MoeRunnerBackendPredicates", "MoeA2ABackend"),
        ("get_moe_a2a_backend", "get_moe_runner_backend"),
    ),
    "srt/model_executor/model_runner_components/weight_updater.py": (("WeightUpdater",), ()),
    "srt/plugins/hook_registry.py": (("HookRegistry", "HookType"), ("HookRegistry", "HookType")),
    "srt/runtime_context.py": ((), ("get_server_args",)),
}
METHODS = (
    "apply", "create_weights", "process_weights_after_loading", "restore_weights_before_loading", "get_quant_method", "register",
    "update_weights_from_tensor", "update_weights_from_distributed", "update_weights_from_ipc",
)  # fmt: skip


def facts(package: Path) -> dict[str, Any]:
    """Those of `facts_of`, the names of the server's arguments, and how FusedMoE makes a layer."""
    return facts_of(package, RELIED_ON, METHODS) | {"arguments": _arguments(package), "making": _making(package)}


def _arguments(package: Path) -> list[str]:
    """Fields of ServerArgs: of its class or, where it is put together of them, of those in arg_groups/fields."""
    files = [package / "srt/server_args.py", *sorted((package / _FIELDS).glob("*.py"))]
    classes = [node for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
    own = [node for node in classes if node.name == "ServerArgs" or "Struct" in "".join(map(ast.unparse, node.bases))]
    return sorted({item.target.id for node in own for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)})


def _making(package: Path) -> dict[str, list[str]]:
    """FusedMoE.__init__: what the layer knows when its method is chosen, and what create_weights is given by name."""
    tree = ast.parse((package / _FUSED_MOE).read_text())
    layer = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "FusedMoE")
    init = next(node for node in layer.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    chosen = min(call.lineno for call in calls_of(init, "get_quant_method"))
    given = {keyword.arg for call in calls_of(init, "create_weights") for keyword in call.keywords if keyword.arg}
    return {"known": sorted(assigned_to_self(init, before=chosen)), "given": sorted(given)}


if __name__ == "__main__":
    record_or_compare(Path(sys.argv[1]), facts(Path(sys.argv[1])), Path(__file__).parent / "releases")
