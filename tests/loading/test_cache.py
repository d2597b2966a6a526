"""The cache of prepared experts: what is right is used, what is not is refused with its reason and made again."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import cache_processes
import checkpoint_files as cf
import pytest
import torch
from cache_processes import LAYOUT, prepare
from forked import context
from helpers import assert_equal_bits

import halfbyte as hb
from halfbyte.checkpoint import Checkpoint
from halfbyte.checkpoint.writer import PARTIAL
from halfbyte.device import Target
from halfbyte.errors import CheckpointError, InputError
from halfbyte.loading import cache, prepared, tensor_files
from halfbyte.loading.cache import CacheEntry


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return cf.nvfp4("modelopt").write(tmp_path / "model", shards=2)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def loaded(model: Path, directory: Path, **options: object) -> hb.PreparedExperts:
    return hb.load_prepared(model, 1, **{"layout": LAYOUT, "cache_dir": directory, **options})


def files_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def assert_right(actual: hb.PreparedExperts, model: Path, experts: range | None = None) -> None:
    expected = hb.prepare(hb.load_experts(model, 1, experts=experts), actual.layout)
    assert actual.storage.tensors.keys() == expected.storage.tensors.keys()
    for name, tensor in expected.storage.tensors.items():
        assert_equal_bits(actual.storage.tensors[name], tensor)


@pytest.fixture
def no_streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the cached file was not used")

    monkeypatch.setattr(prepared, "stream_experts", refuse)


@pytest.mark.parametrize("experts", [None, range(1, 3)], ids=str)
@pytest.mark.parametrize("layout", ["canonical", "hopper", "hopper_fp8"])
@pytest.mark.parametrize("source", [lambda: cf.nvfp4("modelopt"), lambda: cf.gpt_oss()[0], cf.dense], ids=["nvfp4", "gpt-oss", "dense"])
def test_round_trip(
    tmp_path: Path, directory: Path, layout: str, experts: range | None, source: Callable[[], cf.Files], request: pytest.FixtureRequest
) -> None:
    model = source().write(tmp_path / "model")
    if layout != "canonical" and Checkpoint.open(model).quantization.format is None:
        return
    first = prepare(model, directory, layout=layout, experts=experts)
    assert first.written and first.reason == "not there" and first.file.stat().st_size == first.nbytes
    second = prepare(model, directory, layout=layout, experts=experts)
    assert not second.written and second.reason == "there already"
    request.getfixturevalue("no_streaming")
    result = loaded(model, directory, layout=layout, experts=experts)
    assert_right(result, model, experts)
    assert result.storage.first_expert == (1 if experts else 0) and result.storage.num_global_experts == cf.E


def test_nothing_is_written_unasked(model: Path, directory: Path) -> None:
    loaded(model, directory)
    loaded(model, directory, cache="off")
    assert not directory.exists()
    loaded(model, directory, cache="write")
    (name,) = files_in(directory)
    assert name.startswith("prepared/model-") and name.endswith("/hopper-packed-cpu/layer-00001.experts-0-3.safetensors")
    with pytest.raises(InputError, match=r"unknown use of the cache .*'always'.*'read' or 'write' or 'off'"):
        loaded(model, directory, cache="always")


@pytest.mark.usefixtures("no_streaming")
def test_off_means_off(model: Path, directory: Path) -> None:
    with pytest.raises(AssertionError, match="not used"):
        loaded(model, directory, cache="off")


def test_the_environment_names_the_directory_and_layers_use_it(model: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(directory))
    prepare(model, None, layout="auto")
    monkeypatch.setattr(prepared, "stream_experts", None)
    layer = hb.MoE.from_checkpoint(model, 1)
    assert_right(layer.experts, model)
    with pytest.raises(TypeError):  # negative control: without the cache it would have streamed
        hb.MoE.from_checkpoint(model, 1, cache="off")


def rewrite(file: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)


def lengthen_the_header(data: bytearray) -> None:
    length = int.from_bytes(data[:8], "little")
    data[:8] = (length + 8).to_bytes(8, "little")
    data[8 + length : 8 + length] = b" " * 8


def flip(position: int) -> Callable[[bytearray], object]:
    def change(data: bytearray) -> None:
        data[position] ^= 16

    return change


def without_a_tensor(file: Path) -> None:
    opened = tensor_files.TensorFile.open(file)
    entries = {name: entry for name, entry in opened.entries.items() if name != "w2.multiplier"}
    header = json.dumps({"__metadata__": opened.metadata, **entries}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + file.read_bytes()[opened.data_start :])


def touch_model(model: Path) -> None:
    os.utime(model / "model-00001-of-00002.safetensors", (1, 1))


SPOILED = {
    "truncated": (lambda model, file: rewrite(file, lambda data: data.__delitem__(slice(-5, None))), "truncated file"),
    "header cut": (lambda model, file: rewrite(file, lambda data: data.__delitem__(slice(30, None))), "truncated safetensors file"),
    "first data byte": (
        lambda model, file: rewrite(file, flip(tensor_files.TensorFile.open(file).data_start)),
        "damaged: the checksums of w13.words",
    ),
    "last byte": (lambda model, file: rewrite(file, flip(-1)), "damaged: the checksums of w2_input_scale"),
    "header byte": (lambda model, file: rewrite(file, lambda data: data.__setitem__(8, 0)), "damaged safetensors header"),
    "tensor missing": (lambda model, file: without_a_tensor(file), "missing tensor w2.multiplier"),
    "empty": (lambda model, file: file.write_bytes(b""), "truncated safetensors file"),
    "model written again": (lambda model, file: touch_model(model), "made from another checkpoint"),
    "model's config changed": (
        lambda model, file: (model / "config.json").write_text(json.dumps({**cf.QWEN, "x": 1})),
        "made from another checkpoint",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_wrong_file_is_refused_with_its_reason_and_made_again(model: Path, directory: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    file = prepare(model, directory).file
    right = file.read_bytes()
    spoil, reason = SPOILED[name]
    spoil(model, file)
    spoiled = file.read_bytes()
    with caplog.at_level(logging.WARNING, "halfbyte"):
        assert_right(loaded(model, directory), model)
    assert file.read_bytes() == spoiled  # "read" leaves it
    (record,) = caplog.records
    assert str(file) in record.message and "prepared again" in record.message
    assert re.search(reason, record.message)
    assert_right(loaded(model, directory, cache="write"), model)
    assert prepare(model, directory, verify=True).reason == "verified"
    assert len(files_in(directory)) == 1 and (name.startswith("model") or file.read_bytes() == right)


def test_verify_sees_what_the_header_does_not(model: Path, directory: Path) -> None:
    file = prepare(model, directory).file
    rewrite(file, flip(-1))
    assert not prepare(model, directory).written
    again = prepare(model, directory, verify=True)
    assert again.written and "damaged: the checksums of w2_input_scale" in again.reason
    assert prepare(model, directory, force=True).reason == "forced"


@pytest.mark.parametrize(
    ("key", "options", "patch"),
    [
        ("layout", {"layout": "canonical"}, None),
        ("experts", {"experts": range(2)}, None),
        ("halfbyte", {}, lambda patch: patch.setattr(cache, "__version__", "9.9.9")),
        ("arch", {}, lambda patch: patch.setattr(Target, "of", staticmethod(lambda device: Target("x", "sm_90", 1, 0, 0.0)))),
    ],
)
def test_a_file_made_for_something_else_is_refused_even_under_the_right_name(
    model: Path, directory: Path, key: str, options: dict, patch: Callable | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = prepare(model, directory).file
    if patch:
        patch(monkeypatch)
    checkpoint = Checkpoint.open(model)
    wanted = {"layout": LAYOUT, **options}
    arch = Target.of("cpu").arch
    entry = CacheEntry.of(checkpoint, 1, wanted.get("experts", range(cf.E)), wanted["layout"], "packed", arch, directory)
    entry.file.parent.mkdir(parents=True, exist_ok=True)
    file.rename(entry.file)
    caplog.set_level(logging.WARNING, "halfbyte")
    assert_right(loaded(model, directory, **options), model, options.get("experts"))
    assert f"made from another {key}" in caplog.records[0].message


def test_files_of_different_models_layouts_and_ranges_live_side_by_side(tmp_path: Path, model: Path, directory: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    other = cf.nvfp4("modelopt").write(tmp_path / "elsewhere" / "model")
    prepare(model, directory)
    prepare(other, directory)
    prepare(model, directory, layout="canonical")
    prepare(model, directory, experts=range(1, 2))
    assert len(files_in(directory)) == 4
    for where in (model, other):
        assert not prepare(where, directory, verify=True).written


def test_a_full_disk_leaves_nothing(model: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        def __init__(self, room: int):
            self.room = room

        def __call__(self, stream: object, memory: memoryview) -> None:
            self.room -= len(memory)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            stream.write(memory)

    monkeypatch.setattr(tensor_files, "_write", Full(5000))
    with pytest.raises(CheckpointError, match="the disk is full"):
        prepare(model, directory)
    assert files_in(directory) == []
    monkeypatch.setattr(tensor_files, "_write", Full(5000))
    with caplog.at_level(logging.WARNING, "halfbyte"):
        assert_right(loaded(model, directory, cache="write"), model)  # the weights are there all the same
    assert "were not kept" in caplog.text and "the disk is full" in caplog.text and files_in(directory) == []
    monkeypatch.undo()
    old = prepare(model, directory).file.read_bytes()
    monkeypatch.setattr(tensor_files, "_write", Full(5000))
    with pytest.raises(CheckpointError, match="the disk is full"):
        prepare(model, directory, force=True)
    assert len(files_in(directory)) == 1 and prepare(model, directory).file.read_bytes() == old


def test_a_place_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the file"):
        prepare(model, tmp_path / "file")


def test_a_place_that_cannot_be_looked_into(model: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    exists = Path.exists

    def refused(path: Path) -> bool:
        if directory in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refused)
    loaded(model, directory)
    assert "cannot look into the cache (given Permission denied); these experts are prepared again" in caplog.text
    with pytest.raises(CheckpointError, match="cannot look into the cache"):
        prepare(model, directory)


def test_a_killed_process_leaves_no_file_of_that_name(model: Path, directory: Path) -> None:
    started = context.Event()
    process = context.Process(target=cache_processes.write_and_wait, args=(model, directory, started))
    process.start()
    try:
        assert started.wait(timeout=1800)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    (left,) = files_in(directory)
    assert left.endswith(PARTIAL)
    assert_right(loaded(model, directory), model)
    written = prepare(model, directory)
    assert written.written and len(files_in(directory)) == 2  # it could be that of a process that lives
    os.utime(directory / left, (1, 1))
    prepare(model, directory, force=True)
    assert files_in(directory) == [str(written.file.relative_to(directory))]
    assert_right(loaded(model, directory), model)


def test_two_processes_at_once(model: Path, directory: Path) -> None:
    barrier, failures = context.Barrier(2), context.Queue()
    processes = [context.Process(target=cache_processes.write_often, args=(model, directory, barrier, failures)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=1800)
    assert [process.exitcode for process in processes] == [0, 0] and failures.empty()
    assert len(files_in(directory)) == 1
    assert_right(loaded(model, directory), model)


def test_the_fingerprint_follows_the_files(model: Path, tmp_path: Path) -> None:
    first = Checkpoint.open(model).fingerprint
    assert len(first) == 64 and Checkpoint.open(model).fingerprint == first
    touch_model(model)
    touched = Checkpoint.open(model).fingerprint
    assert touched != first
    rewrite(model / "model-00002-of-00002.safetensors", lengthen_the_header)
    assert Checkpoint.open(model).fingerprint not in (first, touched)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("layout", ["canonical", "hopper"])
def test_round_trip_on_a_gpu(model: Path, directory: Path, layout: str, request: pytest.FixtureRequest) -> None:
    expected = hb.load_prepared(model, 1, device="cuda", layout=layout, cache="write", cache_dir=directory)
    request.getfixturevalue("no_streaming")
    result = loaded(model, directory, device="cuda", layout=layout)
    assert result.device.type == "cuda" and result.target == Target.of("cuda")
    for name, tensor in expected.storage.tensors.items():
        assert_equal_bits(result.storage.tensors[name], tensor)
