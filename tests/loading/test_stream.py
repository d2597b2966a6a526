"""Streaming gives the bytes of `prepare(load_experts(...))`, reads no other expert, and holds a few experts beside the result."""

from __future__ import annotations

import threading
from pathlib import Path

import checkpoint_files as cf
import pytest
import torch
from helpers import assert_equal_bits, peak_bytes

import halfbyte as hb
from halfbyte.checkpoint import Checkpoint
from halfbyte.errors import CheckpointError, InputError
from halfbyte.loading import stream
from halfbyte.weights.prepared import LAYOUTS

SOURCES = {
    "modelopt": lambda: cf.nvfp4("modelopt"),
    "compressed-tensors": lambda: cf.nvfp4("compressed-tensors"),
    "mxfp4": cf.compressed_tensors_mxfp4,
    "gpt-oss": lambda: cf.gpt_oss()[0],
    "deepseek-v4": cf.deepseek_v4,
    "dense": cf.dense,
    "dense, stacked": lambda: cf.dense(stacked="columns"),
}
SLICES = [None, range(1), range(1, 3)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_same(actual: hb.PreparedExperts, expected: hb.PreparedExperts) -> None:
    assert (actual.layout, actual.policy, actual.target, actual.reason) == (expected.layout, expected.policy, expected.target, expected.reason)
    described = ("format", "activation", "num_experts", "hidden", "intermediate", "first_expert", "num_global_experts", "device")
    for name in described:
        assert getattr(actual.storage, name) == getattr(expected.storage, name), name
    ours, theirs = actual.storage.tensors, expected.storage.tensors
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_equal_bits(tensor, theirs[name])


@pytest.mark.parametrize("experts", SLICES, ids=str)
@pytest.mark.parametrize("layout", ["auto", *LAYOUTS])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("chunk", [1, 2])
def test_bytes_of_load_and_prepare(
    tmp_path: Path, source: str, layout: str, experts: range | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_MAX_CHUNK_EXPERTS", chunk)
    files = SOURCES[source]().write(tmp_path, shards=2)
    w = hb.load_experts(files, 1, experts=experts)
    if w.format is None and layout not in ("auto", "canonical"):
        with pytest.raises(InputError, match="dense experts"):
            hb.load_prepared(files, 1, layout=layout, experts=experts)
        return
    assert_same(hb.load_prepared(files, 1, layout=layout, experts=experts), hb.prepare(w, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_reads_its_experts_and_all_input_scales(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(cf.nvfp4("modelopt").write(tmp_path))
    names: list[str] = []
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (names.append(name), original(self, name))[1])
    hb.load_prepared(checkpoint, 1, layout=layout, experts=range(1, 2))
    assert {int(name.split(".")[5]) for name in names if not name.endswith("input_scale")} == {1}
    assert len(names) == len(set(names)) and sum(name.endswith("input_scale") for name in names) == 3 * cf.E


def test_the_next_experts_are_read_while_others_are_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_MAX_CHUNK_EXPERTS", 1)
    second_read = threading.Event()
    original = Checkpoint.read

    def read(self: Checkpoint, name: str) -> torch.Tensor:
        if ".experts.1." in name:
            assert threading.current_thread() is not threading.main_thread()
            second_read.set()
        return original(self, name)

    def pack(w: hb.ExpertWeights, storage: object, first: int) -> None:
        assert first > 0 or second_read.wait(timeout=1800)  # while expert 0 is here, a thread comes to expert 1

    monkeypatch.setattr(Checkpoint, "read", read)
    reader = stream.ExpertReader(Checkpoint.open(cf.nvfp4("modelopt").write(tmp_path)), 1)
    stream.stream_experts(reader, reader.allocate("cpu"), pack)


def test_progress_counts_up_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_MAX_CHUNK_EXPERTS", 2)
    files = cf.nvfp4("modelopt").write(tmp_path)
    for layout in ("canonical", "hopper"):
        calls: list[tuple[int, int]] = []
        prepared = hb.load_prepared(files, 1, layout=layout, progress=lambda done, total, calls=calls: calls.append((done, total)))
        total = calls[-1][1]
        assert calls == [(total * 2 // 3, total), (total, total)] and (layout != "canonical" or total == prepared.nbytes)


@pytest.mark.parametrize("layout", ["canonical", "hopper", "hopper_fp8"])
def test_errors_of_the_reading_thread_arrive(tmp_path: Path, layout: str) -> None:
    files = cf.nvfp4("modelopt")
    del files.tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"missing tensor: .*experts\.2\.up_proj\.weight"):
        hb.load_prepared(files.write(tmp_path), 1, layout=layout)
    with pytest.raises(InputError, match="contiguous slice"):
        hb.load_prepared(tmp_path, 1, experts=range(2, 9))
    with pytest.raises(InputError, match="unknown layout"):
        hb.load_prepared(tmp_path, 1, layout="blackwell")
    with pytest.raises(InputError, match="unknown residency policy"):
        hb.load_prepared(tmp_path, 1, policy="dense")


def many_experts(path: Path, num_experts: int) -> Path:
    """A checkpoint of 148 KiB an expert, all experts the same tensors."""
    hidden, intermediate = 512, 256
    config = {**cf.QWEN, "hidden_size": hidden, "moe_intermediate_size": intermediate, "num_experts": num_experts}
    files = cf.Files(config, hf_quant_config=cf.MODELOPT)
    for expert in range(num_experts):
        for projection, leaf in cf.NAMES.items():
            rows, columns = (hidden, intermediate) if projection == "down" else (intermediate, hidden)
            prefix = f"model.layers.1.mlp.experts.{expert}.{leaf}"
            files.tensors[f"{prefix}.weight"] = cf.random_codes(rows, columns)
            files.tensors[f"{prefix}.weight_scale"] = torch.full((rows, columns // 16), 56, dtype=torch.uint8).view(torch.float8_e4m3fn)
            files.tensors[f"{prefix}.weight_scale_2"] = torch.tensor(1.0)
    return files.write(path)


@pytest.mark.parametrize("layout", ["canonical", "hopper"])
def test_memory_beside_the_result_is_a_few_experts(tmp_path: Path, layout: str) -> None:
    files = many_experts(tmp_path / "m", 48)
    checkpoint = Checkpoint.open(files)
    result = hb.load_prepared(checkpoint, 1, layout=layout)
    expert = result.nbytes / 48
    weights = 512 * 512  # of the larger projection of an expert
    peak = peak_bytes(lambda: hb.load_prepared(checkpoint, 1, layout=layout), tmp_path)
    assert peak - result.nbytes <= 2 * 4 * expert + 20 * weights + (1 << 20)
    if layout != "canonical":  # negative control: a second copy is seen
        whole = peak_bytes(lambda: hb.prepare(hb.load_experts(checkpoint, 1), layout), tmp_path)
        assert whole > 1.9 * result.nbytes > 1.3 * peak


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("layout", ["canonical", "hopper"])
def test_streaming_to_a_gpu(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(many_experts(tmp_path, 48))
    expected = hb.prepare(hb.load_experts(checkpoint, 1, "cuda"), layout)
    for chunk in (1, 4):
        monkeypatch.setattr(stream, "_MAX_CHUNK_EXPERTS", chunk)
        assert_same(hb.load_prepared(checkpoint, 1, device="cuda", layout=layout), expected)
    monkeypatch.setattr(stream, "_MAX_CHUNK_EXPERTS", 5)  # the last chunk is smaller
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = hb.load_prepared(checkpoint, 1, device="cuda", layout=layout)
    beside = torch.cuda.max_memory_allocated() - before - result.nbytes
    assert_same(result, expected)
    assert beside <= 2 * 5 * result.nbytes / 48 + 20 * 512 * 512 + (1 << 20)
