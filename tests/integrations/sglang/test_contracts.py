"""What the plug-in uses of SGLang is there, in every release whose facts were recorded (`contracts.py`). SGLang is not installed for this."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.integrations.sglang.methods import HOLDINGS

RELEASES = {file.stem: json.loads(file.read_text())["facts"] for file in sorted((Path(__file__).parent / "releases").glob("*.json"))}
PLUGIN = Path(halfbyte.__file__).parent / "integrations" / "sglang"
SOURCES = {file.name: ast.parse(file.read_text()) for file in sorted(PLUGIN.glob("*.py"))}

# Asked for with a default, since not every release or layer has them.
OPTIONAL = {"gemm1_beta", "scheme", "inference_moe_w13_interleaved", "quant_config"}
OURS = {"halfbyte_experts", "quant_method", "register_parameter", "_parameters"}

each_release = pytest.mark.parametrize("facts", RELEASES.values(), ids=RELEASES.keys())


def classes(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: described for file in facts.values() if "classes" in file for name, described in file["classes"].items()}


def attributes_asked_of(variable: str) -> set[str]:
    nodes = (node for tree in SOURCES.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == variable}


def imports() -> Iterator[tuple[str, str]]:
    """(module, name) of what the plug-in imports from SGLang."""
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang."):
                yield from ((str(node.module), alias.name) for alias in node.names)


def says_when_an_update_ends(facts: dict[str, Any]) -> bool:
    return "end_weight_update" in classes(facts)["WeightUpdater"]["attributes"]


def constant(file: str, name: str) -> Any:
    """What a module-level name of the plug-in is worth, without importing SGLang."""
    tree = SOURCES[file]
    known: dict[str, Any] = {"tuple": tuple}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id != "logger":
            known[node.targets[0].id] = eval(compile(ast.Expression(node.value), file, "eval"), known)
    return known[name]


def test_the_oldest_and_the_newest_release_are_recorded() -> None:
    assert {"0.5.17", "0.5.23"} <= RELEASES.keys()


@each_release
def test_what_is_imported_is_there(facts: dict[str, Any]) -> None:
    found = list(imports())
    assert len(found) >= 6
    for module, name in found:
        file = module.removeprefix("sglang.").replace(".", "/") + ".py"
        assert name in facts[file]["names"], (module, name)


@each_release
def test_what_is_hooked_is_there(facts: dict[str, Any]) -> None:
    targets = constant("hook.py", "CHOICES") + (() if says_when_an_update_ends(facts) else constant("hook.py", "UPDATES"))
    assert len(targets) >= 6
    for target in targets:
        module, owner, method = target.rsplit(".", 2)
        described = facts[module.removeprefix("sglang.").replace(".", "/") + ".py"]["classes"][owner]
        assert method in described["methods"], target
        if method == "get_quant_method":
            assert described["methods"][method][:2] == ["self", "layer"]


@each_release
def test_the_registry_takes_a_hook_around_a_target(facts: dict[str, Any]) -> None:
    described = classes(facts)
    assert described["HookRegistry"]["methods"]["register"][1:4] == ["target", "hook", "hook_type"]
    assert "AROUND" in described["HookType"]["attributes"]


@each_release
def test_a_layer_knows_what_the_choice_asks_of_it(facts: dict[str, Any]) -> None:
    asked = attributes_asked_of("layer") - OPTIONAL - OURS
    assert {"moe_runner_config", "hidden_size", "layer_name"} <= asked
    assert asked <= set(facts["making"]["known"])
    assert "weight_loader" in facts["making"]["given"]


@each_release
def test_a_runner_config_has_what_is_asked_of_it(facts: dict[str, Any]) -> None:
    asked = attributes_asked_of("config") - OPTIONAL
    assert {"activation", "is_gated", "gemm1_alpha", "routed_scaling_factor"} <= asked
    assert asked <= set(classes(facts)["MoeRunnerConfig"]["attributes"])


@each_release
def test_the_server_has_the_arguments_that_are_asked_for(facts: dict[str, Any]) -> None:
    asked = attributes_asked_of("arguments")
    assert {"json_model_override_args", "device", "lora_target_modules"} <= asked
    assert asked <= set(facts["arguments"])


def test_arguments_asked_for_by_name_are_those_of_the_newest_release() -> None:
    """Others would be asked for in vain."""
    strings = {node.value for node in ast.walk(SOURCES["methods.py"]) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    asked = {"cpu_offload_gb", "kt_weight_path", "enable_paged_experts", "dwdp_size", "offload_group_size", "weight_cache_mode"}
    assert asked <= strings
    assert asked <= set(RELEASES["0.5.23"]["arguments"])


@each_release
def test_runner_and_all_to_all_backends_answer(facts: dict[str, Any]) -> None:
    described = classes(facts)
    predicates = described.get("_MoeRunnerBackendPredicates", described["MoeRunnerBackend"])  # newer releases have them in a base
    assert attributes_asked_of("backend") - {"value"} <= set(predicates["attributes"])
    assert attributes_asked_of("all2all") - {"value"} <= set(described["MoeA2ABackend"]["attributes"])


@each_release
@pytest.mark.parametrize("name", HOLDINGS)
def test_methods_hold_experts_as_described(facts: dict[str, Any], name: str) -> None:
    assert HOLDINGS[name].consumed.keys() == {"w13.codes", "w13.scales", "w2.codes", "w2.scales"}
    if name in classes(facts):
        assert set(HOLDINGS[name].parameters.values()) <= set(classes(facts)[name]["parameters"])
    else:
        assert (name, facts) == ("CompressedTensorsW4A16Nvfp4MoE", RELEASES["0.5.17"])  # which has no such method below Blackwell


@each_release
def test_methods_are_called_as_the_plugin_is(facts: dict[str, Any]) -> None:
    described = classes(facts)
    method = next(node for node in ast.walk(SOURCES["takeover.py"]) if isinstance(node, ast.ClassDef) and node.name == "_Method")
    ours = {node.name: [argument.arg for argument in node.args.args] for node in method.body if isinstance(node, ast.FunctionDef)}
    theirs = described["FusedMoEMethodBase"]["methods"] | described["QuantizeMethodBase"]["methods"] | described["FusedMoEMethodBase"]["methods"]
    for name in ("apply", "process_weights_after_loading"):
        assert ours[name] == theirs[name], name
    assert theirs["create_weights"][:2] == ours["create_weights"]


@each_release
def test_tokens_and_results_have_the_fields_that_are_used(facts: dict[str, Any]) -> None:
    described = classes(facts)
    assert attributes_asked_of("dispatch_output") <= set(described["StandardDispatchOutput"]["attributes"])
    routed = set(described["StandardTopKOutput"]["attributes"]) | set(described["PackedTopKOutput"]["attributes"])
    assert attributes_asked_of("topk") <= routed
    assert "hidden_states" in described["StandardCombineInput"]["attributes"]


@each_release
def test_marlin_takes_the_routed_scaling_factor(facts: dict[str, Any]) -> None:
    """In its place, so does the plug-in."""
    marlin = facts["srt/layers/moe/fused_moe_triton/fused_marlin_moe.py"]["functions"]["fused_marlin_moe"]
    assert {"routed_scaling_factor", "clamp_limit", "gemm1_alpha"} <= set(marlin)


def test_the_end_of_an_update_is_known_by_a_method() -> None:
    assert "end_weight_update" in ast.unparse(SOURCES["hook.py"])
    ends = {release: says_when_an_update_ends(facts) for release, facts in RELEASES.items()}
    assert ends["0.5.23"] and not ends["0.5.17"]
