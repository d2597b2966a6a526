"""What the tasks of this folder need of halfbyte: the order of the questions, and when an answer is right."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from typing import Any

from halfbyte.eval.data import extract_answer


def in_turn(docs: Any) -> Any:
    """The questions in the order first of each kind, second of each kind, and so on."""
    seen: Counter[str] = Counter()
    ranks = []
    for index, kind in enumerate(docs["kind"]):
        ranks.append((seen[kind], index))
        seen[kind] += 1
    return docs.select([index for _, index in sorted(ranks)])


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the completion ends in exactly the question's number, as in `halfbyte eval`."""
    return {"exact_match": float(extract_answer(results[0]) == Decimal(str(doc["answer"])))}


def likelihood(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """The negative log-likelihood of the whole solution, in nats."""
    return {"nll": -results[0][0]}
