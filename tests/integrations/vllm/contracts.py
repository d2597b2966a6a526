"""What halfbyte's plug-in relies on in vLLM, read from vLLM's source: python contracts.py FOLDER [RELEASE.json]

FOLDER        the package `vllm`: of a source tree, of an unpacked wheel, or where an installed vLLM lies
RELEASE.json  where the facts go; without it they are compared with those of the release of this version, if there is one in releases/

Facts only: names of parameters, attributes and classes. The tests compare them with what the plug-in uses, without vLLM.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

_LAYERS = "model_executor/layers"
_COMPRESSED = f"{_LAYERS}/quantization/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe"

# File to the classes and the top-level names of it that the plug-in knows.
RELIED_ON: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    f"{_LAYERS}/fused_moe/routed_experts.py": (("RoutedExperts",), ("RoutedExperts",)),
    f"{_LAYERS}/fused_moe/fused_moe_method_base.py": (("FusedMoEMethodBase",), ()),
    f"{_LAYERS}/fused_moe/expert_map_manager.py": (("ExpertMapManager",), ()),
    f"{_LAYERS}/fused_moe/activation.py": (("MoEActivation",), ()),
    f"{_LAYERS}/fused_moe/config.py": (("FusedMoEConfig", "FusedMoEParallelConfig"), ("FUSED_MOE_UNQUANTIZED_CONFIG",)),
    f"{_LAYERS}/fused_moe/modular_kernel.py": ((), ()),
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
    "envs.py": ((), ("VLLM_BATCH_INVARIANT",)),
    "logger.py": ((), ("init_logger",)),
    "v1/worker/workspace.py": (("WorkspaceManager",), ("current_workspace_manager", "is_workspace_manager_initialized")),
}


def facts_of(package: Path) -> dict[str, Any]:
    """{file: {"names": [...], "classes": {class: {"methods", "attributes", "parameters", "values"}}}}; a file that is not there is left out."""
    facts: dict[str, Any] = {}
    for file, (classes, names) in RELIED_ON.items():
        if not (package / file).exists():
            continue
        tree = ast.parse((package / file).read_text())
        found = {node.name: _class(node) for node in tree.body if isinstance(node, ast.ClassDef) and node.name in classes}
        facts[file] = {"names": sorted(set(names) & set(_top_level(tree))), "classes": found}
    return facts


def version_of(package: Path) -> str:
    """Of the package's metadata beside it, or of the source tree's PKG-INFO."""
    for pattern in ("vllm*.dist-info/METADATA", "PKG-INFO"):
        for file in sorted(package.parent.glob(pattern)):
            if match := re.search(r"^Version: (\d+\.\d+(?:\.\d+)?)", file.read_text(), re.M):
                return match[1]
    raise SystemExit(f"no version of vLLM beside {package}")


def _top_level(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def _class(node: ast.ClassDef) -> dict[str, Any]:
    methods = {item.name: _parameters(item) for item in node.body if isinstance(item, ast.FunctionDef) and not _is_overload(item)}
    fields = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)}
    values = {
        target.id: item.value.value
        for item in node.body
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
        for target in item.targets
        if isinstance(target, ast.Name)
    }
    return {
        "bases": [ast.unparse(base) for base in node.bases],
        "methods": {name: parameters for name, parameters in methods.items() if name in _METHODS},
        "attributes": sorted(fields | set(methods) | _assigned(node) | _registered(node, "register_buffer")),
        "parameters": sorted(_registered(node, "register_parameter")),
        "values": {name: value for name, value in values.items() if isinstance(value, str)},
    }


# Methods whose parameters matter; of others only the name.
_METHODS = (
    "_get_quant_method", "apply", "process_weights_after_loading", "create_weights", "maybe_roundup_sizes", "maybe_make_prepare_finalize",
    "get_fused_moe_quant_config", "get_simultaneous",
)  # fmt: skip


def _is_overload(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).endswith("overload") for decorator in function.decorator_list)


def _parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    star = [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    stars = [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)] + star + [a.arg for a in arguments.kwonlyargs] + stars


def _assigned(node: ast.ClassDef) -> set[str]:
    """Attributes that methods assign to self."""
    stores = (item for item in ast.walk(node) if isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store))
    return {item.attr for item in stores if isinstance(item.value, ast.Name) and item.value.id == "self"}


def _registered(node: ast.ClassDef, how: str) -> set[str]:
    """Names that are given to register_parameter or register_buffer as they stand."""
    calls = (item for item in ast.walk(node) if isinstance(item, ast.Call) and isinstance(item.func, ast.Attribute) and item.func.attr == how)
    return {call.args[0].value for call in calls if call.args and isinstance(call.args[0], ast.Constant)}


def main() -> None:
    package = Path(sys.argv[1])
    facts = {"version": version_of(package), "facts": facts_of(package)}
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        return
    recorded = Path(__file__).parent / "releases" / f"{facts['version']}.json"
    if not recorded.exists():
        print(f"vLLM {facts['version']} is none of {[file.stem for file in sorted(recorded.parent.glob('*.json'))]}")
        return
    if json.loads(recorded.read_text()) != facts:
        raise SystemExit(f"vLLM {facts['version']} here is not what was recorded")
    print(f"vLLM {facts['version']}: as recorded")


if __name__ == "__main__":
    main()
