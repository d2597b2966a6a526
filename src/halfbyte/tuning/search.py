"""The search: what is raced in which bucket, and what wins. Plain Python: it does not know how candidates are timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from halfbyte.kernels.problem import Problem, Size
from halfbyte.kernels.table import KernelChoice
from halfbyte.kernels.tuned import Race, buckets, fields_of
from halfbyte.tuning.times import Measure, Time

MARGIN = 1.02  # what a configuration has to lead by: two races of equal configurations differ by less
MAX_CANDIDATES = 8
MAX_TOKENS = 16384
ROUTINGS = ("uniform", "skewed", "one-expert")


@dataclass(frozen=True)
class Heat:
    """What is raced in a bucket. The first candidate is the rule's: it always races."""

    bucket: str
    num_tokens: int
    candidates: tuple[Hashable, ...]


def plan(kernel: KernelChoice, problem: Problem, top_k: int) -> list[Heat]:
    """A heat for every bucket that calls of up to `MAX_TOKENS` tokens reach, in the middle of it."""
    heats, below = [], 0
    for limit, name in buckets(problem.num_experts):
        middle = math.sqrt((below + 1) * limit) if limit < 1 << 62 else 1.5 * below
        size = Size(max(1, round(middle / top_k)), top_k)
        if below < size.num_rows <= limit and size.num_tokens <= MAX_TOKENS:
            rule = kernel.choose_config(problem, size)
            heats.append(Heat(name, size.num_tokens, (rule, *kernel.rivals(problem, size, rule))[:MAX_CANDIDATES]))
        below = limit
    return heats


def search(heats: Sequence[Heat], measure: Measure, deadline: float = math.inf, clock: Callable[[], float] = time.monotonic) -> Iterator[Race]:
    """A race for each heat, in order, as soon as it is decided, until the deadline."""
    for heat in heats:
        if clock() >= deadline:
            return
        yield decide(heat, [measure(heat.num_tokens, routing, heat.candidates) for routing in ROUTINGS])


def decide(heat: Heat, times: Sequence[Mapping[Hashable, Time]]) -> Race:
    """The rule's configuration stays unless another leads it by more than the noise with every routing; then the one that leads by most where it
    leads by least."""
    rule = heat.candidates[0]
    reasons = {config: next((each[config].reason for each in times if each[config].reason), "") for config in heat.candidates}

    def lead(config: Hashable, routing: Mapping[Hashable, Time]) -> float:
        return math.inf if reasons[rule] else routing[rule].us / routing[config].us

    rivals = {config: min(lead(config, routing) for routing in times) for config in heat.candidates[1:] if not reasons[config]}
    winner = max(rivals, key=rivals.__getitem__, default=rule)
    if winner != rule and rivals[winner] < MARGIN:
        winner = rule
    closest = min(times, key=lambda routing: lead(winner, routing))
    return Race(
        bucket=heat.bucket,
        num_tokens=heat.num_tokens,
        default=str(rule),
        taken=str(winner),
        config=None if winner == rule else fields_of(winner),
        us=_us(closest[winner]),
        default_us=_us(closest[rule]),
        spread=round(max(closest[config].spread for config in (winner, rule)), 4),
        times={str(config): [round(each[config].us, 2) for each in times] for config in heat.candidates if not reasons[config]},
        excluded={str(config): reason for config, reason in reasons.items() if reason},
    )


def merge(races: Sequence[Race]) -> list[Race]:
    """Let a bucket take the configuration of the one below, where that costs less than the noise and is not slower than the rule's: fewer kernels to
    compile."""
    merged: list[Race] = []
    for race in races:
        below = merged[-1] if merged else race
        theirs = race.times.get(below.taken)
        if below.config is not None and race.config not in (None, below.config) and theirs is not None:
            costs = [us / best for us, best in zip(theirs, race.times[race.taken], strict=True)]
            if max(costs) < MARGIN and all(us <= rule for us, rule in zip(theirs, race.times.get(race.default, theirs), strict=True)):
                race = replace(race, taken=below.taken, config=below.config, us=theirs[costs.index(max(costs))])
        merged.append(race)
    return merged


def _us(time: Time) -> float | None:
    return round(time.us, 2) if math.isfinite(time.us) else None
