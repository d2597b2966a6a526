"""Write a checkpoint directory of which every file is whole at every moment, and which a second run of the same job continues.

A file is written under a temporary name beside its own, synced to disk and renamed. Finished files are listed in a journal
(`.halfbyte-job.json`, with a description of the job) that disappears when the job is complete; config.json and the index are written last,
so a directory that loads is a complete one. A directory that is neither empty nor the unfinished output of the same job is never touched. One
process at a time writes: the directory is locked for as long as the process lives or the writer is open.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from halfbyte.checkpoint.json_files import READABLE, read_json, text_of
from halfbyte.checkpoint.source import INDEX
from halfbyte.errors import CheckpointError

JOURNAL = ".halfbyte-job.json"
DEFAULT_SHARD_BYTES = 5_000_000_000
PARTIAL = ".halfbyte-partial"
_SAFETENSORS_PARTIAL = ".tmp*"  # what safetensors writes beside a file before it renames it; it stays where the process is killed


class CheckpointWriter:
    """The destination of one job.

    Args:
        path: the directory; made when missing. Empty, or the unfinished output of the same `job`.
        job: a JSON-able description of the job (source and options). Two runs with equal descriptions must write equal files.

    Raises:
        CheckpointError: the destination holds something else, cannot be written, or another process is writing there.

    >>> import tempfile
    >>> with CheckpointWriter(Path(tempfile.mkdtemp()) / "out", {"example": 1}) as writer:
    ...     writer.write_tensors("model-00001-of-00001.safetensors", {"w": torch.zeros(2)})
    ...     writer.finish({"w": "model-00001-of-00001.safetensors"}, total_bytes=8, config={"model_type": "example"})
    >>> sorted(file.name for file in writer.path.iterdir())
    ['config.json', 'model-00001-of-00001.safetensors', 'model.safetensors.index.json']
    """

    def __init__(self, path: Path, job: Mapping[str, Any]):
        self.path = path
        self._files: dict[str, dict[str, Any]] = {}
        self._notes: dict[str, Any] = {}
        self._job = json.loads(json.dumps(job))
        check_destination(path, job)
        make_directory(path)
        self._lock = _locked(path)
        try:
            journal = check_destination(path, job)  # again: now nobody else changes it
            if journal is not None:
                self._files, self._notes = journal["files"], journal["notes"]
            for leftover in (*path.rglob(f"*{PARTIAL}"), *path.glob(_SAFETENSORS_PARTIAL)):  # of a run that was killed, perhaps in its first journal
                if leftover.is_symlink() or not leftover.is_dir():
                    leftover.unlink()
            self._save_journal()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write here."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def is_finished(self, name: str) -> bool:
        """Whether an earlier run of this job finished file `name`, and every byte of it is still there."""
        file = self.path / name
        if name not in self._files or file.is_symlink() or not file.is_file() or file.stat().st_size != self._files[name]["bytes"]:
            return False
        return file_digest(file) == self._files[name]["sha256"]

    def record_of(self, name: str) -> Any:
        """What was recorded with a finished file."""
        return self._files[name]["record"]

    def note(self, key: str) -> Any:
        """A value that an earlier run of this job kept with `keep_note`, or None."""
        return self._notes.get(key)

    def keep_note(self, key: str, value: Any) -> None:
        """Keep a JSON-able value in the journal."""
        self._notes[key] = value
        self._save_journal()

    def write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor], record: Any = None) -> None:
        """Write one safetensors shard of contiguous CPU tensors; `record` (JSON-able) is kept in the journal with it.

        Raises:
            CheckpointError: the disk is full or the file cannot be written; the shards finished before stay.
        """
        with replacing(self.path / name) as partial:
            save_file(dict(tensors), partial, metadata={"format": "pt"})
        self._files[name] = {"bytes": (self.path / name).stat().st_size, "sha256": file_digest(self.path / name), "record": record}
        self._save_journal()

    def write_json(self, name: str, document: Any) -> None:
        """Write one JSON file."""
        self.write_text(name, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write one text file; what is no Unicode, as in a name that was not UTF-8, is written out."""
        with replacing(self.path / name) as partial:
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")

    def copy_file(self, source: Path, name: str) -> None:
        """Copy a file to `name` (may contain folders).

        Raises:
            CheckpointError: one of the two cannot be read, or written.
        """
        try:
            stream = source.open("rb")
        except OSError as error:
            raise CheckpointError(f"cannot read the file: {error.strerror}", where=str(source), next_step=READABLE) from error
        make_directory((self.path / name).parent)
        with stream, replacing(self.path / name) as partial, partial.open("wb") as copy:
            shutil.copyfileobj(stream, copy)

    def finish(self, weight_map: Mapping[str, str], total_bytes: int, config: Mapping[str, Any]) -> None:
        """Write the index, then config.json, and drop the journal: the checkpoint is complete."""
        self.write_json(INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))})
        self.write_json("config.json", config)
        (self.path / JOURNAL).unlink()
        _sync_directory(self.path)

    def _save_journal(self) -> None:
        journal = {"job": self._job, "files": self._files, "notes": self._notes, "process": f"{os.getpid()} on {platform.node()}"}
        self.write_json(JOURNAL, journal | {"sha256": journal_digest(journal)})


