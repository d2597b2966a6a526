"""A line of a results file, whatever benchmark wrote it; the file that collects lines; the tables that show them.

A benchmark brings a dataclass that is a `Row`, and in its module `row_of(fields)`, which makes one of what a file kept. Nothing here knows more.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch

import halfbyte
from halfbyte.checkpoint.json_files import json_lines, parse_object, read_text
from halfbyte.checkpoint.typed_json import typed
from halfbyte.checkpoint.writer import write_error
from halfbyte.errors import InputError, printable, reason_of

Status = Literal["ok", "refused", "skipped"]

# Benchmark -> the module of its rows, imported when a file has some.
ROW_MODULES = {
    "moe": "halfbyte.bench.moe",
    "prepare": "halfbyte.bench.prepare",
    "quantize": "halfbyte.bench.quantize",
    "dispatch": "halfbyte.bench.dispatch",
    "serve": "halfbyte.bench.serve_rows",
}

MOST_PANELS = 6  # of a plot; more are too small to read


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, which attribute of a row it shows, in what format, divided by what.

    >>> Column("extra MiB", "nbytes", ".1f", 2**20).cell(torch.zeros(2**19))
    '2.0'
    """

    head: str
    attribute: str
    format: str = ""
    divisor: int = 1

    def cell(self, row: object) -> str:
        """The text; "-" where the row has none."""
        value = getattr(row, self.attribute)
        if value is None or value == "":
            return "-"
        return format(value if self.divisor == 1 else value / self.divisor, self.format)


