"""OpenAI requests, translated for transformers' server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformers.cli.serving import server as serving

from halfbyte.errors import InputError
from halfbyte.integrations.transformers.requests import adapt_request
from halfbyte.integrations.transformers.server import OneModel, main

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Why?"}]


def sampling(body: dict[str, Any]) -> dict[str, Any]:
    return json.loads(adapt_request(TEXT, {"prompt": "a", **body}, "m")["generation_config"])


def test_what_vllm_bench_serve_sends() -> None:
    text = {"model": "m", "prompt": "a", "repetition_penalty": 1.0, "max_tokens": 8, "logprobs": None, "ignore_eos": True}
    text |= {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0}
    adapted = adapt_request(TEXT, text, "m")
    assert json.loads(adapted.pop("generation_config")) == {"repetition_penalty": 1.0, "eos_token_id": -1}
    assert adapted == {"prompt": "a", "max_tokens": 8, "stream": True, "temperature": 0.0}
    chat = {"model": "m", "messages": MESSAGES, "max_completion_tokens": 8, "stream": True, "stream_options": {"include_usage": True}}
    assert adapt_request(CHAT, chat, "m") == {"messages": MESSAGES, "max_completion_tokens": 8, "stream": True}


def test_what_sglang_bench_serving_sends() -> None:
    body = {"model": "m", "prompt": "a", "temperature": 0.0, "best_of": 1, "max_tokens": 8, "stream": True, "ignore_eos": False}
    assert adapt_request(TEXT, body, "m") == {"prompt": "a", "temperature": 0.0, "max_tokens": 8, "stream": True}


def test_sampling_fields_become_a_generation_config() -> None:
    given = {"temperature": 0.7, "top_k": 5, "min_p": 0.1, "min_tokens": 3}
    assert sampling(given) == {"do_sample": True, "top_k": 5, "min_p": 0.1, "min_new_tokens": 3}
    assert sampling({"top_k": -1}) == {"top_k": 0}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (TEXT, {"prompt": "a", "logprobs": 2}, "cannot follow logprobs"),
        (TEXT, {"prompt": "a", "n": 2}, "cannot follow n "),
        (TEXT, {"prompt": "a", "echo": True}, "cannot follow echo"),
        (TEXT, {"prompt": "a", "logit_bias": {"1": 1}}, "cannot follow logit_bias"),
        (TEXT, {"prompt": "a", "presence_penalty": 0.5}, "cannot follow presence_penalty"),
        (TEXT, {"prompt": "a", "guided_json": "{}"}, "cannot follow guided_json"),
        (TEXT, {"prompt": "a", "messages": MESSAGES}, "cannot follow messages"),
        (TEXT, {"prompt": ["a", "b"]}, "the prompt is not a text"),
        (TEXT, {"prompt": [1, 2]}, "the prompt is not a text"),
        (TEXT, {}, "the prompt is not a text"),
        (CHAT, {}, "no messages"),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_object"}}, "cannot follow response_format"),
        (CHAT, {"messages": []}, "no messages"),
        (CHAT, {"messages": ["Why?"]}, "no messages"),
        (TEXT, {"prompt": "a", "model": "other"}, "one model"),
        (TEXT, {"prompt": "a", "max_tokens": 0}, r"max_tokens does not fit \(given 0; needed a whole number > 0\)"),
        (TEXT, {"prompt": "a", "max_tokens": "8"}, "max_tokens does not fit"),
        (TEXT, {"prompt": "a", "temperature": -1}, "temperature does not fit"),
        (TEXT, {"prompt": "a", "temperature": True}, "temperature does not fit"),
        (TEXT, {"prompt": "a", "stop": [1]}, "stop does not fit"),
        (TEXT, {"prompt": "a", "stream_options": "usage"}, "stream_options does not fit"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(path: str, body: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        adapt_request(path, body, "m")


def call(path: str, body: bytes = b"", method: str = "POST", answer: list[bytes] | None = None, status: int = 200) -> tuple[int, bytes, list[bytes]]:
    """Status and body of the answer, and the bodies that the application inside got; that sends the parts of `answer`, or raises."""
    got: list[bytes] = []
    sent: list[dict[str, Any]] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        headers = dict(scope["headers"])
        assert int(headers[b"content-length"]) == len(message["body"]) and headers[b"content-type"] == b"application/json"
        got.append(message["body"])
        if answer is None:
            raise KeyError("no such layer")
        kind = b"text/event-stream; charset=utf-8" if answer[0].startswith(b"data: ") else b"application/json"
        length = [] if kind.startswith(b"text") else [(b"content-length", str(sum(map(len, answer))).encode())]
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *length]})
        for part in answer:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    parts = [{"type": "http.request", "body": body[:5], "more_body": True}, {"type": "http.request", "body": body[5:], "more_body": False}]

    async def receive() -> dict[str, Any]:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    with contextlib.suppress(KeyError):
        asyncio.run(OneModel(inside, "m")({"type": "http", "path": path, "method": method, "headers": headers}, receive, send))
    text = b"".join(message.get("body", b"") for message in sent[1:])
    assert int(dict(sent[0]["headers"]).get(b"content-length", len(text))) == len(text)
    return sent[0]["status"], text, got


def events(answer: bytes) -> list[dict[str, Any]]:
    *parts, done, rest = answer.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_endpoints_that_load_other_models_are_closed() -> None:
    for path in ("/load_model", "/reset", "/v1/audio/transcriptions", "/docs"):
        status, body, got = call(path)
        assert status == 404 and b"is not served" in body and not got


def test_the_model_is_listed_by_its_name() -> None:
    status, body, _ = call("/v1/models", method="GET")
    assert status == 200 and [model["id"] for model in json.loads(body)["data"]] == ["m"]


@pytest.mark.parametrize("body", [b"{", b"[1]", b'{"prompt": 3}'])
def test_a_bad_request_is_answered_as_openai_does(body: bytes) -> None:
    status, answer, got = call(TEXT, body)
    assert status == 400 and json.loads(answer)["error"]["type"] == "invalid_request_error" and not got


def test_streams_end_as_openais_do() -> None:
    parts = [b'data: {"choices": [1], "model": "/dir"}\n', b'\ndata: {"choices": [2]}\n\ndata: {"choices": [3], "usage": {"total_tokens": 5}}\n\n']
    asked: dict[str, Any] = {"prompt": "a", "stream": True}
    streamed = [{"choices": [1], "model": "m"}, {"choices": [2], "model": "m"}, {"choices": [3], "usage": {"total_tokens": 5}, "model": "m"}]
    status, answer, got = call(TEXT, json.dumps(asked).encode(), answer=parts)
    assert status == 200 and events(answer) == streamed and json.loads(got[0]) == asked
    asked["stream_options"] = {"include_usage": True}
    assert events(call(TEXT, json.dumps(asked).encode(), answer=parts)[1]) == [*streamed, {**streamed[2], "choices": []}]


@pytest.mark.parametrize("text", [b'"it failed"', b'"it "failed""'])
def test_an_error_in_a_stream(text: bytes) -> None:
    asked = {"prompt": "a", "stream": True, "stream_options": {"include_usage": True}}
    (event,) = events(call(TEXT, json.dumps(asked).encode(), answer=[b'data: {"error": ' + text + b"}\n\n"])[1])
    assert event["error"]["type"] == "server_error" and "failed" in event["error"]["message"]


def test_an_answer_names_the_model_as_clients_do() -> None:
    status, body, _ = call(TEXT, b'{"prompt": "a"}', answer=[b'{"choices": [], ', b'"model": "/some/directory@main"}'])
    assert status == 200 and json.loads(body) == {"choices": [], "model": "m"}
    assert call(TEXT, b'{"prompt": "a"}', answer=[b'{"status":"ok"}'])[:2] == (200, b'{"status":"ok"}')


@pytest.mark.parametrize(
    ("answer", "status", "message", "kind"),
    [
        ([b'{"detail": "prompt is strange"}'], 422, "prompt is strange", "invalid_request_error"),
        ([b'{"detail": [{"loc": ["body"]}]}'], 422, '[{"loc": ["body"]}]', "invalid_request_error"),
        ([b'{"error": "the worker died"}'], 503, "the worker died", "server_error"),
        ([b"Internal Server Error"], 500, "Internal Server Error", "server_error"),
        (None, 500, "KeyError: 'no such layer'", "server_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_openais(answer: list[bytes] | None, status: int, message: str, kind: str, stream: bool) -> None:
    given, body, _ = call(TEXT, json.dumps({"prompt": "a", "stream": stream}).encode(), answer=answer, status=status)
    assert given == status and json.loads(body)["error"] == {"message": message, "type": kind, "param": None, "code": None}


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "build_server", serving.build_server)  # what `main` replaces
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    assert main([str(tmp_path), "m", "bf16", "--log-level", "error"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}: transformers cannot serve this model: ")
