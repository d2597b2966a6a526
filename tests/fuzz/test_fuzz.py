"""350 damaged models, leftovers of runs and tables, the same ones each time: no traceback, no hang, no blow-up of memory, nothing wrong accepted.

Other ones, and more of them: PYTHONPATH=src:tests python -m fuzz.run --cases 5000 --seed 1
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from fuzz import tables
from fuzz.damage import damage
from fuzz.judge import WrongError, judge
from fuzz.leftovers import cached, judge_cache, judge_job, unfinished
from fuzz.making import LEGAL, Damage
from fuzz.run import run_case
from fuzz.sound import LAYOUTS, SHARDS, join, sound, split, write
from slow import slow_case

from halfbyte.checkpoint.writer import JOURNAL, journal_digest

CASES = 43  # of each layout
SEED = "CI"


@pytest.mark.parametrize("layout", [layout if layout == "gpt-oss" else slow_case(layout) for layout in LAYOUTS])
def test_damage_is_told_or_without_effect(layout: str) -> None:
    verdicts = {number: run_case(layout, f"{SEED} {number}") for number in range(CASES)}
    assert {number: told for number, told in verdicts.items() if told[0] not in ("told", "harmless", *LEGAL)} == {}


@pytest.mark.slow
def test_damaged_tables_are_passed_over() -> None:
    verdicts = {number: tables.run_case(random.Random(f"{SEED} {number}")) for number in range(50)}
    assert {number: told for number, told in verdicts.items() if told[0] not in ("told", "harmless", *LEGAL)} == {}
    assert Counter(verdict for verdict, _ in verdicts.values())["told"] > 25


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sound_model_is_accepted(layout: str, tmp_path: Path) -> None:
    assert judge(layout, dict(sound(layout)), Damage("nothing"), tmp_path, random.Random(0)) == "harmless"


def test_the_judge_can_fail(tmp_path: Path) -> None:
    """Other values that no rule allows are wrong; so is what breaks the program."""
    files = dict(sound("modelopt"))
    header, data = split(files[SHARDS[0]])
    first, _ = next(entry for name, entry in header.items() if "experts.0.down_proj" in name and entry["dtype"] == "U8")["data_offsets"]
    files[SHARDS[0]] = join(header, data[:first] + bytes([data[first] ^ 1]) + data[first + 1 :])
    with pytest.raises(WrongError, match="load accepts other"):
        judge("modelopt", files, Damage("a bit of a weight"), tmp_path, random.Random(0))


@pytest.mark.parametrize("layout", ["dense", "modelopt"])
def test_what_a_sound_run_left_is_used(layout: str, tmp_path: Path) -> None:
    earlier = unfinished(layout, False) if layout == "dense" else cached(layout, "hopper")
    judge_again = judge_job if layout == "dense" else judge_cache
    assert judge_again(earlier, write(earlier.left, tmp_path / "left"), random.Random(0)) == "harmless"


def test_the_judge_of_leftovers_can_fail(tmp_path: Path) -> None:
    """An input scale that is only a little wrong, in a journal whose checksum is right, goes into the result."""
    earlier = unfinished("dense", True)
    journal = json.loads(earlier.left[JOURNAL])
    del journal["sha256"]
    amax = journal["notes"]["calibration"]["amax"]
    amax[max(amax)] *= 1.01
    left = write({**earlier.left, JOURNAL: json.dumps(journal | {"sha256": journal_digest(journal)}).encode()}, tmp_path / "left")
    with pytest.raises(WrongError, match="leaves other files"):
        judge_job(earlier, left, random.Random(0))


def test_damage_follows_from_its_seed() -> None:
    first, second = dict(sound("dense")), dict(sound("dense"))
    assert damage(random.Random(7), first) == damage(random.Random(7), second)
    assert {name: content for name, content in first.items() if isinstance(content, bytes)} == {
        name: content for name, content in second.items() if isinstance(content, bytes)
    }
