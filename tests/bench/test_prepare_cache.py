"""The measurement of the cached start measures what it says."""

from __future__ import annotations

from pathlib import Path

import checkpoint_files as cf
import pytest

from halfbyte.bench import prepare_cache
from halfbyte.bench.prepare_cache import CachedStart, measure_cached_start


def test_numbers() -> None:
    start = CachedStart(nbytes=10**9, open_s=0.1, plain_s=0.5, cached_s=0.4, streamed_s=2.0)
    assert (start.plain_gbps, start.cached_gbps, start.fraction) == (2.0, 2.5, 1.25)


@pytest.mark.parametrize("cold", [False, True])
def test_each_is_timed_in_each_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cold: bool) -> None:
    calls: list[str] = []
    plain, load, drop = prepare_cache._read_plainly, prepare_cache.load_prepared, prepare_cache._drop_from_page_cache
    monkeypatch.setattr(prepare_cache, "_read_plainly", lambda *a: (calls.append("plain"), plain(*a))[1])
    monkeypatch.setattr(prepare_cache, "load_prepared", lambda *a, **k: (calls.append(k["cache"]), load(*a, **k))[1])
    monkeypatch.setattr(prepare_cache, "_drop_from_page_cache", lambda files: (calls.append("drop"), drop(files))[1])
    model = cf.nvfp4("modelopt").write(tmp_path / "model")
    start = measure_cached_start(model, "cpu", layout="hopper", cache_dir=tmp_path / "cache", cold=cold, repeats=2)
    round_ = ["plain", "read", "off"] if not cold else ["drop", "plain", "drop", "read", "drop", "off"]
    assert calls == 2 * round_
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    assert start.nbytes == file.stat().st_size and min(start.open_s, start.plain_s, start.cached_s, start.streamed_s) > 0
