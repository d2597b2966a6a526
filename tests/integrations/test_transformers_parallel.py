"""A model of transformers whose experts are spread over ranks (gloo): the same numbers as on one, by `set_parallel` and by `halfbyte eval`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import assert_close_rel
from ranks import run_ranks
from tiny_models import build, write

import halfbyte as hb
from halfbyte.checkpoint.source import demo_model_dir
from halfbyte.cli.main import main
from halfbyte.errors import InputError, UnsupportedError

IDS = torch.arange(33).view(3, 11) * 7 % 128
EXACT = {"token": 1e-5, "overall": 1e-5}  # fp32: only the order of sums differs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the tokenizer of the embedded one."""
    fp4, _ = write(build("qwen3_moe", vocab_size=2048), "modelopt", tmp_path_factory.mktemp("tiny"))
    for file in demo_model_dir().glob("tokenizer*"):
        shutil.copy(file, fp4)
    return fp4


def check_model(rank: int, directory: str) -> None:
    from halfbyte.integrations.transformers import load, set_activations, set_parallel

    whole, _ = load(directory, dtype=torch.float32)
    model, _ = load(directory, dtype=torch.float32)
    with pytest.raises(InputError, match="given 4 experts; needed 8"):
        set_parallel(model, hb.ExpertParallel(None, 4))
    placement = [[5, 0, 6], [1, 2, 3, 4, 7]]
    set_parallel(model, hb.ExpertParallel(None, 8, placement=placement))
    held = {name: len(parameter) for name, parameter in model.model.layers[0].mlp.experts.named_parameters()}
    assert held["gate_up_proj"] == len(placement[rank])
    assert held == {name: 8 if name.endswith("_input_scale") else len(placement[rank]) for name in held} and 8 in held.values()
    mine = IDS[: 1 + 2 * rank]  # every rank has another batch
    with torch.no_grad():
        for activations in ("bf16", "nvfp4"):
            for one in (whole, model):
                set_activations(one, activations)
            assert_close_rel(model(mine).logits.flatten(0, 1), whole(mine).logits.flatten(0, 1), **EXACT)
        with mock.patch("torch.compiler.is_compiling", return_value=True), pytest.raises(UnsupportedError, match="not traced"):
            model(mine)
    with pytest.raises(InputError, match="spread already"):
        set_parallel(model, hb.ExpertParallel(None, 8))
    with pytest.raises(UnsupportedError, match="cannot save the model"):
        model.save_pretrained(Path(directory) / f"saved{rank}")


def report_of(directory: str, questions: str, text: str) -> dict[str, Any]:
    printed = io.StringIO()
    options = ["--questions", questions, "--text", text, "--reference", directory, "--max-new-tokens", "4", "--batch", "2", "--device", "cpu"]
    with contextlib.redirect_stdout(printed):
        assert main(["eval", directory, *options, "--json"]) == 0
    return json.loads(printed.getvalue()) if printed.getvalue() else {}


def check_model_and_eval(rank: int, world: int, directory: str, questions: str, text: str, expected: dict[str, Any]) -> None:
    check_model(rank, directory)
    check_eval(rank, directory, questions, text, expected)


def check_eval(rank: int, directory: str, questions: str, text: str, expected: dict[str, Any]) -> None:
    os.environ["RANK"] = str(rank)  # as torchrun would; the group is there already
    report = report_of(directory, questions, text)
    assert bool(report) == (rank == 0)
    for key, value in expected.items() if rank == 0 else ():
        assert report[key] == (value if isinstance(value, str | int) else pytest.approx(value, rel=1e-4)), key


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(checkpoint: Path, tmp_path: Path) -> None:
    """Logits of a batch of each rank's own; and the report on five windows and three questions, in some batches of which one rank has no row."""
    lines = (demo_model_dir() / "eval.jsonl").read_text().splitlines()[:3]
    (questions := tmp_path / "questions.jsonl").write_text("\n".join(lines))
    (text := tmp_path / "text.txt").write_text("A hen laid four eggs and Mia took one of them home. " * 150)
    arguments = str(checkpoint), str(questions), str(text)
    expected = report_of(*arguments)
    assert expected["perplexity"] > 1 and expected["text_tokens"] > 1024 and expected["answer_nll"] > 0
    kept = {key: expected[key] for key in ("model", "perplexity", "text_tokens", "answer_nll", "exact_match")}
    run_ranks(check_model_and_eval, 2, *arguments, kept)
