import json
import lzma
import os
from decimal import Decimal

import pytest

from halfbyte.checkpoint.source import demo_model_dir
from halfbyte.errors import InputError
from halfbyte.eval.data import extract_answer, is_correct, kinds_of, load_documents, load_questions


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 5*7=35. 12+35=47.\n#### 47", 47),
        ("#### -85", -85),
        ("#### 12 apples, not 13", 12),  # after the mark the first number counts
        ("12 apples, then 13", 13),  # without it the last
        (" 18", 18),
        ("3-5", 5),  # a minus between numbers is no sign
        ("x = -5", -5),
        ("#### $1,234,567.50", Decimal("1234567.50")),
        ("#### -$20", -20),
        ("1,2", 2),  # a list, no thousands
        ("#### 7.0", 7),
        ("47 it is\n####", None),  # a mark without an answer is no answer
        ("", None),
        ("none", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_correct_means_equal_numbers():
    question = load_questions(demo_model_dir() / "eval.jsonl", limit=1)[0]
    assert question.answer == 418
    assert is_correct(question, " ... 209*2=418.\n#### 418")
    for wrong in ("#### 419", "418\n#### 41", "#### -418", "#### 4180", ""):
        assert not is_correct(question, wrong)


def test_demo_questions_answer_themselves():
    questions = load_questions(demo_model_dir() / "eval.jsonl")
    assert kinds_of(questions) == ["story", "long", "steps", "direct", "legs", "drill"]
    assert len(questions) == 1200
    assert all(is_correct(question, question.solution) for question in questions)
    limited = load_questions(demo_model_dir() / "eval.jsonl", limit=3)
    assert len(limited) == 18 and set(limited) <= set(questions)


def test_answers_in_the_layout_of_gsm8k(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"question": "6 * 7?", "answer": "6*7=<<6*7=42>>42.\n#### 42"}) + "\n\n" + json.dumps({"question": "1?", "answer": 1}))
    first, second = load_questions(file)
    assert (first.answer, first.kind, second.solution) == (42, "all", "1")
    assert first.solution.startswith("6*7=")


@pytest.mark.parametrize(("answer", "meant"), [(1e-7, "0.0000001"), (-2.5e20, "-250000000000000000000"), (0.1, "0.1"), (-3, "-3")])
def test_a_number_is_itself_however_it_is_written(tmp_path, answer, meant):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"question": "?", "answer": answer}))
    assert load_questions(file)[0].answer == extract_answer(f"#### {meant}")


def test_a_line_ends_where_json_says(tmp_path):
    file = tmp_path / "questions.jsonl"
    texts = [f"1{end}2?" for end in ("\u2028", "\u0085", "\x7f")]
    file.write_bytes("\r\n".join(json.dumps({"question": text, "answer": 3}, ensure_ascii=False) for text in texts).encode())
    assert [question.text for question in load_questions(file)] == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "1?", "answer": 1}\n{broken', r"questions.jsonl:2: not JSON"),
        ('{"question": "1?"}', r"questions.jsonl:1: not a question"),
        ("[1]", r"questions.jsonl:1: not JSON: a list, not an object"),
        ('{"question": "who?", "answer": "Bob"}', r"questions.jsonl:1: the answer holds no number \(given 'Bob'\)"),
        ("", "no questions"),
    ],
)
def test_bad_questions_name_the_line(tmp_path, content, message):
    file = tmp_path / "questions.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        load_questions(file)


def test_documents_of_plain_and_compressed_text(tmp_path):
    text = "first\nline\n\x1e\nsecond"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.xz").write_bytes(lzma.compress(text.encode()))
    assert load_documents(tmp_path / "a.txt") == load_documents(tmp_path / "a.xz") == ["first\nline", "second"]
    assert len(load_documents(demo_model_dir() / "heldout.txt.xz")) == 44


@pytest.mark.parametrize("make", [lambda file: file.symlink_to("/dev/zero"), os.mkfifo, lambda file: file.mkdir()])
def test_a_text_has_an_end(tmp_path, make):
    make(tmp_path / "text.txt")
    for load in (load_documents, load_questions):
        with pytest.raises(InputError, match="not a regular file"):
            load(tmp_path / "text.txt")


def test_unreadable_text(tmp_path):
    (tmp_path / "damaged.xz").write_bytes(lzma.compress(b"text" * 1000)[:-30])
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    (tmp_path / "empty.txt").write_text(" \n")
    for name in ("damaged.xz", "latin.txt", "empty.txt", "absent.txt"):
        with pytest.raises(InputError, match=name):
            load_documents(tmp_path / name)
