"""Rows that have ended leave the batch: the answers are those of questions asked one by one."""

from decimal import Decimal
from types import SimpleNamespace

import pytest
import torch
from tiny_models import dense_of_64_tokens

from halfbyte.errors import CheckpointError
from halfbyte.eval.data import Question
from halfbyte.eval.generation import generate_answers, prompt_ids
from halfbyte.eval.metrics import answer_passage

LONGEST = 40


class Letters:
    """A tokenizer: an id for each character, whose text is the id."""

    chat_template, bos_token, pad_token_id, eos_token_id, name_or_path = None, None, 0, None, "letters"

    def __call__(self, text, **options):
        return {"input_ids": [ord(character) % 60 + 4 for character in text]}

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(str(token) for token in row if token > 3) for row in rows]


@pytest.fixture(scope="module")
def model():
    """Ends with one of its 64 tokens in ten."""
    model = dense_of_64_tokens(initializer_range=1.0)
    model.generation_config.eos_token_id = [1, *range(10, 64, 9)]
    return model


@pytest.fixture
def questions():
    return [Question("all", f"{number * number}?" * (1 + number % 4), "", Decimal(0)) for number in range(24)]


def test_answers_are_those_of_questions_asked_alone(model, questions):
    told = []
    together = generate_answers(model, Letters(), questions, max_new_tokens=LONGEST, advance=told.append)
    alone = [generate_answers(model, Letters(), [question], max_new_tokens=LONGEST)[0] for question in questions]
    assert together == alone
    lengths = [len(answer.split()) for answer in together]
    assert min(lengths) < 5 and max(lengths) == LONGEST  # some end at once, some never
    assert sum(told) == LONGEST * len(questions) and min(told) >= 0


def test_rows_leave_and_what_is_read_again_costs_no_more_than_the_prompts(model, questions):
    read, written = [], []

    def watch(module, args, kwargs, output):
        ids = kwargs["input_ids"]
        (read if ids.shape[1] > 1 else written).append(ids.numel())

    handle = model.register_forward_hook(watch, with_kwargs=True)
    try:
        generate_answers(model, Letters(), questions, max_new_tokens=LONGEST)
    finally:
        handle.remove()
    first, *again = read
    assert again and sum(again) <= first
    assert written[0] == len(questions) and written == sorted(written, reverse=True) and written[-1] <= len(questions) / 4


def test_ranks_that_share_questions_call_the_model_equally_often(questions):
    """Rows stay to the end: `generate` itself keeps the ranks together."""
    calls = []

    class Model:
        device, generation_config, name_or_path = torch.device("cpu"), SimpleNamespace(eos_token_id=1), "model"

        def generate(self, input_ids, stopping_criteria, max_new_tokens, synced_gpus, **options):
            calls.append(synced_gpus)
            ends = torch.ones(len(input_ids), 1, dtype=torch.int64)
            ids = torch.cat((input_ids, ends), dim=1)
            ids[0, -1] = 7
            assert not any(criterion(ids, ()).any() for criterion in stopping_criteria)
            return ids

    ranks = SimpleNamespace(world=2, own=lambda rows: list(rows[::2]), merge=lambda mine: {index: mine.get(index, "") for index in range(24)})
    told = []
    answers = generate_answers(Model(), Letters(), questions, max_new_tokens=LONGEST, advance=told.append, ranks=ranks)
    assert calls == [True] and answers.count("") == 23 and sum(told) == LONGEST * len(questions)


def test_what_files_of_a_model_cannot_do_is_one_line(model, questions, monkeypatch):
    for name, value in (("repetition_penalty", -1), ("eos_token_id", [None])):
        with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"cannot generate with this model: .*generation_config.json"):
            patch.setattr(model.generation_config, name, value)
            generate_answers(model, Letters(), questions)
    for broken in ({"chat_template": "{{"}, {"apply_chat_template": lambda *args, **options: 1 / 0, "chat_template": "x"}, {"__call__": None}):
        tokenizer = type("Broken", (Letters,), broken)()
        with pytest.raises(CheckpointError, match=r"(the chat template|the tokenizer) fails"):
            prompt_ids(tokenizer, "2 + 2 =")


def test_a_template_that_makes_nothing_of_an_answer(questions):
    silent = type("Silent", (Letters,), {"chat_template": "x", "apply_chat_template": lambda *args, **options: "the same"})()
    with pytest.raises(CheckpointError, match="make nothing of an answer"):
        answer_passage(silent, questions[0])
