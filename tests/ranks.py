"""Several ranks of a process group on this machine: each runs one function of a test file in a process of its own.

    def check_sums(rank: int, world: int) -> None: ...
    def test_sums() -> None:
        run_ranks(check_sums, 3)

The processes are forked (`forked`). A rank that fails ends, which ends the waiting of the others.
"""

from __future__ import annotations

import importlib.util
import inspect
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import TIMEOUT_S, begin, context


def run_ranks(
    check: Callable[..., None], world: int, *arguments: Any, ends_alone: bool = True, interpreted: bool = False, backend: str = "gloo"
) -> list[str | None]:
    """Run check(rank, world, *arguments) on `world` ranks; what failed where, None for ranks that ended well.

    With `ends_alone` a failure anywhere is one here; with `interpreted` Triton's kernels run in its interpreter.
    With `backend` "nccl" rank r has GPU r.
    """
    with tempfile.TemporaryDirectory() as folder:
        check_at = (inspect.getfile(check), check.__name__)
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(target=_run, args=(check_at, rank, world, f"{folder}/store", sender, arguments, interpreted, backend), daemon=True)
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        outcomes = [_outcome(receiver) for receiver, _ in pipes]
        for process in processes:
            process.join(10)
            process.kill()
    failed = [f"rank {rank}:\n{text}" for rank, text in enumerate(outcomes) if text is not None]
    failed = [text for text in failed if "PeerError" not in text] or failed  # who started it
    assert not (ends_alone and failed), "\n".join(failed)
    return outcomes


def _outcome(receiver: Connection) -> str | None:
    if not wait([receiver], TIMEOUT_S):
        return f"no answer in {TIMEOUT_S} s"
    try:
        return receiver.recv()
    except EOFError:
        return "the process ended without a word"


def _run(
    check: tuple[str, str], rank: int, world: int, store: str, sender: Connection, arguments: tuple[Any, ...], interpreted: bool, backend: str
) -> None:  # fmt: skip
    begin(interpreted=interpreted)
    file, name = check
    try:
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
        getattr(module, name)(rank, world, *arguments)
        dist.barrier()
        dist.destroy_process_group()
        sender.send(None)
    except BaseException:  # noqa: BLE001  # it is reported by the process that reads the pipe
        sender.send(traceback.format_exc())
