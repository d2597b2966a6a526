"""Writers that are killed, find the disk full or meet one another: what is left is absent, continued, or whole and as an undisturbed run leaves it.

    PYTHONPATH=src:tests python -m fuzz.interrupted --kills 100 --rounds 20

A full disk needs the right to mount a small tmpfs (root, or `unshare -rm`); without it that part says so.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

import halfbyte as hb
from halfbyte.checkpoint import Checkpoint
from halfbyte.checkpoint.writer import JOURNAL, PARTIAL, file_digest
from halfbyte.convert import QuantizeOptions, quantize_model
from halfbyte.errors import CheckpointError
from halfbyte.loading.prepared import Wanted, prepare_on_disk

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 2, 8, 256, 128
_DONE, _REFUSED, _FAILED = 0, 1, 70
_REASONS = ("another process is writing here", "the destination exists and is never overwritten", "the disk is full")


@dataclass(frozen=True)
class Job:
    """Something that writes.

    Attributes:
        run: writes into a directory that is there or not.
        whole: the names of the files that an undisturbed run leaves, and their digests.
        leftovers: whether files under temporary names may outlast a finished run, as those of a cache do for an hour.
    """

    name: str
    run: Callable[[Path], object]
    whole: dict[str, str]
    leftovers: bool


def write_model(path: Path) -> Path:
    """A dense model of random weights, about 4 MB."""
    torch.manual_seed(0)
    tensors, prefix = {}, "model.layers.{}.mlp"
    for layer in range(LAYERS):
        block = prefix.format(layer)
        tensors[f"{block}.gate.weight"] = torch.randn(EXPERTS, HIDDEN).bfloat16()
        for expert in range(EXPERTS):
            for leaf, shape in (("gate", (INTERMEDIATE, HIDDEN)), ("up", (INTERMEDIATE, HIDDEN)), ("down", (HIDDEN, INTERMEDIATE))):
                tensors[f"{block}.experts.{expert}.{leaf}_proj.weight"] = torch.randn(shape).bfloat16()
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    sizes = f'"hidden_size": {HIDDEN}, "moe_intermediate_size": {INTERMEDIATE}, "num_experts": {EXPERTS}, "num_hidden_layers": {LAYERS}'
    (path / "config.json").write_text(f'{{"model_type": "qwen3_moe", "num_experts_per_tok": 2, "norm_topk_prob": true, {sizes}}}')
    return path


def digests(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file_digest(file) for file in path.rglob("*") if file.is_file()} if path.exists() else {}


def jobs(folder: Path) -> Iterator[Job]:
    """`quantize` in several shards, and `prepare` of what it writes."""
    source = write_model(folder / "source")
    options = QuantizeOptions(max_shard_bytes=200_000)

    def quantize(path: Path) -> None:
        quantize_model(source, path, options)

    def prepare(path: Path) -> None:
        checkpoint = Checkpoint.open(folder / "quantize")
        for layer in range(LAYERS):
            prepare_on_disk(checkpoint, layer, Wanted(layout="hopper", cache_dir=path), verify=True)

    for name, run, leftovers in (("quantize", quantize, False), ("prepare", prepare, True)):
        run(folder / name)
        yield Job(name, run, digests(folder / name), leftovers)


def started(job: Job, path: Path) -> int:
    """The process that does the job in `path`: this one's child, which need not import anything."""
    child = os.fork()
    if child:
        return child
    code = _FAILED
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        job.run(path)
        code = _DONE
    except CheckpointError as error:
        code = _REFUSED if any(reason in str(error) for reason in _REASONS) else _FAILED
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Its exit code; that of a killed one is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(job: Job, path: Path, what: str) -> str:
    """What a disturbed run left, "absent", "unfinished" or "whole", after another run has finished it.

    Raises:
        AssertionError: a model that is not whole but would load; or what the other run leaves is not as an undisturbed one leaves it.
    """
    before = digests(path)
    named = {name: digest for name, digest in before.items() if not name.endswith(PARTIAL) and name != JOURNAL and ".tmp" not in name}
    state = "absent" if not named else "whole" if named == job.whole else "unfinished"
    if "config.json" in named:
        assert state == "whole", f"{what}: config.json beside files that are not whole"
    if job.leftovers:
        assert all(job.whole[name] == digest for name, digest in named.items()), f"{what}: a damaged file under its final name"
    if job.leftovers or state != "whole":  # a finished checkpoint is never written again
        job.run(path)
    after = {name: digest for name, digest in digests(path).items() if not (job.leftovers and name.endswith(PARTIAL))}
    assert after == job.whole, f"{what}: {sorted({*after} ^ {*job.whole})} are there or not, {len(after)} files"
    return state


