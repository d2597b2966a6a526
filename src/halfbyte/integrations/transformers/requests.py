"""OpenAI requests as transformers' server takes them.

That server refuses every field it does not know, and ignores some that it knows. Here a field is translated, dropped because its value asks for
nothing, or refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from halfbyte.errors import InputError

# Fields whose value goes into transformers' GenerationConfig, under this name.
_SAMPLING = {
    "min_p": "min_p",
    "min_tokens": "min_new_tokens",
    "repetition_penalty": "repetition_penalty",
    "top_k": "top_k",
}
# Fields that transformers' server handles itself, in both kinds of request, and in one.
_PASSED = {"frequency_penalty", "max_tokens", "seed", "stop", "stream", "temperature", "top_p"}
_PASSED_IN = {
    "/v1/completions": {"prompt", "suffix"},
    "/v1/chat/completions": {"chat_template_kwargs", "logit_bias", "max_completion_tokens", "messages", "tools"},
}
# Fields that say nothing about the text.
_DROPPED = {"metadata", "model", "priority", "request_id", "safety_identifier", "service_tier", "store", "stream_options", "user"}
# Fields that are fine as long as they ask for what happens anyway.
_ONLY: Mapping[str, Callable[[Any], bool]] = {
    "best_of": lambda value: value == 1,
    "echo": lambda value: value is False,
    "logprobs": lambda value: value is False,
    "n": lambda value: value == 1,
    "presence_penalty": lambda value: value == 0,
    "skip_special_tokens": lambda value: value is True,
}
_NO_TOKEN = -1  # no token has this id, so generation does not end at one

COMPLETION_PATHS = tuple(_PASSED_IN)


def adapt_request(path: str, body: Mapping[str, Any], served: str) -> dict[str, Any]:
    """The request for transformers' server that means what `body` means; fields that are null are as good as absent.

    `ignore_eos` ends generation at `max_tokens` alone. A temperature above 0 samples, whatever the model's own default is.

    Args:
        path: one of `COMPLETION_PATHS`.
        body: the request's JSON object.
        served: the name of the one model that is served.

    Raises:
        InputError: another model, or a field that would change the result and that transformers' server cannot follow.

    >>> adapt_request("/v1/completions", {"prompt": "2+2=", "max_tokens": 4, "ignore_eos": True, "logprobs": None}, "demo")
    {'prompt': '2+2=', 'max_tokens': 4, 'generation_config': '{"eos_token_id": -1}'}
    """
    given = {name: value for name, value in body.items() if value is not None}
    if given.get("model", served) != served:
        raise InputError("this server has one model", where="model", given=repr(given["model"]), needed=repr(served))
    adapted, sampling = {}, {}
    for name, value in given.items():
        if name in _PASSED or name in _PASSED_IN[path]:
            adapted[name] = value
        elif name in _SAMPLING:
            sampling[_SAMPLING[name]] = value
        elif name == "ignore_eos":
            sampling |= {"eos_token_id": _NO_TOKEN} if value else {}
        elif name not in _DROPPED and not _ONLY.get(name, lambda value: False)(value):
            raise InputError(f"transformers' server cannot follow {name}", where=path, given=json.dumps(value)[:60], next_step="leave the field out")
    if path == "/v1/completions":
        adapted["prompt"] = _one_text(given.get("prompt"))
    elif not isinstance(given.get("messages"), list):
        raise InputError("no messages", where=path, needed="a list of messages")
    if isinstance(given.get("temperature"), float | int) and given["temperature"] > 0:
        sampling["do_sample"] = True
    if sampling:
        adapted["generation_config"] = json.dumps(sampling)
    return adapted


def _one_text(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    if not isinstance(prompt, str):
        needed = "one text; transformers' server takes neither token ids nor several prompts"
        raise InputError("the prompt is not a text", where="prompt", given=type(prompt).__name__, needed=needed)
    return prompt
