"""The benchmark of the MoE layer: what is timed, refused and skipped, and the command around it."""

import json
import os

import pytest
import torch

from halfbyte import NVFP4
from halfbyte.bench import moe
from halfbyte.bench.ceilings import Ceilings
from halfbyte.bench.inputs import random_experts
from halfbyte.bench.moe import Options, bench_moe
from halfbyte.bench.peers import Peer, ReferenceLayer, find_peer
from halfbyte.bench.shapes import MoEShape
from halfbyte.cli.main import main

CPU = torch.device("cpu")
TINY = MoEShape("tiny", 64, 32, 4, 2)
CEILINGS = Ceilings(30.0, 30.0, 0.2, None)
COMMAND = ["bench", "moe", "--shape", "64,32,4,2", "--device", "cpu"]


def tiny(device):
    return TINY, random_experts(TINY, NVFP4, device, seed=0)


def peer(name, change):
    """The reference layer with its output changed."""

    def build(weights, shape):
        reference = ReferenceLayer(weights, shape)
        return lambda *call: change(reference(*call))

    return Peer(name, lambda: build)


def rows_of(*peers, **options):
    rows = list(bench_moe([tiny], peers, Options(tokens=(1, 5), **options), CPU, CEILINGS))
    return {(row.system, row.num_tokens): row for row in rows}


def test_a_right_result_is_timed():
    row = rows_of()["halfbyte", 5]
    assert row.status == "ok" and row.median_us > 0 and row.fraction == row.floor_us / row.median_us and row.timer == "wall clock"
    assert row.token_error < 1e-2 and row.global_error < 5e-3 and 1 <= row.experts_touched <= 4 and row.kernel == "reference, canonical"
    assert row.calls == 8 and row.weight_sets == 1 and row.peak_extra_bytes is None and row.reason == ""


@pytest.mark.parametrize("change", [lambda y: y / 2, torch.zeros_like, torch.neg, lambda y: y * torch.nan, lambda y: y[:, :-1]])
def test_a_wrong_result_is_refused_a_time(change):
    rows = rows_of(peer("wrong", change), peer("right", torch.clone))
    assert {rows["wrong", tokens].status for tokens in (1, 5)} == {"refused"}
    assert all(rows["wrong", tokens].median_us is None and "the result is wrong" in rows["wrong", tokens].reason for tokens in (1, 5))
    assert rows["right", 5].status == "ok" and rows["halfbyte", 5].status == "ok"


def test_a_kernel_of_ours_that_is_wrong_is_refused(monkeypatch):
    right = moe.HalfbyteLayer.__call__
    monkeypatch.setattr(moe.HalfbyteLayer, "__call__", lambda self, *call: right(self, *call) / 2)
    assert rows_of(peer_limit=0.9)["halfbyte", 1].status == "refused"


def test_an_untouched_output_is_not_the_last_right_answer():
    rows = rows_of(Peer("lazy", lambda: lambda weights, shape: lambda hidden, ids, weights: torch.empty_like(hidden)))
    assert rows["lazy", 5].status == "refused"


def test_peers_that_cannot_run_are_skipped_with_their_reason(tmp_path):
    file = tmp_path / "absent_software.py"
    file.write_text("import no_such_engine\n")
    no_build = tmp_path / "no_build.py"
    no_build.write_text("")

    def crash(weights, shape):
        def layer(*call):
            raise KeyError("a bug of theirs")

        return layer

    rows = rows_of(find_peer(str(file)), find_peer(str(no_build)), Peer("crashes", lambda: crash))
    assert rows["absent_software", 1].reason == "ModuleNotFoundError: No module named 'no_such_engine'"
    assert rows["no_build", 1].reason.startswith("AttributeError") and rows["crashes", 5].reason == "KeyError: 'a bug of theirs'"
    assert {row.status for (system, _), row in rows.items() if system != "halfbyte"} == {"skipped"}


