"""Do two tunes of the same layers agree, and is the first one's table as good as the second's? No GPU; both are files of `halfbyte tune --export`.

git show 77c1a0b:src/halfbyte/kernels/tables/nvidia-h200.json > first.json
git show cf6ee5a:src/halfbyte/kernels/tables/nvidia-h200.json > second.json
python benchmarks/two_tunes.py first.json second.json
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from halfbyte.kernels.tuned import Layer, Race, read


class Pair(NamedTuple):
    """One bucket in both tunes. `first_takes` and `second_takes` are names of configurations for the second one's number of tokens."""

    layer: Layer
    first: Race
    second: Race
    first_takes: str
    routings: int

    @property
    def agrees(self) -> bool:
        return self.first_takes == self.second.taken

    @property
    def same_question(self) -> bool:
        return (self.first.num_tokens, self.first.default) == (self.second.num_tokens, self.second.default)

    def over(self, name: str, other: str) -> list[float]:
        """Times of one configuration over those of another in the second tune, a number per routing."""
        return [a / b for a, b in zip(self.second.times[name], self.second.times[other], strict=True)]


def pairs_of(first: Sequence[Layer], second: Sequence[Layer]) -> Iterator[Pair]:
    """The buckets that were raced in both."""
    by_key = {layer.key: layer for layer in first}
    for layer in second:
        before = by_key.get(layer.key)
        if before is None:
            continue
        races = {race.bucket: race for race in before.races}
        for race in layer.races:
            if race.bucket in races and races[race.bucket].times != race.times:
                theirs = races[race.bucket]
                takes = race.default if theirs.config is None else theirs.taken  # no entry: the rule's, for whatever size
                if takes in race.times:
                    yield Pair(layer, theirs, race, takes, min(len(before.routings), len(layer.routings)))


def report(pairs: Sequence[Pair]) -> Iterator[str]:
    """What two tunes have in common, line by line."""
    agree = sum(pair.agrees for pair in pairs)
    entries = sum(not pair.agrees or pair.first.config is not None for pair in pairs)
    yield f"{agree} of {len(pairs)} buckets agree ({agree / len(pairs):.1%}); in {len(pairs) - entries} of them it is the rule's in both"
    same = [(pair, routing) for pair in pairs if pair.same_question for routing in range(pair.routings)]
    fastest = sum(_fastest(pair.first, routing) == _fastest(pair.second, routing) for pair, routing in same)
    yield f"the fastest candidate is the same in {fastest} of {len(same)} races of as many tokens ({fastest / max(1, len(same)):.1%})"
    leads = [
        abs(_over_rule(pair.second, name, routing) / _over_rule(pair.first, name, routing) - 1)
        for pair, routing in same
        for name in pair.first.times.keys() & pair.second.times.keys() - {pair.second.default}
    ]
    if leads:
        middle, high = statistics.median(leads), sorted(leads)[int(0.95 * (len(leads) - 1))]
        yield f"{len(leads)} times over the rule's, measured twice, differ by {middle:.1%} (median), {high:.1%} (95th percentile)"
    regrets = [max(pair.over(pair.first_takes, pair.second.taken)) for pair in pairs]
    mean, above = math.exp(statistics.fmean(map(math.log, regrets))), sum(regret > 1.02 for regret in regrets)
    yield f"the first table's time over the second's, worst routing: {mean:.4f} (geometric mean), buckets above 1.02: {above}"
    for pair in pairs:
        if not pair.agrees or pair.first_takes != pair.second.default:
            place = f"{pair.layer.name}, {pair.layer.key.activations}, up to {pair.second.bucket}, {pair.second.num_tokens} tokens"
            gain = ", ".join(f"{ratio:.3f}" for ratio in pair.over(pair.second.default, pair.first_takes))
            regret = ", ".join(f"{ratio:.3f}" for ratio in pair.over(pair.first_takes, pair.second.taken))
            yield f"  {place}: first {pair.first_takes}, second {pair.second.taken}; rule over first {gain}; first over second {regret}"


def _fastest(race: Race, routing: int) -> str:
    return min(race.times, key=lambda name: race.times[name][routing])


def _over_rule(race: Race, name: str, routing: int) -> float:
    return race.times[name][routing] / race.times[race.default][routing]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    arguments = parser.parse_args()
    pairs = list(pairs_of(read(arguments.first).layers, read(arguments.second).layers))
    print("\n".join(report(pairs)) if pairs else "no bucket was raced twice")


if __name__ == "__main__":
    main()
