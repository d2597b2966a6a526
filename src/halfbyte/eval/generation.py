"""Prompts, and what a model answers to them: greedy in batches, or one at a time to the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from halfbyte.errors import foreign
from halfbyte.eval.data import Question
from halfbyte.eval.ranks import ALONE, Ranks
from halfbyte.kernels.reference.decoded import decoded_once

Advance = Callable[[int], object]  # called with the number of tokens just generated or read, as tqdm's `update` is
_ONE_ROW = {"num_return_sequences": 1, "return_dict_in_generate": False}  # whatever generation_config.json says
_DECODED_BYTES = 1 << 28  # of experts that a CPU multiplies at every step; all of the demo model's take 38 MB
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}  # None: sampling defaults would draw warnings


def no_progress(count: int) -> None:
    """The `advance` of a caller that shows no progress."""


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a question as the model expects it: its chat template, or `Q: ...\\nA:` for a tokenizer without one."""
    return encode(tokenizer, prompt_text(tokenizer, text))


@torch.inference_mode()
def generate_answers(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    batch: int = 64,
    max_new_tokens: int = 256,
    advance: Advance = no_progress,
    ranks: Ranks = ALONE,
) -> list[str]:
    """Return the greedy completion of each question's prompt, without special tokens, `batch` at a time on each of `ranks`; the same on all.

    Rows that have ended leave the batch of a rank that is alone. Advances by `max_new_tokens` per question in all.
    """
    from transformers import StoppingCriteriaList

    prompts = [prompt_ids(tokenizer, question.text) for question in questions]
    answers: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch * ranks.world):
        indices = order[start : start + batch * ranks.world]
        own = ranks.own(indices)
        rows = {index: prompts[index] for index in own or indices[:1]}
        going, elsewhere, steps = list(rows), len(indices) - len(rows), 0
        while going:
            ids, mask = pad([rows[index] for index in going], model.device, left=True)
            count = len(going) + elsewhere
            # Who goes on is read again, as no cache of every model can be cut: all such readings together cost no more than the first.
            few = ids.numel() // 2 if ranks.world == 1 else 0
            with _generating(model):
                watch = _Watch(model, len(ids), few, lambda: advance(count))  # noqa: B023 (called before the next round)
                output = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens - steps,
                    pad_token_id=_pad_id(tokenizer),
                    stopping_criteria=StoppingCriteriaList([watch]),
                    synced_gpus=ranks.world > 1,  # who is done goes on calling the model until all are
                    **GREEDY,
                    **_ONE_ROW,
                )
            written = output[:, ids.shape[1] :].tolist()
            rows |= {index: rows[index] + new for index, new in zip(going, written, strict=True)}
            steps += len(written[0])
            going = watch.going(going) if steps < max_new_tokens else []
            advance((max_new_tokens - steps) * (count - len(going)))  # what was never generated is done too
        texts = tokenizer.batch_decode([rows[index][len(prompts[index]) :] for index in own], skip_special_tokens=True)
        answers |= zip(own, texts, strict=True)
    answers = ranks.merge(answers)
    return [answers[index] for index in range(len(prompts))]


class _Watch:
    """A stopping criterion of transformers' `generate`: tells of each step, and stops when the tokens of the rows that go on are as few as `few`."""

    def __init__(self, model: Any, rows: int, few: int, tell: Callable[[], object]):
        ends = model.generation_config.eos_token_id
        self._ends = torch.tensor([] if ends is None else ends, dtype=torch.int64, device=model.device).flatten()
        self._ended = torch.zeros(rows, dtype=torch.bool, device=model.device)
        self._few, self._tell, self._stops = few, tell, False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
        self._tell()
        self._ended |= torch.isin(input_ids[:, -1], self._ends)
        self._stops = int((~self._ended).sum()) * input_ids.shape[1] <= self._few
        return torch.full_like(self._ended, self._stops)

    def going(self, rows: Sequence[int]) -> list[int]:
        """Those of the rows that have not ended, if it stopped them."""
        return [row for row, ended in zip(rows, self._ended.tolist(), strict=True) if not ended] if self._stops else []


@torch.inference_mode()
def complete(model: Any, tokenizer: Any, ids: list[int], *, max_new_tokens: int = 256, temperature: float = 0.0, stream: bool = True) -> list[int]:
    """Return the ids that follow `ids`, writing their text to stdout as it comes if `stream`. Temperature 0 is greedy."""
    from transformers import TextStreamer

    prompt, mask = pad([ids], model.device, left=True)
    with _generating(model):
        output = model.generate(
            input_ids=prompt,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=_pad_id(tokenizer),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
            **({"do_sample": True, "temperature": temperature} if temperature else GREEDY),
            **_ONE_ROW,
        )
    return output[0, len(ids) :].tolist()


@contextmanager
def _generating(model: Any) -> Iterator[None]:
    where, next_step = model.name_or_path, "look at its generation_config.json"
    with foreign("transformers cannot generate with this model", where=where, next_step=next_step), decoded_once(_DECODED_BYTES):
        yield


def prompt_text(tokenizer: Any, text: str) -> str:
    """The question as the model expects it: its chat template, or `Q: ...\nA:` for a tokenizer without one."""
    if tokenizer.chat_template:
        return chat_text(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
    return f"{tokenizer.bos_token or ''}Q: {text}\nA:"


def chat_text(tokenizer: Any, turns: list[dict[str, str]], **options: Any) -> str:
    """What the chat template makes of these turns.

    Raises:
        CheckpointError: it fails.
    """
    with foreign("the chat template fails", where=tokenizer.name_or_path, next_step="compare it with that of the original model"):
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of exactly this text; no special tokens are added.

    Raises:
        CheckpointError: the tokenizer fails.
    """
    with foreign("the tokenizer fails", where=tokenizer.name_or_path, next_step="compare its files with those of the original model"):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _pad_id(tokenizer: Any) -> int:
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def pad(rows: Sequence[list[int]], device: torch.device, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 ids [rows, longest], 0 where padded, and their int64 mask. What stands in a masked place never matters."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(len(row))
        ids[index, place], mask[index, place] = torch.tensor(row, dtype=torch.int64), 1
    return ids.to(device), mask.to(device)
