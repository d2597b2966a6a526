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


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _is_text_or_texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


# What a field has to be: transformers' server would find out where it is used.
_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), ("a whole number > 0", lambda value: _is_whole(value) and value > 0)),
    **dict.fromkeys(("min_tokens", "seed", "top_k"), ("a whole number", _is_whole)),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), ("a number >= 0", lambda value: _is_number(value) and value >= 0)),
    **dict.fromkeys(("stream", "ignore_eos"), ("true or false", lambda value: isinstance(value, bool))),
    "frequency_penalty": ("a number", _is_number),
    "stop": ("a text or a list of texts", _is_text_or_texts),
    "stream_options": ("an object", lambda value: isinstance(value, dict)),
}

COMPLETION_PATHS = tuple(_PASSED_IN)


def adapt_request(path: str, body: Mapping[str, Any], served: str) -> dict[str, Any]:
    """The request for transformers' server that means what `body` means; fields that are null are as good as absent.

    `ignore_eos` ends generation at `max_tokens` alone. A temperature above 0 samples, whatever the model's own default is.

    Args:
        path: one of `COMPLETION_PATHS`.
        body: the request's JSON object.
        served: the name of the one model that is served.

    Raises:
        InputError: another model, a value of another kind than the field's, or a field that would change the result and that transformers' server
            cannot follow.

    >>> adapt_request("/v1/completions", {"prompt": "2+2=", "max_tokens": 4, "ignore_eos": True, "logprobs": None}, "demo")
    {'prompt': '2+2=', 'max_tokens': 4, 'generation_config': '{"eos_token_id": -1}'}
    """
    given = {name: value for name, value in body.items() if value is not None}
    if given.get("model", served) != served:
        raise InputError("this server has one model", where="model", given=repr(given["model"]), needed=repr(served))
    adapted, sampling = {}, {}
    for name, value in given.items():
        needed, is_fit = _KINDS.get(name, ("", lambda value: True))
        if not is_fit(value):
            raise InputError(f"{name} does not fit", where=path, given=json.dumps(value)[:60], needed=needed)
        if name in _PASSED or name in _PASSED_IN[path]:
            adapted[name] = value
        elif name in _SAMPLING:
            sampling[_SAMPLING[name]] = max(value, 0) if name == "top_k" else value  # -1 is no limit, as 0 is
        elif name == "ignore_eos":
            sampling |= {"eos_token_id": _NO_TOKEN} if value else {}
        elif name not in _DROPPED and not _ONLY.get(name, lambda value: False)(value):
            raise InputError(f"transformers' server cannot follow {name}", where=path, given=json.dumps(value)[:60], next_step="leave the field out")
    if path == "/v1/completions":
        adapted["prompt"] = _one_text(given.get("prompt"))
    elif not _are_messages(given.get("messages")):
        raise InputError("no messages", where=path, needed="a list of objects, each with a role")
    if given.get("temperature", 0) > 0:
        sampling["do_sample"] = True
    if sampling:
        adapted["generation_config"] = json.dumps(sampling)
    return adapted


def _are_messages(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in given)


def _one_text(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        (prompt,) = prompt
    if not isinstance(prompt, str):
        needed = "one text; transformers' server takes neither token ids nor several prompts"
        raise InputError("the prompt is not a text", where="prompt", given=type(prompt).__name__, needed=needed)
    return prompt
