"""`halfbyte inspect` on good and bad checkpoints: what is printed, and the exit code."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import checkpoint_files as cf
import pytest
import torch

import halfbyte
from halfbyte.cli import inspect
from halfbyte.cli.main import main
from halfbyte.errors import CheckpointError
from halfbyte.weights.hopper.rounding_fp8 import weight_error

DEMO = str(Path(halfbyte.__file__).parent / "demo_model")


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    return inspect.run(parser.parse_args(arguments))


def test_demo_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(DEMO) == 0
    out = capsys.readouterr().out
    assert "qwen3_moe, dense" in out and "6 layers, MoE in 0..5; 16 experts, top 4 by renormalize" in out and out.endswith("no problems found\n")
    (experts,) = [line.split() for line in out.splitlines() if line.split()[:1] == ["experts"]]
    assert experts == ["experts", "288", "18.00", "9,437,184", "16"]


def test_nvfp4_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cf.nvfp4("modelopt").write(tmp_path)
    assert run(str(path)) == 0  # a warning is no failure
    out = capsys.readouterr().out
    assert "modelopt NVFP4" in out and "warning: layer 1: gate and up have different global scales" in out
    (down,) = [line.split() for line in out.splitlines() if line.split()[1:2] == ["down"]]
    assert down[0] == "1" and down[-2:] == ["0.0625..0.25", "0.0002441..0.0009766"]
    assert run(str(path), "--json", "--tensors") == 0
    report = json.loads(capsys.readouterr().out)
    experts = next(row for row in report["sizes"] if row["kind"] == "experts")
    weights = 3 * cf.E * cf.H * cf.I
    assert experts["weights"] == weights and experts["bytes"] == weights * 9 // 16 + 2 * 4 * 3 * cf.E
    assert report["quantization"] == {"kind": "modelopt", "format": "nvfp4"} and report["moe"]["moe_layers"] == [1]
    total = report["sizes"][-1]
    assert total["kind"] == "total" and total["tensors"] == len(report["tensors"]) == 4 * 3 * cf.E + 1
    assert report["tensors"][0]["file"] == "model.safetensors"


@pytest.mark.parametrize("make", [lambda: cf.gpt_oss()[0], cf.deepseek_v4, cf.compressed_tensors_mxfp4])
def test_bits_per_weight_of_mxfp4(make: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make()  # type: ignore[operator]
    files.tensors = {name: tensor for name, tensor in files.tensors.items() if not name.endswith("_bias")}
    # The hand-made V4 and gpt-oss files hold layer 1 only.
    run(str(files.write(tmp_path)), "--json", "--layer", "1")
    report = json.loads(capsys.readouterr().out)
    assert next(row for row in report["sizes"] if row["kind"] == "experts")["bits_per_weight"] == 4.25
    problems = [problem["message"] for problem in report["problems"]]
    assert len(problems) == (make not in (cf.deepseek_v4, cf.compressed_tensors_mxfp4))  # gpt-oss has biases
    assert all("missing tensor: model.layers.1.mlp.experts.gate_up_proj_bias" in message for message in problems)
    assert {row["layer"] for row in report["scales"]} == {1}


def test_errors_make_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = cf.nvfp4("modelopt")
    files.tensors["model.layers.1.mlp.experts.0.up_proj.weight_scale_2"] = torch.tensor(torch.nan)
    path = str(files.write(tmp_path))
    assert run(path) == 1
    assert "error: layer 1: " in capsys.readouterr().out
    assert run(path, "--json") == 1
    assert json.loads(capsys.readouterr().out)["problems"][0]["severity"] == "error"


def test_layer_out_of_range_or_dense(tmp_path: Path) -> None:
    path = str(cf.dense().write(tmp_path))
    with pytest.raises(CheckpointError, match=r"there is no layer 2 .given 2; needed one of the MoE layers 1"):
        run(path, "--layer", "2")
    with pytest.raises(CheckpointError, match="layer 0 has no routed experts"):
        run(path, "--layer", "0")


def test_unknown_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything but the routing is told, and the activation where hidden_act tells it."""
    files = cf.nvfp4("modelopt")
    files.config = {"model_type": "novel_moe", "hidden_act": "silu"}
    path = str(files.write(tmp_path))
    assert run(path) == 0
    unknown = "3 experts, routing unknown (model_type 'novel_moe' is not one halfbyte knows); hidden 64, expert intermediate 32, swiglu"
    assert unknown in capsys.readouterr().out
    assert run(path, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["moe"]["routing"] is None and report["moe"]["moe_layers"] == [1] and len(report["scales"]) == 3
    del files.config["hidden_act"]
    assert run(str(files.write(tmp_path))) == 0
    printed = capsys.readouterr().out
    assert "expert intermediate 32, activation unknown" in printed and "warning: layer 1: the activation is unknown" in printed


def test_sizes_by_kind() -> None:
    kinds = {row["kind"]: row for row in inspect.describe(DEMO)["sizes"]}
    assert sum(row["bytes"] for kind, row in kinds.items() if kind != "total") == kinds["total"]["bytes"]
    assert kinds["embeddings"]["weights"] == 2048 * 256 and kinds["router"]["weights"] == 6 * 16 * 256


def test_fp8_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `weight_error` of the whole layer; MXFP4 that spans few octaves is exact; dense experts have none."""
    nvfp4, mxfp4 = cf.nvfp4("modelopt").write(tmp_path / "nvfp4"), cf.gpt_oss()[0].write(tmp_path / "mxfp4")
    assert run(str(nvfp4), "--fp8-error", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["fp8_error"]
    expected = weight_error(halfbyte.load_experts(nvfp4, 1))
    assert [(row["layer"], row["matrix"], row["rounded_rows"], row["rows"]) for row in rows] == [
        (1, name, expected[name].rows, cf.E * rows) for name, rows in (("w13", 2 * cf.I), ("w2", cf.H))
    ]
    assert all(row["relative"] == pytest.approx(expected[row["matrix"]].relative) and 0.005 < row["relative"] < 0.1 for row in rows)
    assert run(str(nvfp4), "--fp8-error") == 0
    assert f"w2   fp8 tensor cores: {expected['w2'].relative:.3%} of the weights' norm" in capsys.readouterr().out
    run(str(mxfp4), "--fp8-error", "--layer", "1")
    assert capsys.readouterr().out.count("exact") == sum(error.rows == 0 for error in weight_error(halfbyte.load_experts(mxfp4, 1)).values())
    assert run(DEMO, "--fp8-error", "--layer", "0") == 0 and "no FP4 experts" in capsys.readouterr().out
    run(str(nvfp4), "--json")
    assert "fp8_error" not in json.loads(capsys.readouterr().out)


def test_fp8_error_of_a_broken_layer_is_its_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = cf.nvfp4("modelopt")
    del files.tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert run(str(files.write(tmp_path)), "--fp8-error", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["fp8_error"] == [] and report["problems"]


def test_names_do_not_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = cf.nvfp4("modelopt")
    files.tensors["notes\x1b[2J\u202eweight"] = torch.zeros(1)
    path = files.write(tmp_path)
    assert main(["inspect", str(path), "--tensors"]) == 0
    printed = capsys.readouterr().out
    assert "notes\\x1b[2J\\u202eweight" in printed and "\x1b" not in printed and "\u202e" not in printed
    (path / "config.json").write_text(json.dumps({**files.config, "hidden_size": "\x1b]0;title\x07"}))
    assert main(["inspect", str(path)]) == 1
    message = capsys.readouterr().err
    assert "hidden_size does not fit" in message and not any(character in message for character in "\x1b\x07")
