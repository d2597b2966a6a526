"""`bench serve`, on stand-ins for the engines: what is started with and without halfbyte, refused, skipped, timed and told."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_stand_ins import TINY, write_stand_in
from forked import Module

from halfbyte.bench import serve, serve_worker
from halfbyte.bench.serve import Options, System, bench_serve, keyword_arguments
from halfbyte.bench.serve_client import Answer, Goodput, Requests, summary
from halfbyte.bench.serve_rows import ServerRow, StartRow, ThroughputRow, Workload
from halfbyte.bench.serve_weights import GEOMETRIES
from halfbyte.bench.serve_worker import measure, prompts_of
from halfbyte.cli.main import main
from halfbyte.errors import HalfbyteError

WORKLOADS = (Workload("prefill", 2, 8, 1), Workload("decode", 3, 4, 6))
SYSTEMS = (System("stock"), System("halfbyte"), System("halfbyte", "fp8"))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """(name) installs that stand-in; the function returned reads what it was started with."""
    log = tmp_path / "log"

    def install(name: str) -> Callable[[], list[dict[str, Any]]]:
        write_stand_in(tmp_path, name)
        paths = (str(tmp_path), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", ""))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        monkeypatch.setenv("STAND_IN_LOG", str(log))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.setitem(GEOMETRIES, "tiny", TINY)
        return lambda: [json.loads(line) for line in log.read_text().splitlines()]

    return install


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of systems start in no time. Other tests start them as users do."""
    monkeypatch.setattr(serve, "subprocess", SimpleNamespace(Popen=Module, PIPE=subprocess.PIPE))


def options(name: str, **more: Any) -> Options:
    return Options(**{"engine": name, "version": "1.0", "model": "", "geometry": "tiny", "workloads": WORKLOADS, **more})


def test_each_system_runs_alone_on_the_same_weights(engine, forked_workers) -> None:
    started = engine("vllm")
    rows = list(bench_serve(options("vllm"), SYSTEMS))
    stock, *ours = started()
    assert stock["plugins"] == "none" and "additional_config" not in stock
    assert [given["additional_config"] for given in ours] == [{"halfbyte": {"activations": kind, "strict": True}} for kind in ("bf16", "fp8")]
    assert all(given["plugins"] is None for given in ours)
    assert {given["model"] for given in (stock, *ours)} == {str(TINY.directory())}  # by which engines find what they compiled before

    starts = [row for row in rows if isinstance(row, StartRow)]
    assert [row.system for row in starts] == ["stock", "halfbyte", "halfbyte, fp8"] and {row.status for row in starts} == {"ok"}
    assert all(0 < row.layer_error < 4e-3 and row.repeats and row.kv_tokens == 160 and row.start_s > 0 for row in starts)
    assert all(row.checked == "layers.0.experts at 1, 16 tokens" and row.processing_s is not None for row in starts)

    timed = [row for row in rows if isinstance(row, ThroughputRow)]
    assert [row.workload for row in timed] == [*WORKLOADS] * 3 and {row.status for row in timed} == {"ok"}
    for row in timed:
        assert row.samples >= 2 and row.spread >= 0 and row.tokens_per_s == pytest.approx(row.workload.tokens / row.seconds)
        base = next(one for one in timed if one.workload == row.workload)
        assert row.speedup == (None if row is base else pytest.approx(base.seconds / row.seconds))


@pytest.mark.slow
def test_sglangs_own_process_is_watched(engine) -> None:
    started = engine("sglang")
    start, *timed = bench_serve(options("sglang"), SYSTEMS[1:2])
    (given,) = started()
    assert json.loads(given["json_model_override_args"]) == {"halfbyte": {"activations": "bf16", "strict": True}} and given["plugins"] is None
    assert start.status == "ok" and 0 < start.layer_error < 4e-3 and start.kv_tokens == 160 and start.processing_s is not None
    assert [row.status for row in timed] == ["ok", "ok"]
    assert serve._environment("sglang", System("marlin"))["SGLANG_PLUGINS"] == "none"


def test_a_wrong_layer_gets_no_time(engine, forked_workers) -> None:
    engine("vllm")
    start, *timed = bench_serve(options("vllm", engine_options=("--stand-in", "wrong")), SYSTEMS[1:2])
    assert len(timed) == 2 and all(row.status == "refused" and "from fp32 (limit 5e-03)" in row.reason for row in (start, *timed))
    assert start.layer_error == pytest.approx(0.1, rel=0.01) and all(row.seconds is None for row in timed)


