"""`bench dispatch` on gloo: every way is measured, and its bytes are those that a rank receives, counted here by hand."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from ranks import run_ranks

from halfbyte.bench import dispatch, dispatch_layers, together
from halfbyte.bench.dispatch import DispatchRow, Options, bench_dispatch, costs_of, row_of
from halfbyte.bench.shapes import MoEShape
from halfbyte.cli.main import main
from halfbyte.distributed.costs import Costs
from halfbyte.moe.parallel import ExpertParallel

SHAPE = MoEShape("tiny", hidden=64, intermediate=32, num_experts=8, top_k=2)
SLOTS = 2 * 8  # bytes of ids and weights of a token


def check_rows(rank: int, world: int) -> None:
    together._SAMPLES = 4  # fewer than a time needs, but times are not what is checked
    dispatch.INPUT_SETS = dispatch_layers.INPUT_SETS = 1
    ep = ExpertParallel(None, SHAPE.num_experts)
    options = Options(tokens=(4,), layer_tokens=(3,), spreads=("even", "skewed", "partly-empty"), activations=("fp8",))
    rows = list(bench_dispatch(SHAPE, ep, options, ceiling=None))
    assert all(row.status == "ok" and row.median_us > 0 and row.fraction is None for row in rows)
    of = {(row.step, row.tokens_spread, row.num_tokens, row.system): row for row in rows}
    assert len(of) == len(rows) == 3 * (4 + 3) + 3 * 4
    assert of["dispatch", "skewed", 4, "gloo fp4"].sizes == (4, 2)
    assert of["dispatch", "skewed", 4, "gloo fp4"].received_bytes == 4 * (32 + 4 + SLOTS)
    assert of["dispatch", "partly-empty", 4, "gloo fp8"].received_bytes == 4 * (64 + 4 + SLOTS)
    assert of["dispatch", "partly-empty", 4, "padded bf16 all-gather"].received_bytes == 4 * (128 + SLOTS)
    assert of["combine", "even", 4, "gloo bf16"].received_bytes == 4 * 128 and of["combine", "even", 4, "gloo fp8"].received_bytes == 4 * 68
    assert of["layer", "even", 3, "gloo fp8 + bf16"].received_bytes == 3 * (64 + 4 + SLOTS + 128)
    assert of["layer", "partly-empty", 3, "gloo fp8 + bf16"].received_bytes == 3 * (64 + 4 + SLOTS + 128)
    assert of["layer", "even", 3, "gloo fp8 + bf16"].tflops > 0
    assert of["layer", "even", 3, "experts alone, fp8"].received_bytes == 0
    assert row_of(json.loads(json.dumps(asdict(rows[0])))) == rows[0]


def test_every_way_is_measured() -> None:
    run_ranks(check_rows, 2)


def test_costs_are_the_line_through_two_sizes() -> None:
    def row(step: str, tokens: int, nbytes: int, us: float, payload: str = "bf16") -> DispatchRow:
        return DispatchRow("tiny", 2, step, "even", tokens, (tokens,) * 2, f"nccl {payload}", "ok", received_bytes=nbytes, median_us=us)

    rows = [row("dispatch", 1, 1000, 11.0), row("dispatch", 9, 9000, 19.0), row("dispatch", 1, 500, 12.5, "fp8"), row("combine", 1, 1000, 11.0)]
    costs = costs_of(rows, ["nccl"])
    assert (costs.dispatch["nccl"].latency_us, costs.dispatch["nccl"].gbps) == (10.0, 1.0)
    assert costs.encode["nccl"].latency_us == 1.5 and costs.combine == Costs().combine  # one size is no line


def test_it_wants_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["bench", "dispatch"]) == 1
    assert "torchrun" in capsys.readouterr().err
