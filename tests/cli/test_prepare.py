"""The command: arguments in, files in the cache, report out, exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import checkpoint_files as cf
import pytest
import torch

import halfbyte as hb
from halfbyte.cli.main import main
from halfbyte.loading import prepared


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(cf.nvfp4("modelopt").write(tmp_path / "model"))


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["prepare", *arguments, "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)  # stdout is one document; progress goes to stderr


def test_files_are_where_the_report_says_and_are_used(
    model: str, cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = report(capsys, model, "--layout", "hopper")
    assert (first["model"], first["device"]) == (model, "cpu")
    (layer,) = first["layers"]
    assert (layer["layer"], layer["layout"], layer["written"], layer["reason"]) == (1, "hopper", True, "not there")
    assert cache_dir in Path(layer["file"]).parents and Path(layer["file"]).stat().st_size == layer["bytes"] == first["bytes"]
    monkeypatch.setattr(prepared, "stream_experts", None)
    assert hb.load_prepared(model, 1, layout="hopper").layout == "hopper"
    assert [row["reason"] for row in report(capsys, model, "--layout", "hopper")["layers"]] == ["there already"]
    assert [row["reason"] for row in report(capsys, model, "--layout", "hopper", "--verify")["layers"]] == ["verified"]


def test_text(model: str, cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", model, "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "layer   1  canonical" in text and "written: not there" in text and "1 written, 0 kept" in text and f"in {cache_dir}" in text
    assert main(["prepare", model, "--device", "cpu", "--force"]) == 0
    assert "written: forced" in capsys.readouterr().out


def test_a_slice_of_experts_some_layers_and_another_directory(tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("demo", "--layers", "0,2-3", "--experts", "4:8", "--cache-dir", str(tmp_path / "there"))
    done = report(capsys, *arguments)
    assert [row["layer"] for row in done["layers"]] == [0, 2, 3] and not cache_dir.exists()
    assert all(tmp_path / "there" in Path(row["file"]).parents and "experts-4-8" in row["file"] for row in done["layers"])


def test_a_stale_file_is_written_again(model: str, cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, model)
    os.utime(Path(model) / "model.safetensors", (1, 1))
    (row,) = report(capsys, model)["layers"]
    assert row["written"] and "made from another checkpoint" in row["reason"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--layers", "0"], 1, "layer 0 has no routed experts"),
        (["--layers", "1,9"], 1, "there is no layer 9"),
        (["--experts", "2:9"], 1, "contiguous slice"),
        (["--device", "nowhere"], 3, "cannot use the device"),
        (["--cache-dir", "{file}"], 1, "cannot write the file"),
    ],
)
def test_exit_codes(model: str, cache_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str) -> None:
    (file := cache_dir.parent / "file").write_text("")
    assert main(["prepare", model, "--device", "cpu", *(argument.format(file=file) for argument in arguments)]) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and not cache_dir.exists()


def test_a_layout_that_does_not_hold_the_weights_is_1(tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(cf.dense().write(tmp_path / "dense")), "--layout", "hopper", "--device", "cpu"]) == 1
    assert "dense experts" in capsys.readouterr().err
    assert main(["prepare", str(tmp_path / "nowhere"), "--device", "cpu"]) == 1
    assert not cache_dir.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--layout", "best"],
        ["--layers", "5-3"],
        ["--layers", "0-9999999999"],
        ["--layers", "all"],
        ["--experts", "3"],
        ["--experts", "3:3"],
        ["--force", "--verify"],
        ["--compile", "fp4"],
    ],
)
def test_usage_errors(model: str, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", model, *arguments])


def test_fp8_error_of_the_experts_that_are_prepared(model: str, cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, part = (report(capsys, model, "--fp8-error", *options)["fp8_error"] for options in ((), ("--experts", "0:1")))
    assert [row["matrix"] for row in whole] == ["w13", "w2"] and [row["rows"] for row in part] == [row["rows"] // cf.E for row in whole]
    assert main(["prepare", model, "--device", "cpu", "--fp8-error"]) == 0
    assert "layer   1  w13  fp8 tensor cores: " in capsys.readouterr().out
    assert "fp8_error" not in report(capsys, model)


def test_compile_asks_for_every_kind_of_layer_before_anything_is_written(
    cache_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def warm_up(experts: hb.PreparedExperts, top_k: int, **options: object) -> None:
        assert not cache_dir.exists()
        calls.append((experts.layout, experts.num_experts, top_k, experts.activations, options["ids_dtype"]))

    monkeypatch.setattr("halfbyte.moe.warm_up", warm_up)
    compiled = report(capsys, "demo", "--experts", "4:8", "--compile", "bf16,fp8")["compiled"]
    assert compiled["activations"] == ["bf16", "fp8"] and compiled["seconds"] >= 0
    assert len(calls) == 6 and {call[:3] for call in calls} == {("canonical", 4, 4)}  # six layers of one kind
    assert {call[3:] for call in calls} == {(name, dtype) for name in ("bf16", "fp8") for dtype in (torch.int32, torch.int64)}


def test_unknown_family(tmp_path: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Experts are prepared and used; compiling needs the number of experts of a token, which belongs to the routing."""
    files = cf.nvfp4("modelopt")
    files.config = {"model_type": "novel_moe", "hidden_act": "silu"}
    model = str(files.write(tmp_path / "novel"))
    assert main(["prepare", model, "--device", "cpu", "--compile", "bf16"]) == 3
    assert "routing unknown" in capsys.readouterr().err and not cache_dir.exists()
    (layer,) = report(capsys, model)["layers"]
    assert layer["layer"] == 1 and Path(layer["file"]).exists()
    assert torch.equal(hb.load_prepared(model, 1).storage.w2.codes, hb.load_experts(model, 1).w2.codes)


def test_compile_is_refused_where_no_kernel_runs_the_layer_and_does_nothing_for_torch(
    model: str, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", model, "--device", "cpu", "--layout", "hopper", "--compile", "bf16"]) == 3
    assert "no kernel runs fused_moe here" in capsys.readouterr().err and not cache_dir.exists()
    assert main(["prepare", model, "--device", "cpu", "--compile", "bf16"]) == 0
    assert "compiled for bf16 activations" in capsys.readouterr().out
