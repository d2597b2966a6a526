import itertools
import json
import threading

import pytest
import torch

from halfbyte.checkpoint.source import Checkpoint
from halfbyte.cli.main import main
from halfbyte.cli.progress import Bar
from halfbyte.demo import run
from halfbyte.errors import CheckpointError, InputError
from halfbyte.eval.data import load_questions


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo on so few questions that it takes seconds, and what it told its reader."""
    output = tmp_path_factory.mktemp("demo") / "out"
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "QUESTIONS_A_KIND", 1)
        patch.setattr(run, "WINDOWS", 2)
        patch.setattr(run, "_problems", lambda questions: [question for question in questions if question.kind == "story"][1:2])
        patch.setattr(
            run, "load_questions", lambda file, limit=None: [q for q in load_questions(file, limit=limit) if not limit or q.kind == "drill"]
        )
        result = run.run_demo(output, say=lines.append, stream=False, progress_bar=Bar)
    return output, result, "\n".join(lines)


def test_it_leaves_two_checkpoints_a_plot_and_its_numbers(demo):
    output, result, _ = demo
    assert Checkpoint.open(output / "nvfp4").quantization.format.name == "nvfp4"
    assert Checkpoint.open(output / "mxfp4").quantization.format.name == "mxfp4"
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "demo.json").read_text()) == result


def test_its_numbers(demo):
    _, result, said = demo
    bf16, nvfp4, mxfp4 = result["variants"]
    assert [bf16["name"], nvfp4["name"], mxfp4["name"]] == ["bf16", "NVFP4", "MXFP4"]
    assert bf16["expert_bytes"] == 2 * 9437184
    assert nvfp4["expert_bytes"] / bf16["expert_bytes"] == pytest.approx(4.5 / 16, rel=1e-3)  # 4 bits, 8 a block of 16, little else
    assert mxfp4["expert_bytes"] / bf16["expert_bytes"] == pytest.approx(4.25 / 16, rel=1e-3)
    assert bf16["disk_bytes"] > 2.4 * nvfp4["disk_bytes"] > 2.4 * mxfp4["disk_bytes"]
    for variant in (nvfp4, mxfp4):
        assert variant["quality"]["perplexity"] == pytest.approx(bf16["quality"]["perplexity"], rel=0.05)
        assert 0 < variant["quality"]["kl"] < 0.1
    assert [(problem["answer"], problem["correct"]) for problem in result["solved"]] == [("211", True)]
    assert "right answer: 211  (correct)" in said and run.NOTE in said and "NVFP4" in said


def test_it_replaces_its_own_results_but_nothing_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("keep")
    with pytest.raises(InputError, match="something else than an earlier demo"):
        run._claim(tmp_path)
    assert main(["demo", "--output", str(tmp_path)]) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]

    ours = tmp_path / "ours"
    run._claim(ours)
    (ours / "nvfp4").mkdir()
    (ours / "nvfp4" / "old").write_text("stale")
    run._claim(ours)
    assert [file.name for file in ours.iterdir()] == [run.RESULT]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write here"):
        run._claim(tmp_path / "file" / "out")


def test_what_fails_in_one_measurement_ends_the_others(monkeypatch):
    going_on, ended = threading.Event(), []

    def evaluate(model, tokenizer, *, progress, **options):
        if model == "broken":
            assert going_on.wait(60)
            raise CheckpointError("no finite numbers")
        try:
            for step in itertools.count():
                progress(step, step + 1)
                going_on.set()
        finally:
            ended.append(model)

    monkeypatch.setattr(run, "evaluate", evaluate)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(CheckpointError, match="no finite numbers"):
            run._measure({"bf16": ("endless", None), "NVFP4": ("broken", None)}, [], [], Bar)
        assert ended == ["endless"] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
