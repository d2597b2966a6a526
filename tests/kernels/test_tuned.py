"""Which table a layer's configurations come from, and when none counts."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from races import H20, H100, H200, SHAPE, layer

from halfbyte.device import Target
from halfbyte.errors import CheckpointError
from halfbyte.kernels import tuned
from halfbyte.kernels.problem import Size
from halfbyte.kernels.sm90.configs import DECODE, DIRECT, HUGE, MEDIUM, SMALL, TINY
from halfbyte.kernels.table import KernelChoice, choose, choose_untuned
from halfbyte.kernels.tuned import LayerKey, Race, Table, buckets, fields_of
from halfbyte.moe.functional import _most_nbytes
from halfbyte.tuning.run import record_of
from halfbyte.tuning.store import write_table

SIZE = Size(12 * SHAPE.num_experts // SHAPE.top_k, SHAPE.top_k)  # 12 rows per expert: the rule takes TINY
BUCKET = "16 rows per expert"


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterable[None]:
    """No tables but a test's own."""
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    for directory in (tuned.user_directory(), tuned.SHIPPED):
        directory.mkdir(parents=True)
    yield
    tuned.take([], alone=True)
    tuned.take([])
    tuned._reads_user = True
    choose.cache_clear()


def table(config: object, target: Target = H200, bucket: str = BUCKET, **changed: object) -> Table:
    fields = None if config is None else fields_of(config)
    race = Race(bucket, 96, "TINY", str(config or TINY), fields, 90.0, 100.0, 0.01, {"TINY": [100.0] * 3}, {})
    return Table(target, (replace(record_of(layer(target)), races=(race,), **changed),))


def user(config: object, *rest: object, **changed: object) -> None:
    write_table(table(config, *rest, **changed), tuned.user_directory() / f"{len(list(tuned.user_directory().iterdir()))}.json")


def shipped(config: object, target: Target) -> None:
    write_table(table(config, target), tuned.SHIPPED / f"{target.name}.json")


def found(target: Target = H200, **sizes: object) -> KernelChoice:
    choose.cache_clear()
    return choose(layer(target, **sizes).problem)


def chosen(target: Target = H200, size: Size = SIZE, **sizes: object) -> object:
    return found(target, **sizes).choose_config(layer(target, **sizes).problem, size)


def test_every_number_of_rows_has_a_bucket() -> None:
    for num_experts in (1, 8, 60, 128, 512):
        limits = [limit for limit, _ in buckets(num_experts)]
        assert limits == sorted(set(limits)) and limits[-1] > 1e18
    assert [name for _, name in buckets(60)][:5] == ["8 experts", "16 experts", "32 experts", "1 row per expert", "4.5 rows per expert"]


def test_the_order_of_the_tables() -> None:
    assert chosen() == TINY
    shipped(HUGE, H20)
    assert chosen() == HUGE
    shipped(MEDIUM, H100)
    assert chosen() == MEDIUM and "the package for NVIDIA H100" in found().tables  # as many multiprocessors: more alike than the H20
    shipped(SMALL, H200)
    assert chosen() == SMALL and "from the package, " in found().tables
    user(DECODE)
    assert chosen() == DECODE and "1 of 17 buckets from the user" in found().tables
    tuned.take([table(HUGE)])
    assert chosen() == HUGE and "from this process" in found().tables


def test_races_of_another_gpu_are_those_of_the_package_alone() -> None:
    """What a user or this process has raced on a second GPU says nothing of the first."""
    user(HUGE, H100)
    tuned.take([table(MEDIUM, H100)])
    assert chosen() == TINY and chosen(H100) == MEDIUM


def test_other_buckets_and_other_ops_keep_to_the_rule() -> None:
    user(SMALL)
    problem, choice = layer().problem, found()
    rule = choose_untuned(problem)
    for num_tokens in (1, 8, 60, 300, 1000, 9000):
        size = Size(num_tokens, SHAPE.top_k)
        assert (choice.choose_config(problem, size) == rule.choose_config(problem, size)) == (not 9 < num_tokens / 8 <= 16)
    assert choose(problem._replace(batch_invariant=True)).choose_config(problem._replace(batch_invariant=True), SIZE) == TINY
    rows = problem._replace(op="expert_rows")
    assert choose(rows).choose_config(rows, SIZE) == SMALL  # the same kernels
    assert choose(problem._replace(activations="fp8", layout="hopper_fp8")).tables == rule.tables == ""


