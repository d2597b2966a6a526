"""The measurement of the cached start measures what it says, on a checkpoint that the script wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_scripts import load_script

from halfbyte.bench.shapes import MoEShape

script = load_script("cached_start")


def test_numbers() -> None:
    start = script.CachedStart(nbytes=10**9, open_s=0.1, plain_s=0.5, cached_s=0.4, streamed_s=2.0)
    assert (start.plain_gbps, start.cached_gbps, start.fraction) == (2.0, 2.5, 1.25)


@pytest.mark.parametrize("cold", [False, True])
def test_each_is_timed_in_each_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cold: bool) -> None:
    calls: list[str] = []
    plain, load, drop = script.read_plainly, script.load_prepared, script.drop_from_page_cache
    monkeypatch.setattr(script, "read_plainly", lambda *a: (calls.append("plain"), plain(*a))[1])
    monkeypatch.setattr(script, "load_prepared", lambda *a, **k: (calls.append(k["cache"]), load(*a, **k))[1])
    monkeypatch.setattr(script, "drop_from_page_cache", lambda files: (calls.append("drop"), drop(files))[1])
    script.write_checkpoint(MoEShape("tiny", 64, 32, 4, 2), 2, tmp_path / "model")
    start = script.measure_cached_start(tmp_path / "model", "cpu", cache_dir=tmp_path / "cache", cold=cold, repeats=2)
    of_two_layers = ["plain", "read", "read", "off", "off"] if not cold else ["drop", "plain", "drop", "read", "read", "drop", "off", "off"]
    assert calls == 2 * of_two_layers
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 2 and start.nbytes == sum(file.stat().st_size for file in files)
    assert min(start.open_s, start.plain_s, start.cached_s, start.streamed_s) > 0