def test_a_mistake_of_ours_ends_the_run(monkeypatch):
    def mistake(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(moe.HalfbyteLayer, "__call__", mistake)
    with pytest.raises(ZeroDivisionError):
        rows_of()


def test_a_spent_budget_is_told():
    rows = rows_of(find_peer("reference"), budget_s=-1.0)
    assert {(row.status, row.reason) for row in rows.values()} == {("skipped", "the time budget is spent")} and len(rows) == 4


def test_quantised_activations_have_their_own_reference():
    rows = rows_of(find_peer("reference"), activations="fp8")
    assert rows["halfbyte", 5].activations == "fp8" and rows["halfbyte", 5].status == "ok"
    assert rows["reference", 5].activations == "bf16" and rows["reference", 5].status == "ok"


def test_weight_sets_are_taken_in_turn(monkeypatch):
    monkeypatch.setattr(moe, "weight_sets_of", lambda touched_bytes, l2_bytes: 3)
    used = []

    def build(weights, shape):
        reference = ReferenceLayer(weights, shape)

        def layer(*call):
            used.append(weights.w13.codes.data_ptr())
            return reference(*call)

        return layer

    rows = rows_of(Peer("spy", lambda: build))
    assert rows["spy", 1].weight_sets == 3 and len(set(used)) == 3


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("halfbyte.bench.ceilings.measure_ceilings", lambda device: CEILINGS)


def test_command_prints_one_document_and_collects_rows(quick, capsys, tmp_path):
    out, plot = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    command = [*COMMAND, "--tokens", "1,3", "--format", "nvfp4,mxfp4", "--peers", "reference", "--out", str(out), "--plot", str(plot), "--json"]
    assert main(command) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["ceilings"]["read_gbps"] == 30 and document["environment"]["torch"] == torch.__version__
    assert [(row["format"], row["system"], row["num_tokens"], row["status"]) for row in document["rows"]] == [
        (format, system, tokens, "ok") for format in ("nvfp4", "mxfp4") for system in ("halfbyte", "reference") for tokens in (1, 3)
    ]
    assert captured.err.count("% of the") == 8 and plot.exists()
    assert [json.loads(line)["row"] for line in out.read_text().splitlines()] == document["rows"]
    assert main(["bench", "report", str(out), "--plot", str(tmp_path / "report.png")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("### 64,32,4,2") == 2 and "| 3 | reference |" in printed and (tmp_path / "report.png").exists()


def test_command_on_a_checkpoint(quick, capsys, tmp_path):
    model = str(tmp_path / "nvfp4")
    assert main(["quantize", "demo", model]) == 0
    capsys.readouterr()
    assert main(["bench", "moe", "--model", model, "--layer", "0", "--tokens", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("### nvfp4:0 NVFP4, bf16 activations") and "| 2 | halfbyte |" in printed
    assert main(["bench", "moe", "--model", "demo", "--layer", "0", "--device", "cpu"]) == 1
    assert "not in FP4" in capsys.readouterr().err


def test_a_red_gate_is_exit_1(quick, capsys, tmp_path):
    file = tmp_path / "half.py"
    file.write_text(
        "from halfbyte.bench.peers import ReferenceLayer\n"
        "def half(weights, shape):\n"
        "    layer = ReferenceLayer(weights, shape)\n"
        "    return lambda *call: layer(*call) / 2\n"
    )
    assert main([*COMMAND, "--tokens", "2", "--peers", f"{file}:half"]) == 1
    printed = capsys.readouterr().out
    assert "| 2 | half | refused | - |" in printed and "- half at 2 tokens refused: the result is wrong: worst token 5.0e-01" in printed


def test_no_row_at_all_is_exit_3(quick, capsys):
    assert main([*COMMAND, "--budget-s", "0"]) == 3
    assert "the time budget is spent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "required: BENCHMARK"),
        (["bench", "attention"], "invalid choice: 'attention' (choose from "),
        (["bench", "moe", "--name", "qwen9"], "unknown shape 'qwen9'; choose from qwen3-30b, "),
        (["bench", "moe", "--shape", "64,32,4"], "not four integers H,I,E,k"),
        (["bench", "moe", "--shape", "64,32,4,5"], "not a MoE layer"),
        (["bench", "moe", "--shape", "64,32,4,2", "--name", "dsr1"], "not allowed with argument"),
        (["bench", "moe", "--format", "int4"], "unknown format 'int4'; choose from nvfp4, mxfp4"),
        (["bench", "moe", "--tokens", "1,0"], "'0' is not an integer of at least 1"),
        (["bench", "moe", "--tokens", "1,x"], "'x' is not an integer of at least 1"),
        (["bench", "moe", "--peers", "torch,vllm"], "unknown peer (given 'vllm'"),
        (["bench", "moe", "--peers", "absent.py:build"], "no such peer file"),
        (["bench", "moe", "--backend", "magic"], "invalid choice: 'magic'"),
        (["bench", "moe", "--routing", "random"], "invalid choice: 'random'"),
        (["bench", "moe", "--model", "demo"], "--model and --layer need each other"),
        (["bench", "moe", "--shape", "64,32,4,2", "--layer", "1"], "--model and --layer need each other"),
        (["bench", "moe", "--model", "demo", "--layer", "0", "--format", "nvfp4"], "leave --format out"),
        (["bench", "moe", "--shape", "72,32,4,2"], "do not divide into NVFP4 blocks of 16"),
        (["bench", "prepare", "--model", "x"], "halfbyte bench prepare: error: --model and --layer need each other"),
        (["bench", "prepare", "--model", "x", "--layer", "0", "--format", "nvfp4"], "halfbyte bench prepare: error: --model has the format"),
        (["bench", "moe", "--out", "no/such/directory/rows.jsonl"], "argument --out: no directory for no/such/directory/rows.jsonl"),
        (["bench", "moe", "--plot", "no/such/directory/plot.png"], "argument --plot: no directory for"),
        (["bench", "moe", "--name", "dsr1,qwen3-30b,mixtral,gptoss", "--format", "nvfp4,mxfp4", "--plot", "plot.png"], "shows at most 6 tables"),
        (["bench", "report", "rows.jsonl", "--plot", "no/such/directory/plot.png"], "argument --plot: no directory for"),
        (["bench", "prepare", "--out", "no/such/directory/rows.jsonl"], "argument --out: no directory for"),
        (["bench", "prepare", "--shape", "64,64,4,2"], "not three integers H,I,E: hidden, intermediate, experts"),
        (["bench", "quantize", "--out", "no/such/directory/rows.jsonl"], "argument --out: no directory for"),
        (["bench", "quantize", "--out", "."], "argument --out: '.' is a directory, not a file to write"),
        (["bench", "quantize", "--out", ""], "argument --out: '' is a directory, not a file to write"),
        (["bench", "quantize", "--out", "x" * 300], "argument --out: File name too long: xxx"),
        (["bench", "moe", "--plot", "plot.abc"], "argument --plot: 'plot.abc' does not end in .png"),
        (["bench", "quantize", "--systems", "scan,search"], "scan and search need rows of --experts"),
    ],
)
def test_wrong_usage_exits_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err


def test_a_file_that_may_not_be_written_is_wrong_usage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda file, mode: file != tmp_path)  # root may write anywhere
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["bench", "quantize", "--out", str(tmp_path / "rows.jsonl")])
    assert f"argument --out: {tmp_path / 'rows.jsonl'} cannot be written" in capsys.readouterr().err