def test_the_workspace_of_a_layer_follows_the_tables() -> None:
    def most() -> int:
        return _most_nbytes(found(), layer().problem, 8, SHAPE.top_k)

    by_rule = most()
    user(DECODE, bucket="1 row per expert")  # of 5 to 8 tokens; it takes less than DIRECT
    assert most() < by_rule


def test_a_configuration_that_cannot_run_so_many_tokens_is_not_taken() -> None:
    user(DIRECT, bucket="1 row per expert")
    assert chosen(size=Size(7, 4)) == DIRECT and chosen(size=Size(8, 4)) == DIRECT
    rows = layer().problem._replace(op="expert_rows")
    assert choose(rows).choose_config(rows, Size(7, 4)) == DECODE
    user(DIRECT)
    assert chosen() == TINY  # 96 tokens


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"source": "0123456789ab"}, "measured with other kernels (0123456789ab"),
        ({"software": {"triton": "3.1.0"}}, "measured with Triton 3.1.0"),
    ],
)
def test_what_was_measured_with_something_else_is_a_miss(changed: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    tuned._tell.cache_clear()
    user(SMALL, **changed)
    with caplog.at_level(logging.INFO):
        assert chosen() == TINY
    assert reason in caplog.text and caplog.text.count("passed over") == 1
    shipped(MEDIUM, H200)
    assert chosen() == MEDIUM  # the next one in order


def test_fields_of_no_configuration_are_a_miss() -> None:
    user(replace(SMALL, x_stages=9))
    assert chosen() == TINY


def test_tables_of_other_gpus_are_not_the_users() -> None:
    user(SMALL, H100)
    assert chosen() == TINY and chosen(H100) == SMALL


@pytest.mark.parametrize(
    "text", ["", "{ not JSON", "[]", '{"schema": 1}', '{"schema": 99, "device": {}, "layers": []}', '{"schema": 1, "device": {}, "layers": 3}']
)
def test_files_that_are_no_tables_are_passed_over(text: str, caplog: pytest.LogCaptureFixture) -> None:
    tuned._tell.cache_clear()
    file = tuned.user_directory() / "broken.json"
    file.write_text(text)
    user(SMALL)
    with caplog.at_level(logging.INFO):
        assert chosen() == SMALL
    assert "table passed over" in caplog.text and str(file) in caplog.text


def test_the_layer_most_alike_serves_where_none_is_equal() -> None:
    user(SMALL)
    assert chosen(hidden=640) == SMALL and "measured with 32 experts of 512 x 256" in found(hidden=640).tables
    assert chosen(hidden=2048) == TINY  # four times
    near = replace(record_of(layer()).key, hidden=576)
    user(MEDIUM, key=near)
    assert chosen(hidden=640) == MEDIUM and chosen() == SMALL
    user(None, key=replace(near, hidden=640))
    assert chosen(hidden=640) == TINY  # raced, and the rule stays


def test_distance() -> None:
    key = LayerKey("hopper", "hopper", "nvfp4", "bf16", True, 2048, 768, 128)
    assert key.distance(key) == 0 and key.distance(replace(key, hidden=4096, intermediate=384)) == 2
    assert key.distance(replace(key, activations="fp8")) == key.distance(replace(key, gated=False)) == float("inf")


def test_a_look_up_costs_less_than_a_microsecond_more_than_the_rule() -> None:
    user(SMALL)
    problem, choice = layer().problem, found()

    def best_us(choose_config: object) -> float:
        times = []
        for _ in range(20):
            start = time.perf_counter()
            for _ in range(200):
                choose_config(problem, SIZE)  # type: ignore[operator]
            times.append((time.perf_counter() - start) / 200 * 1e6)
        return min(times)

    assert best_us(choice.choose_config) < 1 + best_us(choose_untuned(problem).choose_config)  # 0.6 and 1.7 us on a busy core


def test_the_hash_is_of_code_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))

    def hashed(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return tuned.source_hash((name,))

    code = 'def f(x):\n    """Doc."""\n    return g(\n        "text", x\n    )  # why\n'
    assert hashed("one_module", code) == hashed("other_module", 'def f(x):\n    "Another."\n\n    return g("text", x)\n')
    assert hashed("third_module", code.replace("text", "other")) != tuned.source_hash(("one_module",))


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    write_table(table(SMALL), tmp_path / "table.json")
    assert tuned.read(tmp_path / "table.json") == table(SMALL)
    document = json.loads((tmp_path / "table.json").read_text())
    del document["layers"][0]["races"][0]["taken"]
    with pytest.raises(CheckpointError, match="not a table of halfbyte tune"):
        Table.from_json(document, "here")
