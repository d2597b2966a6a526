"""What `halfbyte tune --report` says of races whose times are known."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from races import Racing, layer

from halfbyte.tuning import report
from halfbyte.tuning.run import load, tune


def test_the_summary_is_by_activations_and_routing(tmp_path: Path) -> None:
    list(tune([layer()], Racing(), directory=tmp_path))
    (table,) = load([layer()], tmp_path)
    races = table.layers[0].races
    regrets = [race.times[race.default][0] / min(times[0] for times in race.times.values()) for race in races]
    gains = [race.default_us / race.us for race in races if race.config is not None and race.us and race.default_us]
    lines = report.summary(table.layers).splitlines()
    assert [line.split(" | ")[1] for line in lines[4:7]] == ["uniform", "skewed", "one-expert"]
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert cells[:3] == ["bf16", "uniform", str(len(races))]
    assert cells[4:] == [f"{max(regrets):.3f}", str(sum(regret > 1.03 for regret in regrets))]
    assert gains and lines[-1] == f"Buckets with a faster configuration: {len(gains)}, by {min(gains):.3f} to {max(gains):.3f}."
    assert all(f"| {race.bucket} | {race.num_tokens} | {race.default} | {race.taken} |" in report.render([table]) for race in races)


def test_nothing_raced_is_said() -> None:
    assert report.summary([]) == "no races"
