"""The accuracy gates: what NVFP4 costs the demo model, and that the gates notice a broken one."""

import pytest
import torch

from halfbyte.checkpoint.source import demo_model_dir
from halfbyte.convert.quantize_model import QuantizeOptions, quantize_model
from halfbyte.eval.data import load_documents, load_questions
from halfbyte.eval.evaluate import evaluate
from halfbyte.eval.metrics import ReadOnce, text_passages
from halfbyte.integrations.transformers import load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dense():
    model, tokenizer = load(demo_model_dir(), dtype=torch.float32)  # of bf16 weights; some CPUs multiply bf16 matrices 70 times slower
    return ReadOnce(model), tokenizer  # the same text three times


@pytest.fixture(scope="module")
def nvfp4_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo") / "nvfp4"
    quantize_model(demo_model_dir(), directory, QuantizeOptions(format="nvfp4"))
    return directory


@pytest.fixture(scope="module")
def passages(dense):
    return text_passages(dense[1], load_documents(demo_model_dir() / "heldout.txt.xz"), limit=16)


@pytest.fixture(scope="module")
def questions():
    """The two kinds that quantisation touches first, and the shortest to answer."""
    return [question for question in load_questions(demo_model_dir() / "eval.jsonl", limit=50) if question.kind in ("direct", "drill")]


@pytest.fixture(scope="module")
def dense_report(dense, passages, questions):
    return evaluate(*dense, questions=questions, passages=passages, batch=100, max_new_tokens=64)


def test_nvfp4_stays_close_to_bf16(dense, dense_report, nvfp4_dir, passages, questions):
    told = []
    report = evaluate(
        *load(nvfp4_dir, dtype=torch.float32),
        questions=questions,
        passages=passages,
        reference=dense[0],
        batch=100,
        max_new_tokens=64,
        progress=lambda *step: told.append(step),
    )
    done, totals = zip(*told, strict=True)
    assert len(set(totals)) == 1 and done[-1] == totals[0] > 64 * len(questions) and sorted(done) == list(done)
    assert len(done) > 8  # a step of generation is told, not only a batch
    assert abs(report.perplexity / dense_report.perplexity - 1) < 0.03
    assert abs(report.exact_match - dense_report.exact_match) <= 0.05
    assert report.answer_nll < 1.2 * dense_report.answer_nll
    assert 0.005 < report.kl < 0.04  # quantised it is, and harmlessly


def test_the_dense_model_is_as_good_as_its_card_says(dense_report):
    assert set(dense_report.kinds) == {"direct", "drill"}
    assert dense_report.kinds["direct"].exact_match == pytest.approx(0.443, abs=0.15)  # 50 questions, the card has 300: two standard errors
    assert dense_report.kinds["drill"].exact_match == pytest.approx(0.807, abs=0.12)
    assert dense_report.perplexity == pytest.approx(19.2, rel=0.1)
    assert dense_report.kl is None
    assert "perplexity" in str(dense_report) and "drill" in str(dense_report)


def test_the_gate_notices_one_layer_without_experts(dense, dense_report, nvfp4_dir, passages):
    broken = load(nvfp4_dir, dtype=torch.float32)[0]
    broken.model.layers[3].mlp.experts.down_proj_scale_2.zero_()
    report = evaluate(broken, dense[1], passages=passages, reference=dense[0])
    assert report.perplexity / dense_report.perplexity - 1 > 0.03
    assert report.kl > 0.04