def test_an_engine_that_ends_is_skipped_and_nothing_is_compared_with_it(engine, forked_workers) -> None:
    engine("vllm")
    given = options("vllm", engine_options=("--stand-in", "broken"), workloads=WORKLOADS[:1])
    *ours, start, timed = bench_serve(given, [System("halfbyte"), System("stock")])
    assert [(row.system, row.status, row.reason) for row in ours] == [("halfbyte", "skipped", "the engine ended: RuntimeError: no kernel image")] * 2
    assert (start.system, start.status, timed.status, timed.speedup) == ("stock", "ok", "ok", None)


def test_an_engine_of_its_own_may_repeat_nothing_and_is_told() -> None:
    row = StartRow("m", "vllm 1.0", "stock", "ok", layer_error=6e-3, repeats=False)
    assert serve._judged(row, System("stock")).status == "ok"
    assert serve._judged(row, System("halfbyte")).status == "refused"
    unchecked = StartRow("m", "vllm 1.0", "stock", "ok", checked="not, it wants a forward context")
    assert serve._judged(unchecked, System("humming")).status == "ok"
    assert "no layer was compared" in serve._judged(unchecked, System("halfbyte")).reason


def test_a_system_that_takes_too_long_is_ended(engine) -> None:
    engine("vllm")
    rows = list(bench_serve(options("vllm", limit_s=0.2), SYSTEMS[:1]))
    assert [row.status for row in rows] == ["skipped"] * 3


def test_a_server_under_load(engine, tmp_path: Path) -> None:
    started = engine("vllm")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"vocab_size": 100}')
    asked, given = Requests(6, 3, 4, 5), options("vllm", model=str(tmp_path / "model"), geometry="", goodput=Goodput(tpot_ms=1e-3))
    rows = [serve._serve(given, system, asked, tmp_path) for system in (System("humming"), System("halfbyte", "fp8"))]
    for row in rows:
        assert isinstance(row, ServerRow) and row.status == "ok" and row.completed == 6 and row.request_goodput == 0
        assert 5 < row.median_tpot_ms <= row.p99_tpot_ms and row.output_throughput == pytest.approx(30 / row.duration)
    stock, ours = started()
    assert stock["plugins"] == "none" and stock["server"][-2:] == ["--moe-backend", "humming"]
    assert ours["plugins"] is None and json.loads(ours["server"][-1]) == {"halfbyte": {"activations": "fp8"}}


def test_numbers_of_a_server() -> None:
    answers = [Answer(ttft, tpot, 10) for ttft, tpot in ((10.0, 1.0), (20.0, 2.0), (30.0, 3.0), (100.0, 4.0))]
    numbers = summary(answers, 2.0, Goodput(ttft_ms=30, tpot_ms=2.5))
    assert numbers["request_goodput"] == 1.0 and numbers["request_throughput"] == 2.0 and numbers["output_throughput"] == 20.0
    assert numbers["mean_ttft_ms"] == 40.0 and numbers["median_ttft_ms"] == 25.0 and numbers["p99_ttft_ms"] == pytest.approx(97.9)
    assert numbers["median_tpot_ms"] == 2.5 and summary(answers, 2.0, Goodput())["request_goodput"] is None


class Counting:
    """An engine that gives `extra` tokens more than it is asked for, and other ones each time if it is `wobbly`."""

    def __init__(self, extra: int = 0, wobbly: bool = False):
        self.extra, self.wobbly, self.calls = extra, wobbly, []

    def generate(self, prompts, tokens_out):
        self.calls.append((prompts, tokens_out))
        return [[len(self.calls) if self.wobbly else 1] * (tokens_out + (self.extra if tokens_out == 6 else 0)) for _ in prompts]

    def facts(self):
        return {}


def plan(**more: Any) -> serve.Plan:
    fields = {"engine": "vllm", "system": "stock", "activations": "bf16", "model": "", "geometry": "", "seed": 0, "options": {}, "scratch": ""}
    return serve.Plan(**{**fields, "workloads": [vars(workload) for workload in WORKLOADS], "repeats": 2, **more})


def test_a_workload_is_warmed_and_repeated_and_decoding_is_what_one_token_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_worker, "_ENOUGH_S", 0.0)
    engine = Counting()
    start, *_ = measure(plan(), lambda _: engine, 100)
    assert start["start"]["repeats"] is True and start["start"]["start_s"] > 0
    first, _, _, *calls = [(len(prompts), len(prompts[0]), tokens_out) for prompts, tokens_out in engine.calls]
    assert first == (1, 64, 1)
    assert calls == [(2, 8, 1)] * 3 + [(3, 4, 6)] * 3 + [(3, 4, 1)] * 2


