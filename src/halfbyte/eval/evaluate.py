"""`evaluate`: every measurement that the given questions, text and reference allow, in one report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from halfbyte.arguments import dtype_name
from halfbyte.errors import CheckpointError, printable
from halfbyte.eval.data import Question, is_correct, kinds_of
from halfbyte.eval.generation import generate_answers
from halfbyte.eval.metrics import Passage, answer_passage, score_passages
from halfbyte.eval.ranks import ALONE, Ranks

_MOST_NATS = 700.0  # per token; exp(710) is beyond a double
Progress = Callable[[int, int], object]  # called with what is done, and how much there is


def no_progress(done: int, total: int) -> None:
    """The `progress` of a caller that shows none."""


@dataclass(frozen=True)
class KindScore:
    """The questions of one kind. `exact_match` is a fraction; `answer_nll` is nats per token of the reference solution."""

    questions: int
    exact_match: float
    answer_nll: float


@dataclass(frozen=True)
class EvalReport:
    """What `evaluate` measured; None where nothing was asked.

    `exact_match` and `answer_nll` are means over kinds, so that a kind with many questions weighs no more than another. `dtype` is that of the
    arithmetic outside packed experts.
    """

    dtype: str
    kinds: dict[str, KindScore] = field(default_factory=dict)
    exact_match: float | None = None
    answer_nll: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    text_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        if self.kinds:
            lines.append(f"{'kind':10} {'questions':>9} {'exact match':>12} {'answer NLL':>11}")
            lines += [f"{kind:10} {s.questions:9d} {s.exact_match:12.1%} {s.answer_nll:11.4f}" for kind, s in self.kinds.items()]
            questions = sum(score.questions for score in self.kinds.values())
            lines.append(f"{'mean':10} {questions:9d} {self.exact_match:12.1%} {self.answer_nll:11.4f}")
        if self.perplexity is not None:
            lines.append(f"perplexity {self.perplexity:.3f} over {self.text_tokens} tokens of text")
        if self.kl is not None:
            lines.append(f"KL(reference || model) {self.kl:.5f} nats per token")
        lines.append(f"computed in {self.dtype}")
        return "\n".join(map(printable, lines))


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    questions: Sequence[Question] = (),
    passages: Sequence[Passage] = (),
    reference: Any = None,
    batch: int = 64,
    max_new_tokens: int = 256,
    progress: Progress = no_progress,
    ranks: Ranks = ALONE,
) -> EvalReport:
    """Measure `model` on questions and on text passages (`text_passages`), the latter against `reference` too when there is one.

    Args:
        model, reference: causal language models of transformers.
        batch: questions generated together.
        max_new_tokens: a longer completion is cut, and usually wrong then.
        progress: called with the tokens generated and read so far, and how many there are in all.
        ranks: who shares the work, each with the same arguments; all of them get the whole report.

    Raises:
        InputError: the reference has another vocabulary.
        CheckpointError: the model's likelihoods are no finite numbers.
        UnsupportedError: the chat template leaves no boundary between prompt and answer.
    """
    answers = [answer_passage(tokenizer, question) for question in questions]
    readings = [*answers, *passages, *(passages if reference is not None else ())]
    total, done = len(questions) * max_new_tokens + sum(len(passage.ids) for passage in readings), 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, total)

    kinds: dict[str, KindScore] = {}
    if questions:
        completions = generate_answers(model, tokenizer, questions, batch=batch, max_new_tokens=max_new_tokens, advance=advance, ranks=ranks)
        nll, _ = score_passages(model, answers, advance=advance, ranks=ranks)
        for kind in kinds_of(questions):
            members = [index for index, question in enumerate(questions) if question.kind == kind]
            kinds[kind] = KindScore(
                questions=len(members),
                exact_match=fmean(is_correct(questions[index], completions[index]) for index in members),
                answer_nll=_mean(sum(nll[index] for index in members), sum(answers[index].scored for index in members)),
            )
    perplexity = kl = None
    tokens = sum(passage.scored for passage in passages)
    if passages:
        nats, kl = score_passages(model, passages, reference=reference, advance=advance, ranks=ranks)
        perplexity = math.exp(_mean(sum(nats), tokens))
    return EvalReport(
        dtype=dtype_name(model.dtype),
        kinds=kinds,
        exact_match=fmean(score.exact_match for score in kinds.values()) if kinds else None,
        answer_nll=fmean(score.answer_nll for score in kinds.values()) if kinds else None,
        perplexity=perplexity,
        kl=kl,
        text_tokens=tokens,
    )


def _mean(nats: float, tokens: int) -> float:
    """Nats per token, whose exponential is a number."""
    if not math.isfinite(nats) or nats / tokens > _MOST_NATS:
        raise CheckpointError(
            "the likelihoods that this model computes are no finite numbers", given=f"{nats} nats", next_step="run `halfbyte inspect --values` on it"
        )
    return nats / tokens
