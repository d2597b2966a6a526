"""What a model thinks of given text: likelihood and KL divergence, for any causal language model of transformers.

Sequences are padded on the right, where causal attention never sees the padding.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from halfbyte.errors import CheckpointError, InputError, UnsupportedError, foreign
from halfbyte.eval.data import Question
from halfbyte.eval.generation import Advance, chat_text, encode, no_progress, pad, prompt_text
from halfbyte.eval.ranks import ALONE, Ranks

WINDOW = 512  # tokens of a text window
_SHORTEST_WINDOW = 32  # a shorter last one would score tokens almost without context
_TOKENS_A_BATCH = 4096  # scoring holds the logits of one batch


@dataclass(frozen=True)
class Passage:
    """Token ids, of which those from `first` on (at least 1) are scored given all before them."""

    ids: list[int]
    first: int

    @property
    def scored(self) -> int:
        return len(self.ids) - self.first


def answer_passage(tokenizer: Any, question: Question) -> Passage:
    """The prompt and the reference solution; the solution and the end-of-turn mark are scored.

    Raises:
        UnsupportedError: the chat template rewrites the prompt once it is answered, so no boundary can be drawn.
        CheckpointError: template or tokenizer fail, or nothing is left of prompt or answer.
    """
    prompt, solution = prompt_text(tokenizer, question.text), question.solution.strip()
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": question.text}, {"role": "assistant", "content": solution}]
        whole = chat_text(tokenizer, turns)
        if not whole.startswith(prompt):
            raise UnsupportedError("the chat template does not continue its own prompt with the answer", where=tokenizer.name_or_path)
        answer = whole[len(prompt) :]
    else:
        answer = f" {solution}{tokenizer.eos_token or ''}"
    # Encoded apart, so that the model answers the very prompt that generation gives it.
    before, after = encode(tokenizer, prompt), encode(tokenizer, answer)
    if not before or not after:
        nothing = "a prompt" if not before else "an answer"
        raise CheckpointError(f"tokenizer and chat template make nothing of {nothing}", where=tokenizer.name_or_path, given=repr(question.text))
    return Passage(before + after, len(before))


def text_passages(tokenizer: Any, documents: Sequence[str], *, limit: int | None = None, window: int = WINDOW) -> list[Passage]:
    """Cut documents into windows of `window` tokens, each starting afresh (with <bos> where there is one); at most `limit` of them.

    Raises:
        InputError: no document is long enough for a window.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    fresh = window - len(start)
    passages: list[Passage] = []
    for document in documents:
        ids = encode(tokenizer, document)
        for offset in range(0, len(ids), fresh):
            if limit is not None and len(passages) == limit:
                return passages
            piece = ids[offset : offset + fresh]
            if len(piece) >= _SHORTEST_WINDOW:
                passages.append(Passage(start + piece, 1))
    if not passages:
        raise InputError("the text is too short", given=f"{len(documents)} documents", needed=f"{_SHORTEST_WINDOW} tokens in one of them")
    return passages


@torch.inference_mode()
def score_passages(
    model: Any, passages: Sequence[Passage], *, reference: Any = None, advance: Advance = no_progress, ranks: Ranks = ALONE
) -> tuple[list[float], float | None]:
    """Let `model` read the passages once: return the nats of each, and how far it is from `reference`, None without one. All of `ranks` get the same.

    Nats are -sum log p(token | tokens before it) over the scored tokens. Divide by `Passage.scored` for the mean; exp of the mean is the perplexity.
    The distance is the mean over scored tokens of KL(reference || model) = sum_v p_ref(v) log(p_ref(v) / p_model(v)), in nats.

    Raises:
        InputError: the two vocabularies have different sizes.
    """
    totals, distance = [0.0] * len(passages), 0.0
    for together, indices, ids, mask in _padded_batches(passages, model.device, ranks):
        logits, expected = _logits(model, ids, mask), None
        advance(together)
        if reference is not None:
            expected = _logits(reference, ids.to(reference.device), mask.to(reference.device)).to(logits.device)
            advance(together)
            if logits.shape != expected.shape:
                raise InputError("model and reference differ in vocabulary", given=logits.shape[-1], needed=expected.shape[-1])
        for row, index in enumerate(indices):
            first, end = passages[index].first, len(passages[index].ids)
            log_q = logits[row, first - 1 : end - 1].float().log_softmax(-1)
            totals[index] = F.nll_loss(log_q, ids[row, first:end], reduction="none").sum(dtype=torch.float64).item()
            if expected is not None:
                log_p = expected[row, first - 1 : end - 1].float().log_softmax(-1)
                distance += F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dtype=torch.float64).item()
    *nats, distance = ranks.add([*totals, distance], model.device)
    return nats, None if reference is None else distance / sum(passage.scored for passage in passages)


class ReadOnce:
    """A model in whose place it may stand. What `score_passages` lets it read is read once, for all threads: the logits of a few batches are kept."""

    def __init__(self, model: Any, batches: int = 4):
        self._model = model
        self._kept: deque[tuple[torch.Tensor, torch.Tensor, SimpleNamespace]] = deque(maxlen=batches)
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        with self._lock:  # who wants the same batch waits for it
            for ids, mask, output in self._kept:
                if torch.equal(ids, input_ids) and torch.equal(mask, attention_mask):
                    return output
            output = SimpleNamespace(logits=self._model(input_ids=input_ids, attention_mask=attention_mask).logits)
            self._kept.append((input_ids, attention_mask, output))
            return output


def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with foreign("transformers cannot run the model", where=model.name_or_path, next_step="see whether the tokenizer belongs to it"):
        return model(input_ids=ids, attention_mask=mask).logits


def _padded_batches(passages: Sequence[Passage], device: torch.device, ranks: Ranks) -> Iterator[tuple[int, list[int], torch.Tensor, torch.Tensor]]:
    """Passages of similar length together, for each rank at most _TOKENS_A_BATCH tokens with their padding, or one passage: how many tokens the
    ranks read together, this rank's indices, ids, mask."""
    order = sorted(range(len(passages)), key=lambda index: len(passages[index].ids), reverse=True)
    while order:
        rows = ranks.world * max(1, _TOKENS_A_BATCH // len(passages[order[0]].ids))
        indices, order = order[:rows], order[rows:]
        own = ranks.own(indices)
        ids, mask = pad([passages[index].ids for index in own or indices[:1]], device, left=False)
        yield sum(len(passages[index].ids) for index in indices), own, ids, mask
