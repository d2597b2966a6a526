"""What a measurement leaves: rows, the environment they were taken in, the file that collects them, and the table."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

import halfbyte
from halfbyte.bench.ceilings import Ceilings
from halfbyte.bench.gate import GLOBAL_LIMIT
from halfbyte.errors import InputError

if TYPE_CHECKING:
    from halfbyte.bench.prepare import PrepareRecord
    from halfbyte.bench.quantize import QuantizeRecord

Status = Literal["ok", "refused", "skipped"]


@dataclass(frozen=True)
class Row:
    """One system on one layer with one number of tokens.

    Attributes:
        status: "ok"; "refused", its result is wrong, so it has no time; "skipped", it could not run. `reason` says why for the last two.
        kernel: what ran, as far as the system says.
        experts_touched: distinct experts of a call, mean over the calls.
        floor_us, bound: the shortest possible time, and whether "memory" or "compute" sets it.
        median_us, spread, samples, timer: as `timing.Timing`; fraction: floor_us / median_us.
        calls, weight_sets: calls with different routings in a sample, and copies of the weights that they take in turn.
        token_error, global_error: relative L2 against the fp32 reference; None where the result is not finite or there is none;
            global_limit: what the gate allowed of the second.
        peak_extra_bytes: memory of one call beside weights and inputs, its result included; None on a CPU.
    """

    shape: str
    format: str
    activations: str
    routing: str
    num_tokens: int
    system: str
    status: Status
    experts_touched: float
    floor_us: float
    bound: str
    global_limit: float
    calls: int
    weight_sets: int
    reason: str = ""
    kernel: str = ""
    median_us: float | None = None
    spread: float | None = None
    samples: int | None = None
    timer: str | None = None
    fraction: float | None = None
    token_error: float | None = None
    global_error: float | None = None
    peak_extra_bytes: int | None = None

    def __str__(self) -> str:
        subject = f"{self.shape} {self.format}, {self.num_tokens} tokens, {self.system}"
        if self.median_us is None or self.fraction is None:
            return f"{subject}: {self.status}: {self.reason}"
        return f"{subject}: {self.median_us:.1f} us, {100 * self.fraction:.1f} % of the {self.bound} floor"


@dataclass(frozen=True)
class Record:
    """A row with the environment and the ceilings of its run: one line of a results file."""

    environment: dict[str, Any]
    ceilings: Ceilings
    row: Row

    @property
    def table_key(self) -> tuple[str, ...]:
        """The rows that may stand in one table: same device, layer, formats and routing."""
        row = self.row
        return self.environment["device"], row.shape, row.format, row.activations, row.routing


def environment(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """Describe this machine and software, and the command line that measures."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "triton": _version("triton"),
        "halfbyte": halfbyte.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "command": shlex.join(command),
    }


def append(file: Path, record: Record | PrepareRecord | QuantizeRecord, benchmark: str = "moe") -> None:
    """Add one line to a results file; what is there stays."""
    document = {"benchmark": benchmark, **asdict(record)}
    with file.open("a") as stream:
        stream.write(json.dumps(document, allow_nan=False) + "\n")


def read(file: Path) -> list[Record]:
    """Read a results file back, in the order it was written.

    Raises:
        InputError: no such file, or a line that is no row of this benchmark.
    """
    if not file.is_file():
        raise InputError("no such results file", given=file)
    records = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            document = json.loads(line)
            records.append(Record(document["environment"], Ceilings(**document["ceilings"]), Row(**document["row"])))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError("not a row of halfbyte bench moe", where=f"{file}:{number}", given=repr(line[:60])) from error
    return records


def tables(records: Iterable[Record]) -> list[list[Record]]:
    """The records of one table each: same `table_key` and same run, in the order of the runs."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        run = (record.environment["date"], record.environment["command"])
        groups.setdefault((*run, *record.table_key), []).append(record)
    return list(groups.values())


def latest(groups: Iterable[list[Record]]) -> list[list[Record]]:
    """Of tables that differ only in their run, the last one."""
    return list({group[0].table_key: group for group in groups}.values())


def render(groups: Iterable[list[Record]]) -> str:
    """Lay tables out in Markdown, each under a heading and a line about its run; what was refused or skipped says why below."""
    return "\n\n".join(_render_table(group) for group in groups)


def title(group: list[Record]) -> str:
    """What a table is about, its device left out."""
    row = group[0].row
    return f"{row.shape} {row.format.upper()}, {row.activations} activations, {row.routing} routing"


_COLUMNS = ("tokens", "system", "us", "spread", "floor us", "of floor", "bound", "error", "experts", "extra MiB", "kernel")


def _render_table(group: list[Record]) -> str:
    rows = sorted((record.row for record in group), key=lambda row: row.num_tokens)  # stable: systems stay in their order
    lines = [f"### {title(group)}", "", _run_line(group[0]), "", f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    notes = _notes(rows)
    return "\n".join([*lines, "", *notes] if notes else lines)


def _notes(rows: list[Row]) -> list[str]:
    """What was refused or skipped, with its reason, and who passed a gate that is not the standard one."""
    tokens_of: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        if row.status != "ok":
            tokens_of.setdefault((row.system, row.status, row.reason), []).append(row.num_tokens)
    notes = [f"- {system} at {_listed(tokens)} tokens {status}: {reason}" for (system, status, reason), tokens in tokens_of.items()]
    looser = dict.fromkeys((row.system, row.global_limit) for row in rows if row.global_limit > GLOBAL_LIMIT)
    return notes + [f"- {system} was allowed an error of {limit:.0e}; the standard is {GLOBAL_LIMIT:.0e}" for system, limit in looser]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _run_line(record: Record) -> str:
    env, ceilings = record.environment, record.ceilings
    fp8 = f", fp8 {ceilings.fp8_tflops:.0f} TFLOP/s" if ceilings.fp8_tflops is not None else ""
    software = f"torch {env['torch']}, triton {env['triton']}, halfbyte {env['halfbyte']} ({env['commit'] or 'commit unknown'})"
    return (
        f"{env['device']}, {env['date'][:10]}, {software}; measured ceilings: read {ceilings.read_gbps:.0f} GB/s, "
        f"copy {ceilings.copy_gbps:.0f} GB/s, bf16 {ceilings.bf16_tflops:.3g} TFLOP/s{fp8}"
    )


def _cells(row: Row) -> list[str]:
    def cell(value: float | None, text: str) -> str:
        return "-" if value is None else text.format(value)

    return [
        str(row.num_tokens),
        row.system,
        cell(row.median_us, "{:.1f}") if row.status == "ok" else row.status,
        cell(row.spread, "{:.1%}"),
        f"{row.floor_us:.1f}",
        cell(row.fraction, "{:.1%}"),
        row.bound,
        cell(row.global_error, "{:.1e}"),
        f"{row.experts_touched:.4g}",
        cell(None if row.peak_extra_bytes is None else row.peak_extra_bytes / 2**20, "{:.1f}"),
        row.kernel or "-",
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree that runs, with "-dirty" when it differs; None outside a checkout (an installed package, no git)."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", "../__init__.py"], capture_output=True)
        commit = subprocess.run([*git, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"], capture_output=True, text=True)
    except OSError:
        return None
    return commit.stdout.strip() or None if tracked.returncode == 0 else None
