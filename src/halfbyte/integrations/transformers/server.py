"""transformers' own server, with halfbyte's experts, for one model.

    python -m halfbyte.integrations.transformers.server DIR NAME ACTIVATIONS [options of `transformers serve`]

`halfbyte serve` runs this module as its engine "transformers".

Around the application that transformers builds stands `OneModel`, which knows the model by its name, translates requests (`requests.py`) and answers
(`answers.py`), and leaves only the endpoints below open: the rest of transformers' server loads other models.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import wraps
from typing import Any, cast

from halfbyte.errors import CheckpointError, HalfbyteError, InputError
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.integrations.transformers import set_activations
from halfbyte.integrations.transformers.answers import Answer, Message, Send, error_document, reply
from halfbyte.integrations.transformers.requests import COMPLETION_PATHS, adapt_request

OPEN_PATHS = ("/health", "/v1/models", *COMPLETION_PATHS)

Receive = Callable[[], Awaitable[Message]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class OneModel:
    """An ASGI application around transformers' own."""

    def __init__(self, application: Application, served: str):
        self.application = application
        self.served = served

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # start-up and shutdown
            await self.application(scope, receive, send)
        elif scope["path"] not in OPEN_PATHS:
            await reply(send, 404, error_document(f"{scope['path']} is not served: {', '.join(OPEN_PATHS)} are"))
        elif scope["path"] == "/v1/models":
            model = {"id": self.served, "object": "model", "created": 0, "owned_by": "halfbyte"}
            await reply(send, 200, {"object": "list", "data": [model]})
        elif scope["path"] in COMPLETION_PATHS and scope["method"] == "POST":
            await self._complete(scope, receive, send)
        else:
            await self.application(scope, receive, Answer(send, self.served))

    async def _complete(self, scope: Message, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        try:
            asked = json.loads(body)
            if not isinstance(asked, dict):
                raise InputError("not a request", given=type(asked).__name__, needed="a JSON object")
            adapted = json.dumps(adapt_request(scope["path"], asked, self.served)).encode()
        except (ValueError, InputError) as error:  # JSON's own error is a ValueError
            await reply(send, 400, error_document(str(error)))
            return
        headers = [(name, value) for name, value in scope["headers"] if name not in (b"content-length", b"content-type")]
        headers += [(b"content-length", str(len(adapted)).encode()), (b"content-type", b"application/json")]
        first = [{"type": "http.request", "body": adapted, "more_body": False}]

        async def receive_adapted() -> Message:
            return first.pop() if first else await receive()  # later messages tell that the client has gone

        answer = Answer(send, self.served, wants_usage=bool((asked.get("stream_options") or {}).get("include_usage")))
        try:
            await self.application({**scope, "headers": headers}, receive_adapted, answer)
        except Exception as error:
            if not answer.has_begun:
                await reply(send, 500, error_document(f"{type(error).__name__}: {error}", 500))
            raise  # for the log


async def _read(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


def run(directory: str, served: str, activations: ActivationFormat, options: Sequence[str]) -> None:
    """Serve until a signal comes.

    Args:
        directory: of the model.
        served: the name that clients know it by.
        activations: what packed experts compute on.
        options: of `transformers serve`.

    Raises:
        SystemExit: `transformers serve` does not take the options, which it has said.
        CheckpointError: the model cannot be loaded.
        HalfbyteError: as `load`.
    """
    from transformers.cli.serving import server, utils
    from transformers.cli.transformers import app

    stock, at_end = server.build_server, contextlib.ExitStack()

    @wraps(stock)
    def build(model_manager: Any, *args: Any, generation_state: Any, **kwargs: Any) -> Any:
        application = stock(model_manager, *args, generation_state=generation_state, **kwargs)
        at_end.callback(generation_state.shutdown)  # the thread of continuous batching would keep the process alive
        for loaded in model_manager.loaded_models.values():
            set_activations(loaded.model, activations)
            _fit_response_template(loaded.processor, utils.get_response_template(loaded.processor, loaded.model))
        application.add_middleware(OneModel, served=served)
        return application

    server.build_server = build
    with at_end:
        try:
            app(["serve", directory, *options], prog_name="halfbyte serve ... --")
        except HalfbyteError:
            raise
        except Exception as error:  # whatever transformers, tokenizers and safetensors raise for broken files
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            next_step = "run `halfbyte inspect` on it"
            raise CheckpointError(f"transformers cannot serve this model: {reason}", where=directory, next_step=next_step) from error


def _fit_response_template(processor: Any, template: Mapping[str, Any] | None) -> None:
    """Give the tokenizer a template of answers that fits its chat template, if transformers' for this type of model does not.

    transformers 5.23 looks for the start of the answer in the prompt; where it finds none, a streamed answer begins with the whole prompt.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if template is None or not tokenizer.chat_template:
        return
    question = "Why?"
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
    anchors = template.get("start_anchor", ())
    if "start_anchor_pattern" in template or any(anchor in prompt for anchor in ([anchors] if isinstance(anchors, str) else anchors)):
        return
    opening = prompt.rpartition(question)[2]
    tokenizer.response_template = {"start_anchor": opening, "fields": {"content": {"close": tokenizer.eos_token, "content": "text"}}}


def main(argv: Sequence[str]) -> int:
    directory, served, activations, *options = argv
    try:
        run(directory, served, cast(ActivationFormat, activations), options)
    except HalfbyteError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