class Row(Protocol):
    """One system on one subject at one size: a frozen dataclass, whose fields are what a file keeps.

    Attributes:
        columns: what tables show beside size and system. The first is the time; a row without one says its status there.
        unit: what sizes are counted in, a plural: "tokens".
        status: "ok"; "refused", its result is wrong, so it has no time; "skipped", it could not run.
        reason: why it was refused or skipped; else "".
        system: what is measured, and compared with the other systems of a table.
        size: how much it was given.
        subject: what systems and sizes are compared on: the heading of a table, which has all rows of one subject.
        result: the numbers of an "ok" row in a few words.
        remark: what a reader must know beside the numbers, to follow "SYSTEM was"; else "".
    """

    columns: ClassVar[tuple[Column, ...]]
    unit: ClassVar[str]

    @property
    def status(self) -> Status: ...
    @property
    def reason(self) -> str: ...
    @property
    def system(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def subject(self) -> str: ...
    @property
    def result(self) -> str: ...
    @property
    def remark(self) -> str: ...


@dataclass(frozen=True)
class Record:
    """One line of a results file.

    Attributes:
        benchmark: a key of `ROW_MODULES`.
        environment: as the function of that name.
        ceilings: what the machine can do at most, as measured in the same run; fields of `Ceilings`, not always all.
    """

    benchmark: str
    environment: Mapping[str, Any]
    ceilings: Mapping[str, float | None]
    row: Row

    def __str__(self) -> str:
        row = self.row
        outcome = row.result if row.status == "ok" else f"{row.status}: {row.reason}"
        return f"{row.subject}, {_counted([row.size], row.unit)}, {row.system}: {outcome}"


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


def append(file: Path, record: Record) -> None:
    """Add one line to a results file; what is there stays.

    Raises:
        CheckpointError: the disk is full or the file cannot be written.
    """
    line = json.dumps(asdict(record), allow_nan=False)
    try:
        with file.open("a") as stream:
            stream.write(line + "\n")
    except OSError as error:
        raise write_error(file, error) from error


def read(file: Path) -> list[Record]:
    """Read a results file back, in the order it was written; it may hold lines of several benchmarks.

    Raises:
        InputError: no such file, no text, or a line that no benchmark wrote.
    """
    try:
        lines = json_lines(read_text(file))
    except FileNotFoundError as error:
        raise InputError("no such results file", given=file) from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the file: {reason_of(error)}", where=str(file), needed="lines as --out writes them") from error
    return [_record(line, f"{file}:{number}") for number, line in enumerate(lines, start=1) if line]


def _record(line: str, where: str) -> Record:
    try:
        document = parse_object(line.encode())
        benchmark = str(document["benchmark"])
    except (ValueError, KeyError) as error:
        needed = "JSON with benchmark, environment, ceilings and row"
        raise InputError("not a line of halfbyte bench", where=where, given=repr(line[:60]), needed=needed) from error
    if benchmark not in ROW_MODULES:
        advice = "leave this file out: another program wrote it"
        raise InputError("not a benchmark of halfbyte bench", where=where, given=repr(benchmark), needed=" or ".join(ROW_MODULES), next_step=advice)
    row_of = importlib.import_module(ROW_MODULES[benchmark]).row_of
    try:
        environment = typed(dict[str, str | None], document["environment"], "environment")
        environment |= typed(dict[str, str], {name: environment[name] for name in _NEEDED}, "environment")
        # Until 2026-11-29 `bench prepare` wrote its one ceiling beside the row.
        ceilings = document["ceilings"] if "copy_gbps" not in document else {"copy_gbps": document["copy_gbps"]}
        return Record(benchmark, environment, typed(dict[str, float | None], ceilings, "ceilings"), row_of(document["row"]))
    except (ValueError, KeyError) as error:
        given = f"{type(error).__name__}: {error}"
        raise InputError(f"not a row of halfbyte bench {benchmark}", where=where, given=given, needed="a line as --out writes it") from error


def tables(records: Iterable[Record]) -> list[list[Record]]:
    """The records of one table each: same run, device and subject, in the order of the runs."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        run = (record.environment["date"], record.environment["command"])
        groups.setdefault((*run, *_compared(record)), []).append(record)
    return list(groups.values())


def latest(groups: Iterable[list[Record]]) -> list[list[Record]]:
    """Of tables that differ only in their run, the last one."""
    return list({_compared(group[0]): group for group in groups}.values())


def render(groups: Iterable[list[Record]]) -> str:
    """Lay tables out in Markdown, each under a heading and a line about its run; what was refused or skipped says why below."""
    return "\n\n".join(_render_table(group) for group in groups)


def _compared(record: Record) -> tuple[str, ...]:
    """The records that agree in this may stand in one table."""
    return record.benchmark, record.environment["device"], record.row.subject


def _render_table(group: list[Record]) -> str:
    rows = sorted((record.row for record in group), key=lambda row: row.size)  # stable: systems stay in their order
    columns = rows[0].columns
    heads = (rows[0].unit, "system", *(column.head for column in columns))
    lines = [printable(f"### {rows[0].subject}"), "", printable(_run_line(group[0])), "", _line(heads), "|" + "---|" * len(heads)]
    for row in rows:
        time, *rest = (column.cell(row) for column in columns)
        lines.append(_line([str(row.size), row.system, time if row.status == "ok" else row.status, *rest]))
    notes = _notes(rows)
    return "\n".join([*lines, "", *map(printable, notes)] if notes else lines)


def _line(cells: Sequence[str]) -> str:
    return printable(f"| {' | '.join(cells)} |")


def _notes(rows: Sequence[Row]) -> list[str]:
    """What was refused or skipped, with its reason, and the remarks; each once, whatever its number of sizes."""
    sizes_of: dict[tuple[str, str, str], list[int]] = {}
    for row in rows:
        if row.status != "ok":
            sizes_of.setdefault((row.system, row.status, row.reason), []).append(row.size)
    notes = [f"- {system} at {_counted(sizes, rows[0].unit)} {status}: {reason}" for (system, status, reason), sizes in sizes_of.items()]
    return notes + [f"- {system} was {remark}" for system, remark in dict.fromkeys((row.system, row.remark) for row in rows if row.remark)]


def _counted(sizes: Sequence[int], unit: str) -> str:
    """The sizes and their unit, as in "1 token" and "1, 4 tokens"."""
    return f"{', '.join(map(str, sizes))} {unit.removesuffix('s') if list(sizes) == [1] else unit}"


# What a table says of its run: parts of the environment, which are always there, and ceilings where they were measured.
_NEEDED = ("date", "command", "device", "torch", "halfbyte")
_CEILINGS = {
    "read_gbps": "read {:.0f} GB/s",
    "copy_gbps": "copy {:.0f} GB/s",
    "bf16_tflops": "bf16 {:.3g} TFLOP/s",
    "fp8_tflops": "fp8 {:.0f} TFLOP/s",
    "peer_gbps": "peer to peer {:.0f} GB/s per rank",
}


def _run_line(record: Record) -> str:
    env, ceilings = record.environment, record.ceilings
    measured = ", ".join(text.format(ceilings[name]) for name, text in _CEILINGS.items() if ceilings.get(name) is not None)
    software = f"torch {env['torch']}, triton {env.get('triton')}, halfbyte {env['halfbyte']} ({env.get('commit') or 'commit unknown'})"
    return f"{env['device']}, {env['date'][:10]}, {software}{f'; measured ceilings: {measured}' if measured else ''}"


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
