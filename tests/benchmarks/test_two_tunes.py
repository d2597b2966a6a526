"""Two tunes beside each other: where they agree, and what the first one's choice costs in the second one's times."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmark_scripts import load_script

from halfbyte.kernels.tuned import Layer, LayerKey, Race

script = load_script("two_tunes")
KEY = LayerKey("hopper", "hopper", "nvfp4", "bf16", True, 512, 256, 32)


def race(bucket: str, taken: str, num_tokens: int = 8, **times: list[float]) -> Race:
    config: dict[str, Any] | None = None if taken == "RULE" else {"name": taken}
    return Race(bucket, num_tokens, "RULE", taken, config, 1.0, 1.0, 0.0, times, {})


def layer(*races: Race) -> Layer:
    return Layer(KEY, "hash", {}, "2026-11-30", "small", 4, ("uniform", "skewed"), {}, races)


FIRST = layer(
    race("a", "RULE", RULE=[100.0, 100.0], OTHER=[102.0, 101.0]),
    race("b", "OTHER", RULE=[100.0, 100.0], OTHER=[90.0, 95.0]),
    race("c", "RULE", 8, RULE=[100.0, 100.0], OTHER=[99.0, 110.0]),
    race("d", "RULE", RULE=[50.0, 50.0]),
)
SECOND = layer(
    race("a", "RULE", RULE=[100.0, 100.0], OTHER=[103.0, 99.0]),
    race("b", "OTHER", RULE=[100.0, 100.0], OTHER=[92.0, 96.0]),
    race("c", "OTHER", 9, RULE=[100.0, 104.0], OTHER=[95.0, 96.0]),
    race("d", "RULE", RULE=[50.0, 50.0]),
)


def test_buckets_are_compared_that_were_raced_twice() -> None:
    pairs = list(script.pairs_of([FIRST], [SECOND]))
    assert [(pair.second.bucket, pair.agrees, pair.same_question) for pair in pairs] == [("a", True, True), ("b", True, True), ("c", False, False)]
    assert not list(script.pairs_of([replace(FIRST, key=replace(KEY, experts=64))], [SECOND]))


def test_the_report() -> None:
    agree, fastest, leads, regret, entry, other = script.report(list(script.pairs_of([FIRST], [SECOND])))
    assert agree.startswith("2 of 3 buckets agree (66.7%); in 1 of them it is the rule's in both")
    assert fastest.startswith("the fastest candidate is the same in 3 of 4 races")
    assert leads.startswith("4 times over the rule's") and regret.endswith("buckets above 1.02: 1")
    assert "rule over first 1.087, 1.042; first over second 1.000, 1.000" in entry
    assert "first RULE, second OTHER" in other and "first over second 1.053, 1.083" in other
