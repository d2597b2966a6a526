"""Tuning from layers to tables, with races that need no device: resumed, repeated, ended by a crash, written by several processes at once."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from races import H20, H200, Races, Racing, layer

from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.kernels.sm90.configs import MEDIUM
from halfbyte.kernels.tuned import Race, read
from halfbyte.tuning import store
from halfbyte.tuning.run import load, missing, record_of, tune


def test_a_second_run_has_nothing_to_do(tmp_path: Path) -> None:
    first, second, again = Racing(), Racing(), Racing()
    races = [race for _, race in tune([layer()], first, directory=tmp_path)]
    (table,) = load([layer()], tmp_path)
    assert len(races) >= 14 and [race.bucket for race in table.layers[0].races] == [race.bucket for race in races]
    assert table.device == H200 and table.layers[0].ceilings["read_gbps"] == 4600.0 and not missing(layer(), table.layers[0])
    assert list(tune([layer()], second, directory=tmp_path)) == [] == second.races.raced
    assert [race for _, race in tune([layer()], again, again=True, directory=tmp_path)] == races
    assert load([layer()], tmp_path) == [table]  # two tunes agree


def test_a_crash_keeps_what_was_decided(tmp_path: Path) -> None:
    class Crashing(Races):
        def __call__(self, num_tokens, routing, configs):
            if len(self.raced) == 9:
                raise KeyboardInterrupt
            return super().__call__(num_tokens, routing, configs)

    with pytest.raises(KeyboardInterrupt):
        list(tune([layer()], Racing(Crashing()), directory=tmp_path))
    assert len(load([layer()], tmp_path)[0].layers[0].races) == 3
    resumed = Racing()
    rest = list(tune([layer()], resumed, directory=tmp_path))
    assert len(resumed.races.raced) == 3 * len(rest)
    (table,) = load([layer()], tmp_path)
    whole = tmp_path / "whole"
    list(tune([layer()], Racing(), directory=whole))
    assert load([layer()], whole) == [table]


def test_a_broken_candidate_is_named_in_the_table(tmp_path: Path) -> None:
    list(tune([layer()], Racing(Races(broken=[MEDIUM])), directory=tmp_path))
    races = load([layer()], tmp_path)[0].layers[0].races
    assert any(race.excluded == {"MEDIUM": "broken"} for race in races) and all("MEDIUM" not in race.times for race in races)


def test_files_of_others_are_replaced(tmp_path: Path) -> None:
    file = store.place_of(H200, layer().key, tmp_path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{ not JSON")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        read(file)
    list(tune([layer()], Racing(), directory=tmp_path))
    document = json.loads(file.read_text())
    document["layers"][0]["source"] = "0123456789ab"
    file.write_text(json.dumps(document))
    assert load([layer()], tmp_path)[0].layers[0].races == ()  # of other kernels: as good as absent
    stale = Racing()
    list(tune([layer()], stale, directory=tmp_path))
    assert stale.races.raced and read(file).layers[0].source == record_of(layer()).source


def test_every_gpu_has_its_file(tmp_path: Path) -> None:
    list(tune([layer(), layer(H20)], Racing(), directory=tmp_path))
    assert sorted(file.name.split("-hopper")[0] for file in tmp_path.glob("*.json")) == ["nvidia-h20", "nvidia-h200"]


def _race(bucket: str) -> Race:
    return Race(bucket, 1, "TINY", "TINY", None, 1.0, 1.0, 0.0, {"TINY": [1.0] * 3}, {})


def _write(directory: str, bucket: str) -> None:
    for _ in range(5):
        store.write(H200, replace(record_of(layer()), races=(_race(bucket),)), Path(directory))


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    names = ["4.5 rows per expert", "16 rows per expert", "80 rows per expert", "any number"]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(str(tmp_path), name)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    (table,) = load([layer()], tmp_path)
    assert [race.bucket for race in table.layers[0].races] == names
    assert [file.suffix for file in tmp_path.iterdir() if not file.name.startswith(".")] == [".json"]  # nothing half-written is left


def test_what_has_no_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'reference' is not tuned"):
        list(tune([layer(replace(H200, arch="cpu"))], Racing(), directory=tmp_path))
