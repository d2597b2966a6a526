"""The command: arguments in, report out, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoint_files as cf
import pytest
import torch
from helpers import assert_equal_bits

import halfbyte as hb
from halfbyte.cli.main import main


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(cf.dense().write(tmp_path / "in"))


def test_report_as_json_and_as_text(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", source, str(tmp_path / "a"), "--format", "mxfp4", "--scale-rule", "even", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)  # stdout is one document; progress goes to stderr
    assert (report["format"], report["output"], report["matrices"]) == ("mxfp4", "compressed-tensors", 9)
    assert main(["quantize", source, str(tmp_path / "b"), "--four-over-six", "--max-shard-size", "4KB"]) == 0
    text = capsys.readouterr().out
    assert "nvfp4, modelopt" in text and "SQNR" in text and "gate" in text
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 2


def test_what_files_call_things_drives_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    files = cf.dense()
    files.tensors = {name.replace("model.", "mo\x1b[2Jdel."): tensor for name, tensor in files.tensors.items()}
    source = files.write(tmp_path / "in\x1b[2J")
    (source / "no\x1b[2Jtes").symlink_to(tmp_path)
    (source / "out\x1b[2J.json").symlink_to(Path(hb.__file__))
    for command in ("quantize", "inspect", "prepare"):
        assert main([command, str(source), *([str(tmp_path / "a")] if command == "quantize" else [])]) == 0
    printed = capsys.readouterr()
    assert "mo\\x1b[2Jdel.layers.1.mlp.experts." in printed.out and "\x1b" not in printed.out + printed.err
    assert "out\\x1b[2J.json is a link" in caplog.text and "\x1b" not in caplog.text


def test_dry_run(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", source, str(tmp_path / "a"), "--dry-run"]) == 0
    assert "would become" in capsys.readouterr().out and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--format", "mxfp4", "--output", "modelopt"], 2, "modelopt checkpoints do not exist in MXFP4"),
        (["--scale-rule", "floor"], 2, "belongs to mxfp4"),
        (["--skip", "no.such.*"], 1, "matches no module"),
        (["--device", "nowhere"], 3, "cannot use the device"),
        (["--calibrate", "/dev/zero"], 1, "/dev/zero: not a regular file"),
    ],
)
def test_exit_codes(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str) -> None:
    assert main(["quantize", source, str(tmp_path / "a"), *arguments]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_unknown_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read back as what plain quantisation makes of each matrix."""
    files = cf.dense()
    files.config = {"model_type": "novel_moe", "hidden_act": "silu"}
    assert main(["quantize", str(files.write(tmp_path / "in")), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["matrices"] == 9
    weights = hb.load_experts(tmp_path / "out", 1)
    assert_equal_bits(weights.dequantize().w13, torch.stack([hb.quantize(w13, hb.NVFP4).dequantize() for w13 in files.w13]))
    assert_equal_bits(weights.dequantize().w2, torch.stack([hb.quantize(w2, hb.NVFP4).dequantize() for w2 in files.w2]))


def test_unsupported_source_is_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = cf.nvfp4("modelopt").write(tmp_path / "in")
    assert main(["quantize", str(source), str(tmp_path / "a")]) == 3
    assert "already quantised" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--experts-only", "--all-linear"], ["--max-shard-size", "many"], ["--max-shard-size", "0"], ["--max-shard-size", "9" * 400 + "GB"]]
)
def test_usage_errors(source: str, tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", source, str(tmp_path / "a"), *arguments])
