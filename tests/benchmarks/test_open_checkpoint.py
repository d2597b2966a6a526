"""Opening a checkpoint of headers alone: what the script writes is one, and the number of experts costs no renaming."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from benchmark_scripts import load_script

import halfbyte.integrations.transformers.plan as plan
from halfbyte.checkpoint.source import Checkpoint

script = load_script("open_checkpoint")
SIZES = script.Sizes(num_layers=5, num_experts=16, hidden=256, intermediate=64)


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("headers") / "model"
    assert script.write_headers(SIZES, directory) == 2 * 16 * 3 * 4
    return directory


def test_the_files_are_a_checkpoint(headers: Path) -> None:
    moe = Checkpoint.open(headers).moe
    assert (moe.moe_layers, moe.num_experts, moe.hidden, moe.intermediate) == ((3, 4), 16, 256, 64)


@pytest.mark.parametrize("subject", ["library", "transformers"])
def test_both_are_measured(headers: Path, subject: str) -> None:
    row = script.measure(subject, headers)
    assert row["s"] > 0 and row["processor_s"] > 0 and row["peak_mb"] >= row["before_mb"] > 0


def test_transformers_renames_one_expert_for_all(headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renaming each of 178,176 names took half of the time."""
    renamed: Counter[str] = Counter()
    stock = plan.rename_source_key
    monkeypatch.setattr(plan, "rename_source_key", lambda name, *others: (renamed.update([name]), stock(name, *others))[1])
    script.transformers(headers)()
    of_experts = {name for name in renamed if ".experts." in name}
    assert of_experts == {f"model.layers.{layer}.mlp.experts.0.{leaf}_proj.weight" for layer in (3, 4) for leaf in ("gate", "up", "down")}
