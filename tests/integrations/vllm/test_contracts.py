"""What the plug-in uses of vLLM is there, in every release whose facts were recorded (`contracts.py`). vLLM is not installed for this."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.integrations.vllm.methods import _ACTIVATIONS, HOLDINGS

RELEASES = {file.stem: json.loads(file.read_text())["facts"] for file in sorted((Path(__file__).parent / "releases").glob("*.json"))}
PLUGIN = Path(halfbyte.__file__).parent / "integrations" / "vllm"
SOURCES = {file.name: ast.parse(file.read_text()) for file in sorted(PLUGIN.glob("*.py"))}
FUSED_MOE = "model_executor/layers/fused_moe"

# Name of a variable in the plug-in to the class of vLLM's whose attributes are asked of it.
ASKED = {
    "layer": "RoutedExperts",
    "parallel": "FusedMoEParallelConfig",
    "manager": "ExpertMapManager",
    "lora": "LoRAConfig",
}
OURS = {"halfbyte_experts"}

each_release = pytest.mark.parametrize("facts", RELEASES.values(), ids=RELEASES.keys())


def classes(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: described for file in facts.values() for name, described in file["classes"].items()}


def attributes_asked_of(variable: str) -> set[str]:
    nodes = (node for tree in SOURCES.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == variable} - OURS


def imports() -> Iterator[tuple[str, str | None]]:
    """(module, name) of what the plug-in imports from vLLM."""
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, None) for alias in node.names if alias.name.startswith("vllm."))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
                yield from ((str(node.module), alias.name) for alias in node.names)


def function(file: str, name: str) -> ast.FunctionDef:
    return next(node for node in ast.walk(SOURCES[file]) if isinstance(node, ast.FunctionDef) and node.name == name)


def parameters(node: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in node.args.args]


def test_the_oldest_and_the_newest_release_are_recorded() -> None:
    assert {"0.26.0", "0.33.0"} <= RELEASES.keys()


@each_release
def test_what_is_imported_is_there(facts: dict[str, Any]) -> None:
    found = list(imports())
    assert len(found) >= 9
    for module, name in found:
        path = module.removeprefix("vllm.").replace(".", "/")
        file = next(candidate for candidate in (f"{path}.py", f"{path}/__init__.py") if candidate in facts)
        assert name is None or name in facts[file]["names"], (module, name)


@each_release
def test_where_backends_are_selected_is_there(facts: dict[str, Any]) -> None:
    from_source = ast.unparse(SOURCES["hook.py"])
    selectors = {"modelopt": {"select_nvfp4_moe_backend"}, "mxfp4": {"select_mxfp4_moe_backend", "select_deepseek_v4_mxfp4_moe_backend"}}
    for module, names in selectors.items():
        assert names <= set(facts[f"model_executor/layers/quantization/{module}.py"]["names"])
        assert all(name in from_source for name in names)
    compressed = "model_executor/layers/quantization/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe_w4a4_nvfp4.py"
    assert "select_nvfp4_moe_backend" in facts[compressed]["names"]


@each_release
@pytest.mark.parametrize("variable", ASKED)
def test_attributes_that_are_asked_for_are_there(facts: dict[str, Any], variable: str) -> None:
    asked = attributes_asked_of(variable)
    assert len(asked) >= 1
    missing = asked - set(classes(facts)[ASKED[variable]]["attributes"])
    assert not missing, f"{ASKED[variable]} has no {sorted(missing)}"


@each_release
def test_configs_have_what_is_read_of_them(facts: dict[str, Any]) -> None:
    found = classes(facts)
    moe = {"moe_backend", "moe_parallel_config", "in_dtype", "hidden_dim", "intermediate_size_per_partition", "device"}
    moe |= {"dp_size", "pcp_size", "is_sequence_parallel"}
    assert moe <= set(found["FusedMoEConfig"]["attributes"])
    assert {"additional_config", "lora_config", "scheduler_config", "parallel_config"} <= set(found["VllmConfig"]["attributes"])
    assert "enable_sleep_mode" in found["ModelConfig"]["attributes"] and "model_config" in found["VllmConfig"]["attributes"]
    assert "max_num_batched_tokens" in found["SchedulerConfig"]["attributes"]
    assert {"data_parallel_size", "enable_elastic_ep", "use_ubatching"} <= set(found["ParallelConfig"]["attributes"])
    used = attributes_asked_of("config")
    assert used <= set().union(*(found[name]["attributes"] for name in ("FusedMoEConfig", "VllmConfig")))


@each_release
def test_the_hook_takes_what_vllm_passes(facts: dict[str, Any]) -> None:
    theirs = classes(facts)["RoutedExperts"]["methods"]["_get_quant_method"]
    assert parameters(function("hook.py", "choose"))[1:] == theirs[1:]
    assert parameters(function("hook.py", "load_weights"))[1:] == classes(facts)["RoutedExperts"]["methods"]["load_weights"][1:]


@each_release
def test_methods_take_what_vllm_passes(facts: dict[str, Any]) -> None:
    base = classes(facts)["FusedMoEMethodBase"]
    assert parameters(function("takeover.py", "apply")) == base["methods"]["apply"]
    rounding = parameters(function("takeover.py", "maybe_roundup_sizes"))
    assert rounding == base["methods"]["maybe_roundup_sizes"][: len(rounding)]
    assert base["methods"]["get_fused_moe_quant_config"] == parameters(function("takeover.py", "get_fused_moe_quant_config"))
    for name in (
        "is_monolithic",
        "supports_internal_mk",
        "supports_eplb",
        "skip_forward_padding",
        "has_unpadded_output",
        "topk_indices_dtype",
        "moe_kernel",
        "moe_quant_config",
    ):
        assert name in base["attributes"], name


@each_release
@pytest.mark.parametrize("method", HOLDINGS)
def test_methods_hold_experts_as_the_table_says(facts: dict[str, Any], method: str) -> None:
    found = classes(facts)
    if method not in found:
        assert method == "CompressedTensorsW4A8Mxfp4MoEMethod"  # younger than 0.26
        return
    registered = set(found[method]["parameters"])
    if method == "CompressedTensorsW4A8Mxfp4MoEMethod":  # renames those of its base
        registered = set(found[found[method]["bases"][0]]["parameters"]) | {"w13_weight_packed", "w2_weight_packed"}
    held = {name for name in HOLDINGS[method].parameters.values() if not name.endswith("bias")}
    assert held and held <= registered, sorted(held - registered)
    others = registered - set(HOLDINGS[method].parameters.values()) - {"w13_weight", "w2_weight"}
    assert not others, f"{method} has Parameters that would stay: {sorted(others)}"


@each_release
def test_activations_are_named_as_in_vllm(facts: dict[str, Any]) -> None:
    assert _ACTIVATIONS.keys() <= set(classes(facts)["MoEActivation"]["values"].values())


@each_release
def test_tokens_are_moved_as_vllm_moves_them(facts: dict[str, Any]) -> None:
    group = classes(facts)["GroupCoordinator"]["methods"]
    assert group["dispatch"] == ["self", "hidden_states", "topk_weights", "topk_ids", "is_sequence_parallel", "extra_tensors"]
    assert group["combine"] == ["self", "hidden_states", "is_sequence_parallel"]
    assert {"device_group", "cpu_group", "device", "world_size"} <= set(classes(facts)["GroupCoordinator"]["attributes"])


@each_release
def test_the_sizes_of_ranks_are_where_vllm_looks(facts: dict[str, Any]) -> None:
    found = classes(facts)
    assert "dp_metadata" in found["ForwardContext"]["attributes"]
    assert found["DPMetadata"]["methods"]["get_chunk_sizes_across_dp_rank"] == ["self"]


@each_release
def test_the_workspace_is_asked_for_as_vllm_gives_it(facts: dict[str, Any]) -> None:
    assert classes(facts)["WorkspaceManager"]["methods"]["get_simultaneous"][1] == "*shapes_and_dtypes"
