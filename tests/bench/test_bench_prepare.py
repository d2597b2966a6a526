"""The benchmark of `prepare`: who is compared, what is refused, and the command around it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

import halfbyte
from halfbyte.bench import prepare
from halfbyte.bench.inputs import random_experts
from halfbyte.bench.prepare_peers import naive_hopper, torch_hopper
from halfbyte.bench.shapes import MoEShape
from halfbyte.cli.main import main
from halfbyte.experts import RELU2

CPU = torch.device("cpu")
PLAIN = MoEShape("plain", 160, 96, 3, 2, RELU2)
BIASED = MoEShape("biased", 64, 96, 2, 1, has_bias=True)


@pytest.mark.parametrize("format", [halfbyte.NVFP4, halfbyte.MXFP4], ids=repr)
@pytest.mark.parametrize("shape", [PLAIN, BIASED], ids=lambda shape: shape.name)
def test_peers_and_prepare_agree_byte_by_byte(shape: MoEShape, format: halfbyte.BlockFormat) -> None:
    w = random_experts(shape, format, CPU, seed=0)
    w.w13.scales.view(torch.uint8)[:, ::5, 1] = 0
    expected = halfbyte.prepare(w, "hopper").storage.tensors
    for peer in (naive_hopper, torch_hopper):
        assert prepare._same_bytes(peer(w).tensors, expected)


def test_every_way_is_timed() -> None:
    w = random_experts(PLAIN, halfbyte.NVFP4, CPU, seed=0)
    rows = list(prepare.bench_prepare("plain", w, "hopper", 10.0, few_experts=2, layers=2))
    sizes = [("naive", 2, 1), ("torch", 3, 1), ("halfbyte", 3, 2), ("halfbyte, in place", 3, 2)]
    assert [(row.method, row.num_experts, row.layers) for row in rows] == sizes
    for row in rows:
        assert row.status == "ok" and row.ms > 0 and row.copy_fraction == row.gbps / 10.0 and row.extra_bytes >= 0
    moved = w.nbytes + halfbyte.prepare(w, "hopper").nbytes
    assert rows[2].gbps == pytest.approx(moved / rows[2].ms / 1e6) and rows[0].speedup == 1.0


def test_wrong_bytes_have_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def wrong(w: halfbyte.ExpertWeights) -> object:
        result = torch_hopper(w)
        result.w2.words[-1, -1, -1, -1] ^= 1
        return result

    naive, peer = prepare.PEERS["hopper"]
    monkeypatch.setitem(prepare.PEERS, "hopper", (replace(naive, pack=wrong), peer))
    assert main(["bench", "prepare", "--device", "cpu", "--shape", "64,64,4", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["status"] for row in rows] == ["refused", "ok", "ok", "ok"] and rows[0]["ms"] is None and rows[2]["speedup"] is None
    assert rows[0]["reason"] == "its bytes differ from those of the other ways"


def test_the_command(tmp_path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "rows.jsonl"
    command = ["bench", "prepare", "--device", "cpu", "--shape", "64,96,4", "--format", "mxfp4", "--naive-experts", "1", "--out", str(file)]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert re.search(r"\| 1 \| halfbyte, in place \| [\d.]+ \| 4 \|", captured.out)
    assert "64,96,4 MXFP4, layout hopper, 1 layer, naive: " in captured.err
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["row"]["method"] for line in lines] == ["naive", "torch", "halfbyte", "halfbyte, in place"]
    assert all(line["benchmark"] == "prepare" and line["ceilings"]["copy_gbps"] > 0 and line["row"]["format"] == "mxfp4" for line in lines)
    assert main(["bench", "report", str(file)]) == 0
    assert captured.out in capsys.readouterr().out
