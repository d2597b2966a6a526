"""`autotune`: tune the layers that a program calls, and let all ranks of a group use the same tables."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from halfbyte.errors import InputError
from halfbyte.kernels import tuned
from halfbyte.kernels.table import choose_untuned, use_tables
from halfbyte.kernels.tuned import Table
from halfbyte.tuning.layer import Layer, distinct
from halfbyte.tuning.run import OnDevice, load, tune

logger = logging.getLogger(__name__)


@contextmanager
def autotune(*, budget_s: float = math.inf, group: Any = None, again: bool = False) -> Iterator[None]:
    """Note the MoE layers that are called within, and tune them at the end; later calls, of this process and of later ones, use what was found.

    Tuning compiles and races on the device where the layers are, with random weights in a process of its own: leave it memory for one layer. What
    the user's tables know already is not raced again, so a second run costs nothing. `docs/tuning.md` has what it gains, and when it is not needed.

    With a process group, all ranks enter and leave together. The first rank tunes the layers that it called; then it sends its tables to the others,
    always, whatever any of them had on disk. All ranks then use these and no other tables of the user's. Ranks whose software or GPU differs from the
    first one's say so in that one exchange, and then all of them keep to the kernels' own rules.

    CUDA graphs keep the configurations that they were captured with: tune before.

    Args:
        budget_s: start no race after so many seconds; the next run goes on from there.
        group: a torch.distributed process group (`torch.distributed.group.WORLD` for all ranks); None: this process alone.
        again: race also what the tables know.

    Raises:
        InputError: within another `autotune`.
        CheckpointError: the directory of the tables (`HALFBYTE_CACHE_DIR`) cannot be written.

    >>> with halfbyte.autotune():  # layers that no kernel with a choice runs, as on a CPU, are left alone
    ...     pass
    """
    if tuned.seen is not None:
        raise InputError("already within autotune", where="autotune", needed="one at a time")
    tuned.seen = set()
    try:
        yield
        called = tuned.seen
    finally:
        tuned.seen = None
    layers = distinct([Layer.called(problem, top_k) for problem, top_k in called if _is_tuned(problem)])
    use_same(layers, lambda: _tune_here(layers, budget_s, again), group)


def use_same(layers: list[Layer], tune_here: Callable[[], list[Table]], group: Any = None) -> None:
    """Let this process, or every rank of a group, use the tables that `tune_here` gives on the first rank. Two collectives on every rank, no more."""
    if group is None:
        use_tables(tune_here())
        return
    import torch.distributed as dist

    is_first = dist.get_rank(group) == 0
    tables = tune_here() if is_first else []  # before the first collective: who waits in one waits for nobody's choice
    message = [json.dumps([table.to_json() for table in tables])]
    dist.broadcast_object_list(message, group=group, group_src=0)
    marks: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(marks, _mark(message[0]), group=group)
    agreed = len(set(marks)) == 1
    if not agreed:
        logger.warning("ranks differ in software, tables of the package or GPU: all keep to the kernels' own rules")
    use_tables([Table.from_json(document, "the first rank") for document in json.loads(message[0])] if agreed else [], alone=True, shipped=agreed)


def _tune_here(layers: list[Layer], budget_s: float, again: bool) -> list[Table]:
    """Tune in a process of its own: those that it starts would run a script without a main guard once more, if this process started them."""
    if layers:
        order = pickle.dumps((layers, torch.cuda.current_device(), budget_s, again))
        command = [sys.executable, "-c", "from halfbyte.tuning.session import _tune_ordered; _tune_ordered()"]
        subprocess.run(command, input=order, check=True)
    return load(layers)


def _tune_ordered() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    layers, device, budget_s, again = pickle.load(sys.stdin.buffer)
    racing = OnDevice(torch.device("cuda", device))
    try:
        for layer, race in tune(layers, racing, budget_s=budget_s, again=again):
            logger.info("%s, up to %s: %s", layer, race.bucket, race)
    finally:
        racing.close()


def _is_tuned(problem: Any) -> bool:
    return problem.format is not None and not problem.batch_invariant and bool(choose_untuned(problem).sources)


def _mark(message: str) -> str:
    """What must be the same on all ranks for them to choose the same."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    shipped = [file.read_text() for file in sorted(tuned.SHIPPED.glob("*.json"))]
    parts = (message, device, *tuned.versions().values(), *shipped)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
