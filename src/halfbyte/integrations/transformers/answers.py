"""Answers of transformers' server in the form of OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


async def reply(send: Send, status: int, document: Any) -> None:
    """Send a whole answer."""
    body = json.dumps(document).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_document(message: str, status: int = 400) -> dict[str, Any]:
    """What OpenAI's server answers with a status of 400 or more.

    >>> error_document("no messages")["error"]["type"]
    'invalid_request_error'
    """
    return {"error": {"message": message, "type": "invalid_request_error" if status < 500 else "server_error", "param": None, "code": None}}


class Answer:
    """A `send` for the application inside.

    Answers and events of a stream name the model as clients do, not by its directory. What is wrong comes as `error_document`. A stream ends with the
    usage alone, where that was asked for, and [DONE].
    """

    def __init__(self, send: Send, served: str, *, wants_usage: bool = False):
        self._send, self._served, self._wants_usage = send, served, wants_usage
        self._start: Message = {}
        self._is_stream = False
        self._rest = b""  # of a stream: the event that has not ended; otherwise all there is
        self._usage: dict[str, Any] | None = None
        self.has_begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            self._is_stream = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
            if self._is_stream:
                await self._begin(message)
        elif message["type"] == "http.response.body":
            self._rest += message.get("body", b"")
            is_last = not message.get("more_body", False)
            if self._is_stream:
                await self._send({**message, "body": self._events(is_last)})
            elif is_last:
                await self._whole()

    async def _begin(self, start: Message) -> None:
        self.has_begun = True
        await self._send(start)

    def _events(self, is_last: bool) -> bytes:
        *whole, self._rest = self._rest.split(b"\n\n")
        documents = [self._event(event.removeprefix(b"data: ")) for event in whole]
        if not is_last:
            return _as_events(documents)
        if self._wants_usage and self._usage is not None:
            documents.append({**self._usage, "choices": []})  # clients of `stream_options` look for it there
        return _as_events(documents) + b"data: [DONE]\n\n"

    def _event(self, event: bytes) -> dict[str, Any]:
        try:
            document = json.loads(event)
        except ValueError:  # transformers 5.23 puts the text of an error between quotes as it is
            return error_document(event.decode(errors="replace"), 500)
        if "error" in document:
            return error_document(str(document["error"]), 500)
        document["model"] = self._served
        if document.get("usage"):
            self._usage = document
        return document

    async def _whole(self) -> None:
        status = self._start["status"]
        if status >= 400:
            self.has_begun = True
            await reply(self._send, status, error_document(_reason(self._rest), status))
            return
        document = json.loads(self._rest)
        body = json.dumps({**document, "model": self._served}).encode() if "choices" in document else self._rest
        headers = [(name, value) for name, value in self._start["headers"] if name != b"content-length"]
        await self._begin({**self._start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})


def _as_events(documents: list[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + json.dumps(document).encode() + b"\n\n" for document in documents)


def _reason(body: bytes) -> str:
    """What an answer of FastAPI, or of transformers, says is wrong."""
    try:
        document = json.loads(body)
    except ValueError:
        return body.decode(errors="replace")
    reason = document.get("detail", document.get("error", document))
    return reason if isinstance(reason, str) else json.dumps(reason)
