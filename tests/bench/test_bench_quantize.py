"""The benchmark of the quantisers: what is timed, refused and skipped, and the command around it."""

from __future__ import annotations

import json

import pytest
import torch

import halfbyte
from halfbyte.bench import quantize
from halfbyte.bench.ceilings import Ceilings
from halfbyte.bench.quantize import QuantizeCase, bench_quantize
from halfbyte.cli.main import main

CPU = torch.device("cpu")
CEILINGS = Ceilings(30.0, 30.0, 0.2, None)
CASE = QuantizeCase(5, 64, "nvfp4", "128x4")
GROUPED = QuantizeCase(5, 64, "mxfp4", "8x4", num_experts=3)


def test_right_bits_are_timed():
    for case in (CASE, GROUPED):
        (row,) = bench_quantize([case], ["halfbyte"], CPU, CEILINGS)
        assert row.status == "ok" and row.timer == "wall clock" and row.calls == 8
        assert row.gbps == pytest.approx(case.nbytes / row.median_us / 1e3) and row.fraction == pytest.approx(row.gbps / 30)


def test_wrong_bits_are_refused(monkeypatch):
    right = halfbyte.quantize

    def swapped(x, *args, **kwargs):
        return right(x.flip(0), *args, **kwargs)

    monkeypatch.setattr(halfbyte, "quantize", swapped, raising=False)
    (row,) = bench_quantize([CASE], ["halfbyte"], CPU, CEILINGS)
    assert row.status == "refused" and row.median_us is None and "bytes differ" in row.reason


def test_gpu_kernels_say_that_they_need_one():
    rows = list(bench_quantize([CASE, GROUPED], ["naive", "scan"], CPU, CEILINGS))
    assert [(row.system, row.status) for row in rows] == [("naive", "skipped"), ("naive", "skipped"), ("scan", "skipped")]
    assert all("needed a CUDA GPU" in row.reason for row in rows)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("halfbyte.bench.ceilings.measure_ceilings", lambda device: CEILINGS)


def test_command(quick, capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    command = ["bench", "quantize", "--rows", "3,130", "--width", "64", "--format", "nvfp4,mxfp4", "--experts", "0,2", "--device", "cpu"]
    assert main([*command, "--out", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["rows"]) == 8 + 8 and {row["status"] for row in document["rows"] if row["system"] == "halfbyte"} == {"ok"}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"] for line in lines] == document["rows"] and {line["benchmark"] for line in lines} == {"quantize"}
    assert main(["bench", "report", str(out), "--json"]) == 0
    assert [row for table in json.loads(capsys.readouterr().out)["tables"] for row in table["rows"]] == document["rows"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "### K 64 to MXFP4, scales 128x4, 2 experts\n" in printed and "| 130 | halfbyte |" in printed
    assert "- naive at 3, 130 rows skipped: " in printed


def test_nothing_timed_is_exit_3(quick, capsys):
    assert main(["bench", "quantize", "--systems", "naive", "--device", "cpu"]) == 3
    assert "needed a CUDA GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "4x4"], "unknown layout '4x4'; choose from linear, 128x4, 8x4"),
        (["--systems", "cutlass"], "unknown system 'cutlass'; choose from halfbyte, naive, scan, search"),
        (["--rows", "0"], "'0' is not an integer of at least 1"),
        (["--experts", "-1"], "'-1' is not a number of experts from 0 to 65536"),
        (["--format", "int4"], "unknown format"),
        (["--width", "72", "--device", "cpu"], "72 does not divide into NVFP4 blocks of 16"),
    ],
)
def test_wrong_usage_exits_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["bench", "quantize", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_every_system_is_right_on_a_gpu():
    cases = [QuantizeCase(130, 7168, "nvfp4", layout, experts) for layout in ("linear", "128x4") for experts in (0, 40)]
    rows = list(bench_quantize(cases, quantize.SYSTEMS, torch.device("cuda"), CEILINGS))
    assert [row.system for row in rows if row.status == "ok"] == ["halfbyte", "naive", "halfbyte", "scan", "search"] * 2, rows
