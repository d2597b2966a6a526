"""Scale statistics against plain sorting, and every defect that is to be reported."""

from __future__ import annotations

import statistics
from pathlib import Path

import checkpoint_files as cf
import pytest
import torch

from halfbyte.checkpoint import Checkpoint, Defect, find_defects
from halfbyte.checkpoint.defects import examine_layer
from halfbyte.errors import CheckpointError

PREFIX = "model.layers.1.mlp.experts"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def defects(files: cf.Files, path: Path) -> list[Defect]:
    return find_defects(Checkpoint.open(files.write(path)))


def same_gate_up(files: cf.Files) -> cf.Files:
    for expert in range(cf.E):
        files.tensors[f"{PREFIX}.{expert}.up_proj.weight_scale_2"] = files.tensors[f"{PREFIX}.{expert}.gate_proj.weight_scale_2"].clone()
    return files


def test_statistics_of_nvfp4(tmp_path: Path) -> None:
    files = same_gate_up(cf.nvfp4("modelopt"))
    scales = files.tensors[f"{PREFIX}.0.down_proj.weight_scale"]
    scales[0, 0], scales[1, 0], scales[2, 0] = 0.0, 448.0, 448.0
    (gate, up, down), found = examine_layer(Checkpoint.open(files.write(tmp_path)), 1)
    assert found == [] and [row.projection for row in (gate, up, down)] == ["gate", "up", "down"]
    values = torch.cat([files.tensors[f"{PREFIX}.{e}.down_proj.weight_scale"].float().flatten() for e in range(cf.E)]).tolist()
    nonzero = [value for value in values if value]
    assert (down.blocks, down.zero_blocks, down.saturated_blocks) == (len(values), len(values) - len(nonzero), 2)
    assert (down.smallest, down.median, down.largest) == (min(nonzero), statistics.median_low(nonzero), max(nonzero))
    assert down.global_scale == (2.0**-4, 2.0**-2) and down.input_scale == (2.0**-12, 2.0**-10)


def test_statistics_of_mxfp4(tmp_path: Path) -> None:
    files, _, _ = cf.gpt_oss()
    files.tensors[f"{PREFIX}.gate_up_proj_scales"][0, 0, 0] = 0  # 2^-127, which is not zero
    (gate, _, _), found = examine_layer(Checkpoint.open(files.write(tmp_path)), 1)
    values = (files.tensors[f"{PREFIX}.gate_up_proj_scales"][:, ::2].double() - 127).exp2().flatten().tolist()
    assert found == [] and (gate.smallest, gate.median, gate.largest) == (min(values), statistics.median_low(values), max(values))
    assert (gate.blocks, gate.zero_blocks, gate.global_scale, gate.input_scale) == (len(values), 0, None, None)


@pytest.mark.parametrize("files", [cf.dense(), cf.dense(stacked="rows"), cf.compressed_tensors_mxfp4()], ids=["dense", "stacked", "mxfp4"])
def test_sound_checkpoints_have_no_defects(files: cf.Files, tmp_path: Path) -> None:
    assert defects(files, tmp_path) == []


def test_different_gate_and_up_scales(tmp_path: Path) -> None:
    (defect,) = defects(cf.nvfp4("compressed-tensors"), tmp_path)
    assert defect.severity == "warning" and "different global scales in 3 of 3 experts, by up to 2 times" in defect.message


def test_scattered_input_scales(tmp_path: Path) -> None:
    files = same_gate_up(cf.nvfp4("modelopt"))
    files.tensors[f"{PREFIX}.1.gate_proj.input_scale"] = torch.tensor(1e-9)
    (defect,) = defects(files, tmp_path)
    assert defect.severity == "warning" and "1 of 3 experts are over 1000 times off" in defect.message and "of expert 1" in defect.message


def test_all_zero_scales(tmp_path: Path) -> None:
    files = same_gate_up(cf.nvfp4("modelopt"))
    for expert in range(cf.E):
        files.tensors[f"{PREFIX}.{expert}.up_proj.weight_scale"].zero_()
    (defect,) = defects(files, tmp_path)
    assert defect == Defect("warning", 1, "all up blocks have scale 0: these experts are zero")


def test_errors_are_told_once_and_counted(tmp_path: Path) -> None:
    files = same_gate_up(cf.nvfp4("modelopt"))
    for expert in range(cf.E):
        del files.tensors[f"{PREFIX}.{expert}.down_proj.weight_scale"]
    files.tensors[f"{PREFIX}.0.gate_proj.input_scale"] = torch.tensor(torch.nan)
    (defect,) = defects(files, tmp_path)
    assert defect.severity == "error" and defect.layer == 1
    assert "gate_proj.input_scale (given nan" in defect.message and defect.message.endswith("(and 3 more errors in this layer)")


def test_missing_and_misshapen_weights(tmp_path: Path) -> None:
    files = cf.dense()
    del files.tensors[f"{PREFIX}.2.up_proj.weight"]
    assert "missing tensor: model.layers.1.mlp.experts.2.up_proj.weight" in defects(files, tmp_path / "a")[0].message
    files = same_gate_up(cf.nvfp4("modelopt"))
    files.tensors[f"{PREFIX}.1.up_proj.weight"] = torch.zeros(cf.I, cf.H, dtype=torch.bfloat16)
    assert "wrong dtype" in defects(files, tmp_path / "b")[0].message
    files, _, _ = cf.gpt_oss()
    files.tensors[f"{PREFIX}.gate_up_proj_bias"] = torch.zeros(cf.E, cf.I)
    assert "wrong shape" in examine_layer(Checkpoint.open(files.write(tmp_path / "c")), 1)[1][0].message


def test_unknown_layer(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(cf.dense().write(tmp_path))
    with pytest.raises(CheckpointError, match="there is no layer 9"):
        examine_layer(checkpoint, 9)


def test_what_is_missing_and_what_is_too_much(tmp_path: Path) -> None:
    files = same_gate_up(cf.nvfp4("modelopt"))
    del files.tensors[f"{PREFIX}.1.down_proj.input_scale"]
    (defect,) = defects(files, tmp_path / "warned")
    assert (defect.severity, defect.layer) == ("warning", 1) and f"missing input scales: {PREFIX}.1.down_proj.input_scale;" in defect.message
    files.tensors[f"{PREFIX}.2.down_proj.weight_packed"] = torch.ones(cf.I)
    error, _ = defects(files, tmp_path / "refused")
    assert error.severity == "error" and f"does not read: {PREFIX}.2.down_proj.weight_packed" in error.message


def test_an_input_without_any_scale_has_no_statistics(tmp_path: Path) -> None:
    files = same_gate_up(cf.nvfp4("modelopt"))
    files.tensors = {name: tensor for name, tensor in files.tensors.items() if not name.endswith("down_proj.input_scale")}
    (gate, _, down), (defect,) = examine_layer(Checkpoint.open(files.write(tmp_path)), 1)
    assert down.input_scale is None and gate.input_scale is not None and defect.severity == "warning"