def check_destination(path: Path, job: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the journal of an unfinished earlier run of `job` in `path`, None when the destination is free. Changes nothing.

    Raises:
        CheckpointError: the destination holds anything else.
    """
    choose = "choose another destination, or remove this one"
    try:
        exists = path.exists()
    except OSError as error:  # a name that is too long
        raise write_error(path, error) from error
    if not exists:
        return None
    if not path.is_dir():
        raise CheckpointError("the destination is a file", where=str(path), needed="a new directory", next_step=choose)
    if not os.path.lexists(path / JOURNAL):
        if any(file for file in path.iterdir() if not file.name.endswith(PARTIAL)):
            raise CheckpointError("the destination exists and is never overwritten", where=str(path), needed="a new directory", next_step=choose)
        return None
    journal = _read_journal(path)
    before, now = journal["job"], json.loads(json.dumps(job))
    if before != now:
        raise CheckpointError(
            "the destination holds an unfinished job with another source or other options",
            where=str(path),
            given=", ".join(_differences(before, now)),
            next_step="repeat the first command to continue it, throw it away with --restart, or choose another destination",
        )
    return journal


def discard_unfinished(path: Path) -> None:
    """Empty `path` where it holds an unfinished job; anything else is left as it is.

    Raises:
        CheckpointError: another process is writing there.
    """
    if not os.path.lexists(path / JOURNAL):
        return
    lock = _locked(path)
    try:
        for entry in sorted(path.iterdir(), key=lambda entry: entry.name == JOURNAL):  # it is last: what is half removed is still an unfinished job
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        os.close(lock)


def _read_journal(path: Path) -> dict[str, Any]:
    """The journal in `path`, exactly as a writer left it."""
    try:
        journal = read_json(path / JOURNAL, next_step="")
        if journal.pop("sha256", None) != journal_digest(journal):
            raise ValueError("its checksum is another one, or missing")
    except (CheckpointError, ValueError) as error:
        step = "throw the job away with --restart, or choose another destination"
        raise CheckpointError("the journal of an unfinished job is damaged", where=str(path / JOURNAL), given=error, next_step=step) from error
    return journal


def journal_digest(journal: Mapping[str, Any]) -> str:
    """Of all it says: a value that is only a little wrong, as an input scale, would go into the result."""
    return hashlib.sha256(json.dumps(journal, sort_keys=True).encode()).hexdigest()


def _locked(path: Path) -> int:
    """A descriptor of the directory, locked for this process until it is closed.

    Raises:
        CheckpointError: another process holds it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        writing = re.search(r'"process": "([^"]*)"', text_of(path / JOURNAL))
        raise CheckpointError(
            "another process is writing here",
            where=str(path),
            given=f"process {writing[1]}" if writing else "a process that has just begun",
            next_step="wait for it, or choose another destination",
        ) from None
    return descriptor


def file_digest(file: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def plan_shards(sizes: Sequence[int], max_bytes: int) -> list[range]:
    """Cut items of `sizes` bytes into consecutive shards of at most `max_bytes` (a larger item gets a shard of its own).

    >>> plan_shards([4, 4, 9, 1, 1], 8)
    [range(0, 2), range(2, 3), range(3, 5)]
    """
    shards, first, filled = [], 0, 0
    for index, size in enumerate(sizes):
        if index > first and filled + size > max_bytes:
            shards.append(range(first, index))
            first, filled = index, 0
        filled += size
    if first < len(sizes):
        shards.append(range(first, len(sizes)))
    return shards


def shard_name(index: int, count: int) -> str:
    """The usual file name of shard `index` (from 0) of `count`: model-00001-of-00003.safetensors."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path`, of a name of its own; on success sync it and rename it to `path`, on any failure remove it.

    Raises:
        CheckpointError: the disk is full or the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors 0.8 leaves files readable by their owner alone
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_directory(path.parent)
    except (OSError, SafetensorError) as error:
        raise write_error(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def write_error(path: Path, error: OSError | SafetensorError) -> CheckpointError:
    """The error for a file that could not be written."""
    # safetensors reports the operating system's error as text only
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error) or "No space left" in str(error)
    return CheckpointError(
        "the disk is full" if full else "cannot write the file",
        where=str(path),
        given=error,
        next_step=("free some space" if full else "make the destination writable") + " and repeat the command: what was finished is kept",
    )


def make_directory(path: Path) -> None:
    """Make `path` and its parents, or raise CheckpointError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def _sync_directory(path: Path) -> None:
    """Make a rename or removal in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: then A, now B` for every leaf that differs."""
    lines = []
    for key in sorted({*before, *now}):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key} was {a!r}, is {b!r}")
    return lines
