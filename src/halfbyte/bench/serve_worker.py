"""One system in one process: `python -m halfbyte.bench.serve_worker PLAN.json`. Events come on stdout, a JSON object per line; all else on stderr.

SGLang's processes run this module too, as `__mp_main__`, before anything else: that is how `watch_sglang` gets there.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from halfbyte.bench.serve_engines import OFFLINE, OfflineEngine, Plan, watch_sglang
from halfbyte.bench.serve_rows import Workload
from halfbyte.errors import HalfbyteError

_WARM_TOKENS = 8
_ENOUGH_S, _MOST_SAMPLES = 0.5, 10  # the host's time decides what is shorter: one sample of 50 ms may be half as long again as the next
_REPEATED = Workload("prefill", 4, 64, 32)  # given twice, to see whether the tokens are the same


def measure(plan: Plan, start: Callable[[Plan], OfflineEngine], vocabulary: int) -> Iterator[dict[str, Any]]:
    """Start the engine and run the plan's workloads: an event with "start", then one with "index" for each workload.

    `start_s` is from the launch of this process until the first token of the first prompt.

    Raises:
        HalfbyteError: the engine returned another number of tokens.
    """
    engine = start(plan)
    repeated = prompts_of(_REPEATED, vocabulary, plan.seed)
    engine.generate(repeated[:1], 1)
    start_s = time.time() - plan.launched
    first, again = (engine.generate(repeated, _REPEATED.tokens_out) for _ in range(2))
    yield {"start": {"start_s": start_s, **engine.facts(), "repeats": first == again}}
    for index, workload in enumerate(Workload(**fields) for fields in plan.workloads):
        prompts = prompts_of(workload, vocabulary, plan.seed)
        _timed(engine, prompts, min(workload.tokens_out, _WARM_TOKENS))
        whole = _samples(engine, prompts, workload.tokens_out, plan.repeats)
        prefill = min(_samples(engine, prompts, 1, plan.repeats)) if workload.kind == "decode" else 0.0
        best = min(whole)
        yield {"index": index, "seconds": best - prefill, "spread": max(whole) / best - 1, "samples": len(whole)}


def prompts_of(workload: Workload, vocabulary: int, seed: int) -> list[list[int]]:
    """Random token ids, the same in every process; the lowest ids, which are special in most vocabularies, are left out."""
    draw = random.Random(f"{seed} {workload}")
    low = min(1000, vocabulary // 2)
    return [[draw.randrange(low, vocabulary) for _ in range(workload.tokens_in)] for _ in range(workload.num_prompts)]


def _samples(engine: OfflineEngine, prompts: list[list[int]], tokens_out: int, repeats: int) -> list[float]:
    """Seconds of `repeats` runs, and of more until they are `_ENOUGH_S` altogether, or `_MOST_SAMPLES`."""
    seconds: list[float] = []
    while len(seconds) < repeats or (len(seconds) < _MOST_SAMPLES and sum(seconds) < _ENOUGH_S):
        seconds.append(_timed(engine, prompts, tokens_out))
    return seconds


def _timed(engine: OfflineEngine, prompts: list[list[int]], tokens_out: int) -> float:
    start = time.perf_counter()
    answers = engine.generate(prompts, tokens_out)
    seconds = time.perf_counter() - start
    lengths = {len(answer) for answer in answers}
    if len(answers) != len(prompts) or lengths != {tokens_out}:
        raise HalfbyteError("the engine returned another number of tokens", given=sorted(lengths), needed=tokens_out)
    return seconds


def vocabulary_of(model: str) -> int:
    """How many token ids the model in this directory has."""
    config = json.loads((Path(model) / "config.json").read_text())
    return int(config.get("text_config", config)["vocab_size"])


def main(plan: Plan) -> int:
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print
    for event in measure(plan, OFFLINE[plan.engine], vocabulary_of(plan.model)):
        print(json.dumps(event), file=events, flush=True)
    return 0


if __name__ in ("__main__", "__mp_main__"):
    _plan = Plan.read(Path(sys.argv[1]))
    if __name__ == "__mp_main__":
        if _plan.engine == "sglang":
            watch_sglang(_plan)
    else:
        _code = main(_plan)
        sys.stdout.flush()
        os._exit(_code)  # the engine's own shutdown can take long
