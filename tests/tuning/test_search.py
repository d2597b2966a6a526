"""What is raced in which bucket, and what wins, with times that follow from sizes."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton")

from races import SHAPE, Races, layer

from halfbyte.kernels.problem import Size
from halfbyte.kernels.sm90.configs import DIRECT, MEDIUM, SMALL, TINY
from halfbyte.kernels.tuned import Race, buckets, fields_of
from halfbyte.tuning.search import MAX_CANDIDATES, ROUTINGS, Heat, decide, merge, plan, search
from halfbyte.tuning.times import Time

HEAT = Heat("8 rows per expert", 64, (TINY, SMALL, MEDIUM))


def times(*rows: dict[object, float]) -> list[dict[object, Time]]:
    return [{config: Time(us, 0.01) for config, us in row.items()} for row in rows]


def test_every_bucket_is_raced_in_its_middle_with_the_rule_first() -> None:
    example = layer()
    heats = plan(example.kernel, example.problem, SHAPE.top_k)
    limits = {name: limit for limit, name in buckets(SHAPE.num_experts)}
    assert len(heats) >= 14 and [heat.bucket for heat in heats] == list(limits)[-len(heats) :]
    for heat, below in zip(heats[1:], heats, strict=False):
        assert limits[below.bucket] < heat.num_tokens * SHAPE.top_k <= limits[heat.bucket]
    for heat in heats:
        assert heat.candidates[0] == example.kernel.choose_config(example.problem, Size(heat.num_tokens, SHAPE.top_k))
        assert len(set(heat.candidates)) == len(heat.candidates) <= MAX_CANDIDATES
    assert DIRECT in heats[0].candidates and all(DIRECT not in heat.candidates for heat in heats if heat.num_tokens > 8)


def test_the_rule_stays_within_the_noise() -> None:
    race = decide(HEAT, times(*[{TINY: 100.0, SMALL: 98.5, MEDIUM: 120.0}] * 3))
    assert race.config is None and (race.us, race.default_us, race.default) == (100.0, 100.0, "TINY")
    assert race.times == {"TINY": [100.0] * 3, "SMALL": [98.5] * 3, "MEDIUM": [120.0] * 3}


def test_a_winner_leads_with_every_routing() -> None:
    uniform, zipf, hot = {TINY: 100, SMALL: 80, MEDIUM: 95}, {TINY: 100, SMALL: 101, MEDIUM: 95}, {TINY: 100, SMALL: 70, MEDIUM: 96}
    race = decide(HEAT, times(uniform, zipf, hot))
    assert race.config == fields_of(MEDIUM) and (race.us, race.default_us) == (96, 100)  # SMALL loses one, MEDIUM leads by 4 % where it leads least


def test_a_configuration_that_fails_with_one_routing_is_named_and_out() -> None:
    rows = times(*[{TINY: 100.0, SMALL: 50.0, MEDIUM: 90.0}] * 3)
    rows[1][SMALL] = Time(reason="the result is wrong")
    race = decide(HEAT, rows)
    assert race.config == fields_of(MEDIUM) and race.excluded == {"SMALL": "the result is wrong"} and "SMALL" not in race.times


def test_any_that_runs_beats_a_rule_that_fails() -> None:
    rows = times(*[{TINY: 100.0, SMALL: 500.0, MEDIUM: 600.0}] * 3)
    rows[0][TINY] = Time(reason="hung")
    race = decide(HEAT, rows)
    assert race.config == fields_of(SMALL) and race.default_us is None and "TINY" in race.excluded


def test_the_budget_ends_the_search_between_races() -> None:
    clock = itertools.count(0.0, 10.0)
    heats = [Heat(str(index), 64, (TINY, SMALL)) for index in range(9)]
    races = Races()
    assert len(list(search(heats, races, deadline=25.0, clock=lambda: next(clock)))) == 3
    assert races.raced == [(64, routing) for routing in ROUTINGS] * 3


def test_neighbours_share_a_configuration_where_that_costs_nothing() -> None:
    def race(config: object, **us: float) -> Race:
        fields, best = fields_of(config) if config else None, us[str(config or "DECODE")]
        return Race("b", 1, "DECODE", str(config or "DECODE"), fields, best, us["DECODE"], 0.0, {name: [t] * 3 for name, t in us.items()}, {})

    small = race(SMALL, DECODE=100.0, SMALL=80.0, MEDIUM=81.0)
    close, far = race(MEDIUM, DECODE=100.0, SMALL=81.0, MEDIUM=80.0), race(MEDIUM, DECODE=100.0, SMALL=85.0, MEDIUM=80.0)
    stays, slower = race(None, DECODE=100.0, SMALL=99.5, MEDIUM=120.0), race(MEDIUM, DECODE=80.5, SMALL=81.0, MEDIUM=80.0)
    assert [each.config for each in merge([small, close, close])] == [fields_of(SMALL)] * 3
    assert [each.config for each in merge([small, far, close])] == [fields_of(SMALL), fields_of(MEDIUM), fields_of(MEDIUM)]
    assert [each.config for each in merge([small, stays, close])] == [fields_of(SMALL), None, fields_of(MEDIUM)]
    assert merge([small, slower])[1].config == fields_of(MEDIUM)  # SMALL would be slower than the rule
    assert merge([small, close])[1].us == 81.0