def test_a_short_workload_is_timed_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_worker, "_timed", lambda _, prompts, tokens_out: 0.125 * tokens_out)
    _, prefill, decode = measure(plan(), lambda _: Counting(), 100)
    assert (prefill["samples"], prefill["seconds"]) == (4, 0.125) and (decode["samples"], decode["seconds"]) == (2, 0.625)


def test_other_tokens_the_second_time_are_seen() -> None:
    assert next(measure(plan(), lambda _: Counting(wobbly=True), 100))["start"]["repeats"] is False


def test_a_wrong_number_of_tokens_is_an_error() -> None:
    with pytest.raises(HalfbyteError, match=r"another number of tokens \(given \[7\]; needed 6\)"):
        list(measure(plan(), lambda _: Counting(extra=1), 100))


def test_prompts_are_the_same_in_every_process_and_differ_by_seed() -> None:
    first = prompts_of(WORKLOADS[0], 5000, 0)
    assert first == prompts_of(WORKLOADS[0], 5000, 0) != prompts_of(WORKLOADS[0], 5000, 1)
    assert all(1000 <= token < 5000 for prompt in first for token in prompt)


def test_command_writes_rows_that_report_reads(engine, forked_workers, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine("vllm")
    out = tmp_path / "rows.jsonl"
    command = ["bench", "serve", "--geometry", "tiny", "--engine", "vllm", "--prefill", "2x8", "--decode", "none", "--json"]
    command += ["--logs", str(tmp_path / "logs")]
    assert main([*command, "--out", str(out), "--", "--max-model-len", "64"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    logs = {log.name: log.read_text() for log in (tmp_path / "logs").iterdir()}
    assert sorted(logs) == ["tiny-vllm-halfbyte-bf16-offline.log", "tiny-vllm-stock-bf16-offline.log"]
    assert all("a line of the engine's own" in log for log in logs.values())
    assert [row["system"] for row in rows] == ["stock", "stock", "halfbyte", "halfbyte"]
    assert main(["bench", "report", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "tiny in vllm 1.0, prefill of 8 tokens" in printed and "| 2 | halfbyte |" in printed


def test_halfbyte_alone_is_the_system_that_others_are_compared_with(engine, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    engine("vllm")

    @contextmanager
    def worker(plan: serve.Plan, system: System, log: Path, limit_s: float | None) -> Iterator[Iterator[dict[str, Any]]]:
        """Its events, without its process."""
        log.write_text("")
        start = {"start_s": 1.0, "repeats": True, "layer_error": 1e-3, "checked": "a layer"}
        yield iter([{"start": start}, {"index": 0, "seconds": 3.0 if system.activations == "bf16" else 2.0, "spread": 0.0, "samples": 2}])

    monkeypatch.setattr(serve, "_worker", worker)
    command = ["bench", "serve", "--geometry", "tiny", "--engine", "vllm", "--against", "none", "--activations", "bf16,fp8"]
    assert main([*command, "--prefill", "2x8", "--decode", "none", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["system"], row.get("speedup")) for row in rows if "seconds" in row] == [("halfbyte", None), ("halfbyte, fp8", 1.5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "vllm"], "give either MODEL or --geometry"),
        (["demo", "--geometry", "qwen3-30b", "--engine", "vllm"], "give either MODEL or --geometry"),
        (["--geometry", "qwen3-30b", "--engine", "vllm", "--server", "8x8x8@2"], "--server needs MODEL"),
        (["demo", "--engine", "vllm", "--goodput", "ttft:5"], "--goodput is of --server"),
        (["demo", "--engine", "sglang", "--against", "stock,humming"], "sglang has no backend humming"),
        (["demo", "--engine", "vllm", "--decode", "1x8x1"], "decodes nothing after the first token"),
        (["demo", "--engine", "vllm", "--prefill", "8"], "'8' is not prompts x tokens in"),
        (["demo", "--engine", "vllm", "--goodput", "itl:5", "--server", "1x1x2"], "is not limits in ms"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "serve", *arguments])
    assert message in capsys.readouterr().err


def test_options_of_a_command_line_as_keyword_arguments() -> None:
    given = ["--tensor-parallel-size", "2", "--enforce-eager", "--compilation-config", '{"mode": 0}', "--quantization=modelopt_fp4"]
    expected = {"tensor_parallel_size": 2, "enforce_eager": True, "compilation_config": {"mode": 0}, "quantization": "modelopt_fp4"}
    assert keyword_arguments(given) == expected
