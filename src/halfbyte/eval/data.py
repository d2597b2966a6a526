"""Questions and text to measure a model on."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from halfbyte.checkpoint.json_files import json_lines, parse_object, read_text
from halfbyte.errors import InputError

DOCUMENT_SEPARATOR = "\n\x1e\n"
_NUMBER = re.compile(r"(?<!\d)-?\$?(\d+(?:,\d{3})*(?:\.\d+)?)")


@dataclass(frozen=True)
class Question:
    """One question. `solution` is the text whose likelihood is measured; `answer` is the number that must come out."""

    kind: str
    text: str
    solution: str
    answer: Decimal


def extract_answer(text: str) -> Decimal | None:
    """Return the number after `####`, or without that mark the last number of the text, or None.

    Thousands separators and a dollar sign are read over; 7 equals 7.0.

    >>> from halfbyte.eval.data import extract_answer
    >>> extract_answer(" 3 * 4 = 12. So 12.\\n#### $1,200"), extract_answer("it was 3, then -5."), extract_answer("no idea")
    (Decimal('1200'), Decimal('-5'), None)
    """
    _, mark, after = text.partition("####")
    found = list(_NUMBER.finditer(after if mark else text))
    if not found:
        return None
    number = found[0 if mark else -1]
    value = Decimal(number[1].replace(",", ""))
    return -value if number[0].startswith("-") else value


def is_correct(question: Question, completion: str) -> bool:
    """Whether the completion's answer is exactly the question's number.

    >>> from decimal import Decimal
    >>> is_correct(Question("all", "6 * 7 =", "42", Decimal(42)), " 6*7=42.\\n#### 42.0")
    True
    """
    return extract_answer(completion) == question.answer


def load_questions(file: Path, *, limit: int | None = None) -> list[Question]:
    """Read a JSONL file of `question` and `answer`, and optionally `kind` and `solution`; at most `limit` of each kind, in file order.

    An answer is a number, or a text that `extract_answer` understands (the layout of GSM8K). Without `solution`, the answer's text is the solution.

    Raises:
        InputError: unreadable, not JSONL, a missing field, or an answer without a number; names the line.
    """
    questions: list[Question] = []
    taken: Counter[str] = Counter()
    for number, line in enumerate(json_lines(_read(file)), start=1):
        if not line.strip():
            continue
        question = _parse_question(line, where=f"{file}:{number}")
        if limit is None or taken[question.kind] < limit:
            taken[question.kind] += 1
            questions.append(question)
    if not questions:
        raise InputError("no questions", where=str(file), given=f"limit {limit}", needed="one JSON object a line")
    return questions


def load_documents(file: Path) -> list[str]:
    """Read a text file (.txt, or .xz compressed) as documents: one, or as many as lines holding only U+001E separate.

    Raises:
        InputError: unreadable, not UTF-8, or empty.
    """
    documents = [document for document in _read(file).split(DOCUMENT_SEPARATOR) if document.strip()]
    if not documents:
        raise InputError("no text", where=str(file))
    return documents


def kinds_of(questions: Sequence[Question]) -> list[str]:
    """The kinds in order of first appearance."""
    return list(dict.fromkeys(question.kind for question in questions))


def _read(file: Path) -> str:
    try:
        return read_text(file)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the file: {error}", where=str(file), needed="UTF-8 text, or the same compressed as .xz") from error


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _parse_question(line: str, where: str) -> Question:
    try:
        record = parse_object(line.encode())
    except ValueError as error:
        raise InputError(f"not JSON: {error}", where=where) from None
    if not {"question", "answer"} <= record.keys():
        raise InputError("not a question", where=where, needed="an object with `question` and `answer`")
    answer_text = str(record["answer"])
    answer = Decimal(answer_text) if _is_number(record["answer"]) else extract_answer(answer_text)
    if answer is None:
        raise InputError("the answer holds no number", where=where, given=repr(answer_text[:80]))
    solution = str(record.get("solution", answer_text))
    return Question(str(record.get("kind", "all")), str(record["question"]), solution, answer)
