"""Hand-computed values on a model whose next token depends on the current one only, then the invariances a real model must keep."""

import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from tiny_models import dense_of_64_tokens
from transformers import AutoTokenizer

from halfbyte.checkpoint.source import demo_model_dir
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.eval.data import load_questions
from halfbyte.eval.metrics import Passage, ReadOnce, answer_passage, score_passages, text_passages


class Bigram:
    """p(next | current) is a row of `table` [V, V]."""

    device, name_or_path = torch.device("cpu"), "bigram"

    def __init__(self, table):
        self.log, self.batches = torch.tensor(table).log(), 0

    def __call__(self, input_ids, attention_mask):
        self.batches += 1
        return SimpleNamespace(logits=self.log[input_ids])


P = Bigram([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3]])
Q = Bigram([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7], [0.6, 0.2, 0.2]])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_dir())


@pytest.fixture(scope="module")
def tiny_model():
    return dense_of_64_tokens(initializer_range=0.3)


def kl(model, reference, passages):
    nats, distance = score_passages(model, passages, reference=reference)
    assert nats == score_passages(model, passages)[0]  # a reference changes nothing about them
    return distance


def test_likelihood_by_hand():
    passages = [Passage([0, 1, 2, 0], 1), Passage([0, 1, 2, 2, 0, 0], 3)]
    by_hand = [-math.log(0.25 * 0.7 / 3), -math.log(1 / 3 * 1 / 3 * 0.5)]  # 0->1, 1->2, 2->0; then 2->2, 2->0, 0->0
    assert score_passages(P, passages)[0] == pytest.approx(by_hand, rel=1e-6)
    assert [passage.scored for passage in passages] == [3, 3]


def test_kl_by_hand():
    passages = [Passage([0, 1, 2, 0], 1), Passage([1, 2, 2], 2)]
    from_0 = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    from_2 = (math.log((1 / 3) / 0.6) + 2 * math.log((1 / 3) / 0.2)) / 3
    assert kl(Q, P, passages) == pytest.approx((from_0 + 0 + from_2 + from_2) / 4, rel=1e-5)  # predicted from 0, 1, 2; 2
    assert kl(P, P, passages) == 0
    assert kl(P, Q, passages) != pytest.approx(kl(Q, P, passages), rel=0.01)  # which one is the reference matters


def test_kl_needs_one_vocabulary():
    with pytest.raises(InputError, match=r"vocabulary \(given 3; needed 2\)"):
        kl(P, Bigram([[0.5, 0.5], [0.5, 0.5]]), [Passage([0, 1], 1)])


def test_a_batch_is_read_once_by_all_threads_while_it_is_kept(monkeypatch):
    monkeypatch.setattr("halfbyte.eval.metrics._TOKENS_A_BATCH", 1)
    passages = [Passage([0, 1, 2, 0], 1), Passage([0, 1, 2, 1], 1), Passage([1, 2, 2], 2)]
    model, reference = Bigram([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7], [0.6, 0.2, 0.2]]), Bigram(P.log.exp().tolist())
    once = ReadOnce(reference, batches=3)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: kl(model, once, passages), range(4)))
    assert found == [kl(Q, P, passages)] * 4 and once.name_or_path == "bigram"
    assert reference.batches == 3 < model.batches
    score_passages(once, [Passage([2, 0], 1)])  # takes the place of the first
    score_passages(once, passages[1:])
    assert reference.batches == 4
    score_passages(once, passages[:1])
    assert reference.batches == 5


def test_batching_and_padding_change_nothing(tiny_model, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    passages = [Passage(torch.randint(64, (length,), generator=generator).tolist(), first) for length, first in ((40, 1), (7, 3), (23, 20), (40, 39))]
    together = score_passages(tiny_model, passages)[0]
    monkeypatch.setattr("halfbyte.eval.metrics._TOKENS_A_BATCH", 1)
    alone = score_passages(tiny_model, passages)[0]
    assert together == pytest.approx(alone, rel=1e-5)
    uniform = [passage.scored * math.log(64) for passage in passages]
    assert not any(total == pytest.approx(guess, rel=1e-3) for total, guess in zip(alone, uniform, strict=True))  # the model has opinions


def test_likelihood_agrees_with_transformers_own_loss(tiny_model):
    ids = list(range(5, 45))
    with torch.inference_mode():
        loss = tiny_model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    assert score_passages(tiny_model, [Passage(ids, 1)])[0][0] / 39 == pytest.approx(loss, rel=1e-5)


def test_an_answer_is_scored_after_the_prompt_that_generation_sees(tokenizer):
    question = load_questions(demo_model_dir() / "eval.jsonl", limit=1)[0]
    passage = answer_passage(tokenizer, question)
    assert tokenizer.decode(passage.ids[: passage.first]) == f"<bos>Q: {question.text}\nA:"
    assert tokenizer.decode(passage.ids[passage.first :]) == question.solution + "<eos>"


def test_a_template_that_rewrites_its_prompt_is_refused(tokenizer):
    odd = AutoTokenizer.from_pretrained(demo_model_dir())
    odd.chat_template = "{{ messages | length }}{{ messages[0]['content'] }}"
    with pytest.raises(UnsupportedError, match="chat template"):
        answer_passage(odd, load_questions(demo_model_dir() / "eval.jsonl", limit=1)[0])


def test_without_a_template_the_plain_form_is_used():
    plain = AutoTokenizer.from_pretrained(demo_model_dir())
    plain.chat_template = None
    question = load_questions(demo_model_dir() / "eval.jsonl", limit=1)[0]
    assert plain.decode(answer_passage(plain, question).ids) == f"<bos>Q: {question.text}\nA:{question.solution}<eos>"


def test_text_windows_cover_the_text_once(tokenizer):
    text = "In the beginning God created the heaven and the earth. " * 40
    passages = text_passages(tokenizer, [text, "short"], window=64)
    assert {passage.ids[0] for passage in passages} == {tokenizer.bos_token_id} and {passage.first for passage in passages} == {1}
    assert all(len(passage.ids) == 64 for passage in passages[:-1])
    body = [token for passage in passages for token in passage.ids[1:]]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert body == ids[: len(body)] and len(ids) - len(body) < 32
    assert text_passages(tokenizer, [text], window=64, limit=2) == passages[:2]
    with pytest.raises(InputError, match="too short"):
        text_passages(tokenizer, ["short"])
