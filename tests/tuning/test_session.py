"""`hb.autotune`: which layers it notes, and what ranks do whose tables differ."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from dataclasses import replace

from devices import on_hopper
from races import H200, SHAPE, layer
from random_experts import make_experts
from ranks import run_ranks

import halfbyte as hb
from halfbyte.errors import InputError
from halfbyte.kernels import tuned
from halfbyte.kernels.problem import Size
from halfbyte.kernels.sm90.configs import HUGE, MEDIUM, SMALL, TINY
from halfbyte.kernels.table import choose
from halfbyte.kernels.tuned import Race, Table, fields_of
from halfbyte.tuning import session
from halfbyte.tuning.run import record_of
from halfbyte.tuning.store import write_table

SIZE = Size(12 * SHAPE.num_experts // SHAPE.top_k, SHAPE.top_k)


def table(config: object) -> Table:
    race = Race("16 rows per expert", 96, "TINY", str(config), fields_of(config), 90.0, 100.0, 0.01, {"TINY": [100.0] * 3}, {})
    return Table(H200, (replace(record_of(layer()), races=(race,)),))


def chosen() -> object:
    return choose(layer().problem).choose_config(layer().problem, SIZE)


def test_layers_that_are_called_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned_layers: list[object] = []
    monkeypatch.setattr(session, "_tune_here", lambda layers, *options: tuned_layers.extend(layers) or [])
    monkeypatch.setattr(session, "_is_tuned", lambda problem: problem.format is not None)
    experts = [hb.prepare(make_experts(8, 64, intermediate, hb.NVFP4)) for intermediate in (32, 64, 32)]
    ids = torch.zeros((3, 2), dtype=torch.int32)
    with hb.autotune():
        for prepared in experts:
            hb.fused_moe(torch.zeros((3, 64), dtype=torch.bfloat16), prepared, ids, torch.ones((3, 2), dtype=torch.float32))
    assert sorted(each.shape.intermediate for each in tuned_layers) == [32, 64]
    assert tuned.seen is None


def test_there_is_one_at_a_time_and_an_error_tunes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "use_same", lambda *arguments: pytest.fail("tuned"))
    with pytest.raises(InputError, match="already within autotune"), hb.autotune(), hb.autotune():
        pass
    assert tuned.seen is None


def rank_with_its_own_cache(rank: int, world: int, folder: str) -> None:
    """The first rank has tuned; the second has a table that says something else, and another for a layer that the first does not know."""
    os.environ["HALFBYTE_CACHE_DIR"] = f"{folder}/{rank}"
    tuned.SHIPPED = Path(folder) / "none"
    tuned.user_directory().mkdir(parents=True)
    write_table(table(SMALL if rank == 0 else HUGE), tuned.user_directory() / "table.json")
    choose.cache_clear()
    assert chosen() == (SMALL if rank == 0 else HUGE)
    calls = []
    session.use_same([layer()], lambda: calls.append(rank) or [table(MEDIUM)], torch.distributed.group.WORLD)
    assert calls == [0] * (rank == 0)  # the others wait in one collective, whatever their cache has
    assert chosen() == MEDIUM
    tuned.versions = lambda: {"triton": f"3.{rank}.0"}
    session.use_same([layer()], lambda: [table(MEDIUM)], torch.distributed.group.WORLD)
    assert chosen() == TINY  # software differs: the rule


def test_ranks_with_different_caches_choose_the_same(tmp_path: Path) -> None:
    run_ranks(rank_with_its_own_cache, 2, str(tmp_path))


@on_hopper
def test_a_layer_is_tuned_on_a_gpu_and_used_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuned, "_of_process", [])
    prepared = hb.prepare(make_experts(SHAPE.num_experts, SHAPE.hidden, SHAPE.intermediate, hb.NVFP4).to("cuda"))
    call = (torch.zeros((3, SHAPE.hidden), dtype=torch.bfloat16, device="cuda"), prepared, torch.zeros((3, 4), dtype=torch.int32, device="cuda"))
    weights = torch.ones((3, 4), dtype=torch.float32, device="cuda")
    with hb.autotune(budget_s=60):
        hb.fused_moe(*call, weights)
    (table,) = [tuned.read(file) for file in tuned.user_directory().glob("*.json")]
    races = table.layers[0].races
    assert races and not any(race.excluded for race in races) and all(race.default in race.times for race in races)
    assert hb.fused_moe(*call, weights).shape == (3, SHAPE.hidden)
