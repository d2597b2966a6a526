"""`halfbyte serve` as a user starts it: the demo model with NVFP4 experts, on a CPU, through transformers' own server."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli.main import main

QUESTION = "Kate has $75 and saves $17 a week for 8 weeks. How many dollars does Kate have then?"
PROMPT = f"<bos>Q: {QUESTION}\nA:"
ANSWER = " Saved: 17*8=136. Has: 75+136=211.\n#### 211"
GREEDY = {"model": "demo-nvfp4", "max_tokens": 48, "temperature": 0}


def as_at_a_terminal() -> None:
    """Ctrl-C arrives: a shell lets what it starts in the background, these tests perhaps, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def serving(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process, and what it said when it was ready. It has as long as it needs: it ends when it fails."""
    command = [sys.executable, "-m", "halfbyte", "serve", str(model), "--served-model-name", "demo-nvfp4", "--port", "0", "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=as_at_a_terminal)
    try:
        line = process.stdout.readline()
        assert line, f"ended with {process.wait()}"
        yield process, json.loads(line)
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("serve") / "demo-nvfp4"
    assert main(["quantize", "demo", str(directory), "--format", "nvfp4"]) == 0
    return directory


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    connection.request("GET" if body is None else "POST", path, body=None if body is None else json.dumps(body))
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def events(stream: str) -> list[dict[str, Any]]:
    *parts, done, rest = stream.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


@pytest.mark.slow
def test_every_endpoint_answers_and_a_signal_ends_it(model: Path) -> None:
    with serving(model) as (process, ready):
        url = ready["url"]
        assert ready["engine"] == "transformers" and url.startswith("http://127.0.0.1:")
        assert ask(url, "/health") == (200, '{"status":"ok"}')
        assert [one["id"] for one in json.loads(ask(url, "/v1/models")[1])["data"]] == ["demo-nvfp4"]

        status, text = ask(url, "/v1/completions", {**GREEDY, "prompt": PROMPT})
        answer = json.loads(text)
        assert answer["model"] == GREEDY["model"]
        assert status == 200 and answer["choices"][0]["text"] == ANSWER and answer["choices"][0]["finish_reason"] == "stop"
        length = answer["usage"]["completion_tokens"]

        asked = {**GREEDY, "prompt": PROMPT, "stream": True, "stream_options": {"include_usage": True}}
        *streamed, usage = events(ask(url, "/v1/completions", asked)[1])
        assert "".join(event["choices"][0]["text"] for event in streamed) == ANSWER and len(streamed) > length / 2
        assert {event["model"] for event in streamed} == {GREEDY["model"]}
        assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == length

        chat = {**GREEDY, "messages": [{"role": "user", "content": QUESTION}]}
        assert json.loads(ask(url, "/v1/chat/completions", chat)[1])["choices"][0]["message"]["content"] == ANSWER.strip()
        streamed = events(ask(url, "/v1/chat/completions", {**chat, "stream": True})[1])
        assert "".join(event["choices"][0]["delta"].get("content") or "" for event in streamed) == ANSWER

        longer = {**GREEDY, "prompt": PROMPT, "ignore_eos": True, "max_tokens": length + 4}
        answer = json.loads(ask(url, "/v1/completions", longer)[1])
        assert answer["usage"]["completion_tokens"] == length + 4 and answer["choices"][0]["text"].startswith(ANSWER)

        with ThreadPoolExecutor() as clients:  # at once
            asked = [("/v1/completions", {**GREEDY, "prompt": PROMPT, "max_tokens": 8}), ("/v1/chat/completions", {**chat, "max_tokens": 8})]
            text, message = (json.loads(text)["choices"][0] for _, text in clients.map(lambda one: ask(url, *one), asked))
        assert ANSWER.startswith(text["text"]) and ANSWER.strip().startswith(message["message"]["content"]) and message["message"]["content"]

        status, text = ask(url, "/v1/completions", {**GREEDY, "prompt": PROMPT, "logprobs": 1})
        assert status == 400 and "cannot follow logprobs" in json.loads(text)["error"]["message"]
        status, text = ask(url, "/v1/completions")  # GET
        assert status == 405 and json.loads(text)["error"]["type"] == "invalid_request_error"
        assert ask(url, "/load_model", {"model": "other/model"})[0] == 404

        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        with pytest.raises(ConnectionError):
            ask(url, "/health")


@pytest.mark.slow
def test_continuous_batching_gives_the_same_text(model: Path) -> None:
    batching = ("--continuous-batching", "--cb-num-blocks", "16", "--cb-block-size", "32", "--cb-max-batch-tokens", "64")
    with serving(model, "--", *batching) as (process, ready):
        asked = {**GREEDY, "prompt": PROMPT, "max_tokens": 8}
        with ThreadPoolExecutor() as clients:
            one, other = clients.map(lambda _: json.loads(ask(ready["url"], "/v1/completions", asked)[1])["choices"][0]["text"], range(2))
        assert one == other and len(one) > 5 and ANSWER.startswith(one)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
