"""Files appear whole or not at all; a job continues where it stopped; nothing is overwritten."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from halfbyte.checkpoint import writer as writer_module
from halfbyte.checkpoint.writer import JOURNAL, PARTIAL, CheckpointWriter, discard_unfinished, plan_shards, shard_name
from halfbyte.errors import CheckpointError

JOB = {"source": {"a.safetensors": [10, 1]}, "options": {"format": "nvfp4"}}
W = {"w": torch.arange(6.0)}


def visible(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_a_whole_job(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    writer = CheckpointWriter(out, JOB)
    writer.write_tensors("s1", W, record={"x": 1})
    (tmp_path / "tokenizer.json").write_text("{}")
    writer.copy_file(tmp_path / "tokenizer.json", "sub/tokenizer.json")
    writer.finish({"w": "s1"}, total_bytes=24, config={"model_type": "m"})
    assert visible(out) == ["config.json", "model.safetensors.index.json", "s1", "sub"]
    assert torch.equal(load_file(out / "s1")["w"], W["w"])
    assert json.loads((out / "model.safetensors.index.json").read_text()) == {"metadata": {"total_size": 24}, "weight_map": {"w": "s1"}}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((out / "s1").stat().st_mode) == 0o666 & ~umask


def test_an_interrupted_job_continues(tmp_path: Path) -> None:
    first = CheckpointWriter(tmp_path, JOB)
    first.write_tensors("s1", W, record={"x": 1})
    first.keep_note("calibration", [1.5])
    (tmp_path / "s2.halfbyte-partial").write_bytes(b"half a shard")
    (tmp_path / ".tmpk3Xw9Q").write_bytes(b"what safetensors had written of it")
    first.close()
    again = CheckpointWriter(tmp_path, dict(JOB))
    assert again.is_finished("s1") and again.record_of("s1") == {"x": 1} and again.note("calibration") == [1.5]
    assert not again.is_finished("s2") and again.note("other") is None
    assert visible(tmp_path) == [JOURNAL, "s1"]
    whole = (tmp_path / "s1").read_bytes()
    for changed in (b"cut", whole[:-1] + bytes([whole[-1] ^ 1])):  # a file that changed since is not finished
        (tmp_path / "s1").write_bytes(changed)
        assert not again.is_finished("s1")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    writer = CheckpointWriter(tmp_path, JOB)
    writer.write_tensors("s1", W)

    def fill_up(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(writer_module, "save_file", fill_up)
    with pytest.raises(CheckpointError, match=r"s2: the disk is full .* Free some space and repeat the command"):
        writer.write_tensors("s2", W)
    assert visible(tmp_path) == [JOURNAL, "s1"]
    monkeypatch.undo()
    writer.close()
    again = CheckpointWriter(tmp_path, JOB)
    assert again.is_finished("s1") and not again.is_finished("s2")


def test_an_interrupt_between_write_and_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path, JOB)

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        writer.write_tensors("s1", W)
    assert visible(tmp_path) == [JOURNAL]


def test_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write the file"):
        CheckpointWriter(tmp_path / "file" / "out", JOB)
    writer = CheckpointWriter(tmp_path / "out", JOB)
    with pytest.raises(CheckpointError, match="cannot write the file"):
        writer.write_tensors("no such folder/s1", W)


@pytest.mark.parametrize("content", ["config.json", ".hidden"])
def test_an_occupied_destination_is_never_touched(tmp_path: Path, content: str) -> None:
    (tmp_path / content).write_text("mine")
    with pytest.raises(CheckpointError, match="never overwritten"):
        CheckpointWriter(tmp_path, JOB)
    assert visible(tmp_path) == [content] and (tmp_path / content).read_text() == "mine"
    with pytest.raises(CheckpointError, match="is a file"):
        CheckpointWriter(tmp_path / content, JOB)


def test_another_job_is_refused(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, JOB) as writer:
        writer.write_tensors("s1", W)
    other = {**JOB, "options": {"format": "mxfp4"}}
    with pytest.raises(CheckpointError, match=r"options.format was 'nvfp4', is 'mxfp4'.* Repeat the first command"):
        CheckpointWriter(tmp_path, other)
    with CheckpointWriter(tmp_path, JOB) as writer:
        assert writer.is_finished("s1")


@pytest.mark.parametrize(
    "damage",
    ["{", "[" * 100_000, '{"files": [1]}', '{"files": {"s1": {"bytes": 1}}}', '{"files": {"s1": 7}}', '{"notes": null}', '{"notes": {"scale": 1.5}}'],
)
def test_a_damaged_journal(tmp_path: Path, damage: str) -> None:
    with CheckpointWriter(tmp_path, JOB) as writer:
        writer.write_tensors("s1", W)
    journal = json.loads((tmp_path / JOURNAL).read_text())
    (tmp_path / JOURNAL).write_text(json.dumps(journal | json.loads(damage)) if damage.endswith("}") else damage)
    with pytest.raises(CheckpointError, match=r"journal of an unfinished job is damaged.*[Tt]hrow the job away with --restart"):
        CheckpointWriter(tmp_path, JOB)
    discard_unfinished(tmp_path)
    assert visible(tmp_path) == []


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path.name)])
def test_a_journal_that_is_no_file_is_no_hang_and_can_be_thrown_away(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / JOURNAL)
    with pytest.raises(CheckpointError, match=r"journal of an unfinished job is damaged.*--restart"):
        CheckpointWriter(tmp_path, JOB)
    discard_unfinished(tmp_path)
    with CheckpointWriter(tmp_path, JOB) as writer:
        writer.write_tensors("s1", W)


def test_a_text_may_name_what_is_no_unicode(tmp_path: Path) -> None:
    """A file name that is not UTF-8, as Python reads it."""
    with CheckpointWriter(tmp_path, JOB) as writer:
        writer.write_json("names.json", {"name": "gr\udcfc"})
    assert (tmp_path / "names.json").read_bytes() == b'{\n  "name": "gr\\udcfc"\n}\n'


def test_a_link_is_no_finished_shard_and_odd_leftovers_stop_nothing(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", JOB) as writer:
        writer.write_tensors("s1", W)
    (tmp_path / "out" / "s1").rename(tmp_path / "elsewhere")
    (tmp_path / "out" / "s1").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out" / ".tmpfolder").mkdir()
    (tmp_path / "out" / f"s2.{PARTIAL}").symlink_to(".")
    with CheckpointWriter(tmp_path / "out", JOB) as writer:
        assert not writer.is_finished("s1")
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [JOURNAL, ".tmpfolder", "s1"]


def test_one_process_writes(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, JOB) as writer:
        writer.write_tensors("s1", W)
        for attempt in (lambda: CheckpointWriter(tmp_path, JOB), lambda: discard_unfinished(tmp_path)):
            with pytest.raises(CheckpointError, match=rf"another process is writing here \(given process {os.getpid()} on .*Wait for it"):
                attempt()
    assert visible(tmp_path) == [JOURNAL, "s1"]
    with CheckpointWriter(tmp_path, JOB) as writer:
        assert writer.is_finished("s1")


def test_only_an_unfinished_job_is_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("keep")
    discard_unfinished(tmp_path)
    discard_unfinished(tmp_path / "nowhere")
    assert visible(tmp_path) == ["thesis.txt"]


def test_shards_hold_everything_once_in_order() -> None:
    sizes = [3, 3, 3, 20, 1, 0, 9, 1]
    shards = plan_shards(sizes, 10)
    assert [index for shard in shards for index in shard] == list(range(len(sizes)))
    assert [sum(sizes[i] for i in shard) for shard in shards] == [9, 20, 10, 1]
    assert plan_shards([], 10) == [] and plan_shards([5, 5], 1) == [range(0, 1), range(1, 2)]
    assert shard_name(0, 3) == "model-00001-of-00003.safetensors"
