"""The provider's calls fit the functions of every release whose facts were recorded (`contracts.py`). FlashInfer is not installed for this."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest

from halfbyte.kernels.flashinfer.package import OLDEST

HERE = Path(__file__).parent
RELEASES = {file.stem: json.loads(file.read_text())["facts"] for file in sorted((HERE / "releases").glob("*.json"))}

specification = importlib.util.spec_from_file_location("flashinfer_contracts", HERE / "contracts.py")
contracts = importlib.util.module_from_spec(specification)
specification.loader.exec_module(contracts)


def test_the_oldest_and_the_newest_release_are_recorded() -> None:
    assert {OLDEST, "0.7.4"} <= RELEASES.keys()


@pytest.mark.parametrize("version", RELEASES)
def test_the_calls_fit(version: str) -> None:
    contracts.bind(RELEASES[version])


@pytest.mark.parametrize("defect", ["renamed", "one more is required", "another number", "not exported"])
def test_what_does_not_fit_is_seen(defect: str) -> None:
    facts = copy.deepcopy(RELEASES["0.7.4"])
    cutlass = facts["functions"]["cutlass_fused_moe"]
    if defect == "renamed":
        cutlass["parameters"][cutlass["parameters"].index("input_sf")] = "input_scales"
    elif defect == "one more is required":
        cutlass["required"].append("workspace_buffer")
    elif defect == "another number":
        facts["activation_types"]["Geglu"] = 5
    else:
        facts["exported"].remove("ActivationType")
    with pytest.raises((TypeError, AssertionError)):
        contracts.bind(facts)


def test_facts_are_read_from_a_source_tree(tmp_path: Path) -> None:
    """A tree with the recorded names, from which the same facts are read again."""
    facts = RELEASES["0.7.4"]
    (tmp_path / "fused_moe").mkdir()
    functions = [
        f"def {name}({', '.join(p if p in described['required'] else f'{p}=None' for p in described['parameters'])}): ..."
        for name, described in facts["functions"].items()
    ]
    (tmp_path / "fused_moe" / "core.py").write_text("\n".join([*functions, "def another(x): ..."]))
    numbers = "\n".join(f"    {name} = {number}" for name, number in facts["activation_types"].items())
    (tmp_path / "tllm_enums.py").write_text(f"class ActivationType(IntEnum):\n{numbers}\n    Situ = 10\n")
    (tmp_path / "__init__.py").write_text(f"from .fused_moe import {', '.join(facts['exported'])}, another\n")
    assert contracts.facts_of(tmp_path) == facts