def kill_at_random(job: Job, folder: Path, kills: int, rng: random.Random) -> Counter[str]:
    """kill -9 at moments spread over the time that a run takes, every other time from its first file on; a third of the runs is killed twice."""
    begun = time.monotonic()
    assert ended(started(job, folder / "timed")) == _DONE
    seconds, states = time.monotonic() - begun, Counter[str]()
    for number in range(kills):
        path = folder / f"{job.name} {number}"
        for _ in range(1 + (number % 3 == 0)):
            child, begun = started(job, path), time.monotonic()
            while number % 2 and not path.exists() and time.monotonic() < begun + seconds:
                time.sleep(0.001)
            time.sleep(rng.random() * seconds * (0.5 if number % 2 else 1.05))
            os.kill(child, signal.SIGKILL)
            states["ended before" if ended(child) == _DONE else "killed"] += 1
        states["left " + check(job, path, f"kill {number}")] += 1
        shutil.rmtree(path)
    return states


def together(job: Job, folder: Path, writers: int, rounds: int) -> Counter[str]:
    """Several processes with one destination: one or more succeed, the others are told that it is in use."""
    codes = Counter[str]()
    for number in range(rounds):
        path = folder / f"{job.name} {writers} {number}"
        children = [started(job, path) for _ in range(writers)]
        ends = [ended(child) for child in children]
        assert _DONE in ends and _FAILED not in ends, f"{writers} writers ended with {ends}"
        codes.update("done" if code == _DONE else "told that another one writes, or did" for code in ends)
        assert check(job, path, f"{writers} writers") == "whole"
        shutil.rmtree(path)
    return codes


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill_disk(job: Job, folder: Path, rounds: int) -> Counter[str]:
    """Disks of sizes from nothing to nearly enough; then the same disk, larger."""
    needed, states = sum(file.stat().st_size for file in (folder / job.name).rglob("*") if file.is_file()), Counter[str]()
    for number in range(rounds):
        with small_disk(folder / f"disk {job.name} {number}", 4096 + needed * number // rounds // 4096 * 4096) as disk:
            code = ended(started(job, disk / "out"))
            assert code == _REFUSED, f"a disk of {number} / {rounds} of what is needed: exit {code}"
            assert not [name for name in digests(disk) if name.endswith(PARTIAL)], "temporary files on a full disk"
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            states["left " + check(job, disk / "out", "full disk")] += 1
    return states


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each job")
    parser.add_argument("--rounds", type=int, default=20, help="of two writers, four writers, and of full disks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # children are forked
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for job in jobs(folder):
            print(f"{job.name}, {args.kills} kills: {dict(kill_at_random(job, folder, args.kills, random.Random(args.seed)))}", flush=True)
            for writers in (2, 4):
                print(f"{job.name}, {writers} writers, {args.rounds} times: {dict(together(job, folder, writers, args.rounds))}", flush=True)
            try:
                print(f"{job.name}, full disk, {args.rounds} sizes: {dict(fill_disk(job, folder, args.rounds))}", flush=True)
            except subprocess.CalledProcessError as error:
                print(f"{job.name}, full disk: not tried, {error}")
    print(f"all as it should be; halfbyte {hb.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
