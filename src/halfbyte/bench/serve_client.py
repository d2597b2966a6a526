"""Requests to an OpenAI server, many at a time, and how long their tokens took; the numbers are defined as `vllm bench serve` defines them."""

from __future__ import annotations

import http.client
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from halfbyte.bench.serve_rows import Workload
from halfbyte.bench.serve_worker import prompts_of
from halfbyte.errors import HalfbyteError
from halfbyte.serve import Launch


@dataclass(frozen=True)
class Requests:
    """How many requests of how many tokens in and out, and how many of them are under way together."""

    num_requests: int
    concurrency: int
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True)
class Goodput:
    """What a request may take at most to count as good, in ms; None is no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    @property
    def is_asked(self) -> bool:
        return self.ttft_ms is not None or self.tpot_ms is not None


@dataclass(frozen=True)
class Answer:
    """One answered request: times in ms, and its tokens. `error` is why it was not answered, else ""."""

    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    tokens: int = 0
    error: str = ""


def send_requests(launch: Launch, requests: Requests, vocabulary: int, goodput: Goodput, seed: int) -> dict[str, Any]:
    """Send all requests, of random tokens, and return the fields of a `ServerRow` that are measured.

    Raises:
        HalfbyteError: a request was not answered.
    """
    workload = Workload("server", requests.num_requests, requests.tokens_in, requests.tokens_out)
    prompts = prompts_of(workload, vocabulary, seed)
    ask(launch, prompts[0], requests.tokens_out)  # the first request of a server compiles and connects
    start = time.perf_counter()
    with ThreadPoolExecutor(requests.concurrency) as pool:
        answers = list(pool.map(lambda prompt: ask(launch, prompt, requests.tokens_out), prompts))
    duration = time.perf_counter() - start
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise HalfbyteError(f"{len(failed)} of {len(answers)} requests were not answered: {failed[0]}", where=launch.url)
    return summary(answers, duration, goodput)


def ask(launch: Launch, prompt: Sequence[int], tokens_out: int) -> Answer:
    """Send one request and read its stream."""
    body = {"model": launch.served, "prompt": list(prompt), "max_tokens": tokens_out, "temperature": 0, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection(launch.local_host, launch.port)
    start = time.perf_counter()
    try:
        connection.request("POST", "/v1/completions", body=json.dumps(body), headers={"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return Answer(error=f"status {response.status}, {response.read(200).decode(errors='replace')}")
        moments = [time.perf_counter() for _ in _token_events(response)]
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(error=f"{type(error).__name__}: {error}")
    finally:
        connection.close()
    if not moments:
        return Answer(error="the stream had no tokens")
    after_first = (moments[-1] - moments[0]) / max(tokens_out - 1, 1)  # several tokens can come in one event, so tokens are counted by what was asked
    return Answer(1e3 * (moments[0] - start), 1e3 * after_first, tokens_out)


def _token_events(response: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    """The events of a stream that have choices."""
    for line in response:
        text = line.decode().strip().removeprefix("data: ")
        if line.startswith(b"data: ") and text != "[DONE]" and (event := json.loads(text)).get("choices"):
            yield event


def summary(answers: Sequence[Answer], duration: float, goodput: Goodput) -> dict[str, Any]:
    """The fields of a `ServerRow` for these answers, which took `duration` seconds together.

    >>> summary([Answer(10, 2, 8), Answer(30, 4, 8)], 2.0, Goodput(ttft_ms=20))["request_goodput"]
    0.5
    """
    good = [a for a in answers if _within(a.ttft_ms, goodput.ttft_ms) and _within(a.tpot_ms, goodput.tpot_ms)]
    times = {"ttft_ms": [answer.ttft_ms for answer in answers], "tpot_ms": [answer.tpot_ms for answer in answers]}
    return {
        "duration": duration,
        "completed": len(answers),
        "request_throughput": len(answers) / duration,
        "output_throughput": sum(answer.tokens for answer in answers) / duration,
        "request_goodput": len(good) / duration if goodput.is_asked else None,
        **{f"mean_{name}": statistics.fmean(values) for name, values in times.items()},
        **{f"median_{name}": statistics.median(values) for name, values in times.items()},
        **{f"p99_{name}": _percentile(values, 99) for name, values in times.items()},
    }


def _within(value: float, limit: float | None) -> bool:
    return limit is None or value <= limit


def _percentile(values: Sequence[float], percent: int) -> float:
    """Interpolated between neighbours, as numpy's default."""
    return values[0] if len(values) == 1 else statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
