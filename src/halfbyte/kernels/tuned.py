"""Configurations that won races, read from tables: what `halfbyte tune` writes and calls look up before they follow the kernel's own rule.

    a table   JSON: the device that it was measured on, and layers
    a layer   what the kernel sees of it (`LayerKey`), with which kernels and which Triton it was measured, and a race per bucket
    a bucket  of rows per expert, on average; of distinct experts, where there are fewer rows than experts. So one table serves every number of
              tokens, experts per token and degree of expert parallelism
    a race    the configuration that led the rule's by more than the noise, or none, and the times

Tables are looked up in this order: what this process has tuned, the user's, the one that the package brings for this GPU, the one that it brings for
the GPU most alike, of the same architecture. In each, exactly this layer; if no table has it, the layer most alike. What was measured with another
source of the kernels or another Triton, or is no configuration of this layer, is passed over, and the log says why.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import reprlib
import tokenize
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from halfbyte.checkpoint.json_files import read_json
from halfbyte.checkpoint.typed_json import typed
from halfbyte.device import Target
from halfbyte.env import cache_dir
from halfbyte.errors import CheckpointError
from halfbyte.kernels.problem import Problem, Size
from halfbyte.version import __version__

logger = logging.getLogger(__name__)

SCHEMA = 1
SHIPPED = Path(__file__).parent / "tables"
DISTINCT = (8, 16, 32, 64)  # upper limits of buckets of distinct experts
AVERAGES = (1, 4.5, 9, 16, 24, 38, 56, 80, 112, 150, 176, 240, 320, 448)  # of rows per expert; a last bucket has no limit
_REMOVE = "remove it"
_MAX_DISTANCE = 1.0  # of a layer most alike: half or twice one of its sizes

seen: set[tuple[Problem, int]] | None = None  # layers that are called and their experts per token, while `hb.autotune` listens


@dataclass(frozen=True)
class LayerKey:
    """What a kernel sees of a layer."""

    kernel: str
    layout: str
    format: str
    activations: str
    gated: bool
    hidden: int
    intermediate: int
    experts: int

    @staticmethod
    def of(kernel: str, problem: Problem) -> LayerKey:
        format = problem.format.name if problem.format else "dense"
        sizes = (problem.gated, problem.hidden, problem.intermediate, problem.num_experts)
        return LayerKey(kernel, str(problem.layout), format, str(problem.activations), *sizes)

    def distance(self, other: LayerKey) -> float:
        """Powers of two between the sizes; infinite where more than sizes differ."""
        mine, others = ((key.kernel, key.layout, key.format, key.activations, key.gated) for key in (self, other))
        pairs = ((self.hidden, other.hidden), (self.intermediate, other.intermediate), (self.experts, other.experts))
        return sum(abs(math.log2(a / b)) for a, b in pairs) if mine == others else math.inf


@dataclass(frozen=True)
class Race:
    """What came of one bucket.

    Attributes:
        bucket: its name, of `buckets`; num_tokens: of the calls.
        default: name of what the kernel's own rule takes; taken: of what won.
        config: fields of that; None: the rule stays.
        us, default_us: of a call with the one and with the other, where they differ least (None where it failed); spread: the larger one of both.
        times: of every candidate by name, us per routing in the order of `Layer.routings`.
        excluded: reason by name of the candidates that failed.
    """

    bucket: str
    num_tokens: int
    default: str
    taken: str
    config: dict[str, Any] | None
    us: float | None
    default_us: float | None
    spread: float
    times: dict[str, list[float]]
    excluded: dict[str, str]

    def __str__(self) -> str:
        return f"{self.default} stays, {self.us} us" if self.config is None else f"{self.default} {self.default_us} -> {self.taken} {self.us} us"


@dataclass(frozen=True)
class Layer:
    """The races of one layer.

    Attributes:
        source: hash of the kernels' source; software: versions.
        measured: the date; name and top_k: of the model it was measured for; routings: how tokens chose experts.
        ceilings: what the device could do at most in that run (`bench.ceilings.Ceilings`).
    """

    key: LayerKey
    source: str
    software: dict[str, str]
    measured: str
    name: str
    top_k: int
    routings: tuple[str, ...]
    ceilings: dict[str, float | None]
    races: tuple[Race, ...]


@dataclass(frozen=True)
class Table:
    """Layers that were measured on one kind of device."""

    device: Target
    layers: tuple[Layer, ...]

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    @staticmethod
    def from_json(document: Any, where: str) -> Table:
        """Raises CheckpointError unless `document` is a table of this schema."""
        fields = dict(document) if isinstance(document, dict) else {}
        schema = fields.pop("schema", None)
        if schema != SCHEMA:
            raise CheckpointError("no table of this schema", where=where, given=reprlib.repr(schema), needed=str(SCHEMA), next_step=_REMOVE)
        try:
            table: Table = typed(Table, fields, "table")
            for layer in table.layers:
                _check(layer)
        except ValueError as error:
            raise CheckpointError("not a table of halfbyte tune", where=where, given=error, next_step=_REMOVE) from error
        return table


def _check(layer: Layer) -> None:
    """Raises ValueError for what no race of a layer of some size has."""
    key, names = layer.key, {name for _, name in buckets(layer.key.experts)}
    if not (key.hidden and key.intermediate and key.experts):
        raise ValueError(f"a size of the layer is 0: {key}")
    for race in layer.races:
        json.dumps(race.config, allow_nan=False)  # a ValueError for NaN and infinity
        if race.bucket not in names:
            raise ValueError(f"{reprlib.repr(race.bucket)} is no bucket of {key.experts} experts")
        if any(len(times) != len(layer.routings) or min(times, default=1.0) <= 0 for times in race.times.values()):
            raise ValueError(f"{race.bucket}: a candidate has no time with one of the {len(layer.routings)} routings")


def buckets(num_experts: int) -> list[tuple[int, str]]:
    """Upper limit in rows, and name, of every bucket of a layer with so many experts, ascending; the last one has no limit.

    >>> buckets(8)[:3]
    [(8, '1 row per expert'), (36, '4.5 rows per expert'), (72, '9 rows per expert')]
    """
    few = [(limit, f"{limit} experts") for limit in DISTINCT if limit < num_experts]
    many = [(int(limit * num_experts), f"{limit} {'row' if limit == 1 else 'rows'} per expert") for limit in AVERAGES]
    return [*few, *many, (1 << 62, "any number")]


class Found(NamedTuple):
    """What tables know of a layer: upper limits in rows and a configuration per bucket, None for the rule's; and where that comes from."""

    limits: tuple[int, ...]
    configs: tuple[Hashable | None, ...]
    reason: str

    def chooser(
        self, rule: Callable[[Problem, Size], Hashable | None], takes: Callable[[Problem, Size, Any], bool]
    ) -> Callable[[Problem, Size], Hashable | None]:
        """`choose_config`: the configuration of the bucket where there is one, else the rule's."""
        limits, configs = self.limits, self.configs

        def choose_config(problem: Problem, size: Size) -> Hashable | None:
            config = configs[bisect_left(limits, size.num_rows)]
            return config if config is not None and takes(problem, size, config) else rule(problem, size)

        return choose_config


def find(kernel: str, problem: Problem, configs: Sequence[Hashable], sources: tuple[str, ...], tables: Iterable[tuple[str, Table]]) -> Found | None:
    """Look the layer of `problem` up in `tables`, each with the name of its origin, in order; `configs` and `sources` are the kernel's.

    None where no table has something else than the rule. `batch_invariant` is never looked up: its bits depend on no table.
    """
    if not sources or problem.batch_invariant or not problem.hidden:
        return None
    wanted, by_fields = LayerKey.of(kernel, problem), [(fields_of(config), config) for config in configs]
    layers = [(wanted.distance(layer.key), order, origin, layer) for order, (origin, table) in enumerate(tables) for layer in table.layers]
    near = sorted((candidate for candidate in layers if candidate[0] <= _MAX_DISTANCE), key=lambda candidate: candidate[:2])
    if not any(race.config for *_, layer in near for race in layer.races):
        return None  # the rule's, whichever counts: that spares the hash of the sources
    for distance, _, origin, layer in near:
        obstacle = _obstacle(layer, sources)
        if obstacle:
            _tell(f"what {origin} knows of {layer.key} is passed over: {obstacle}")
            continue
        winners = {race.bucket: next((config for fields, config in by_fields if fields == race.config), None) for race in layer.races}
        limits, names = zip(*buckets(problem.num_experts), strict=True)
        number = sum(winners.get(name) is not None for name in names)
        if not number:
            return None  # it was raced, and the rule stays
        alike = "" if distance == 0 else f", measured with {layer.key.experts} experts of {layer.key.hidden} x {layer.key.intermediate}"
        reason = f"{number} of {len(names)} buckets from {origin}, {layer.measured}{alike}"
        _tell(f"{problem}: {reason}")
        return Found(limits, tuple(winners.get(name) for name in names), reason)
    return None


def user_directory() -> Path:
    """Where `halfbyte tune` keeps a table per layer."""
    return cache_dir() / "tuned"


_of_process: list[Table] = []
_reads_user = _reads_shipped = True


def take(tables: Sequence[Table], *, alone: bool = False, shipped: bool = True) -> None:
    """Let this process look into these first; `alone`: and no longer into the user's, so that ranks that took the same agree; `shipped`: into those
    of the package last."""
    global _reads_user, _reads_shipped
    _of_process[:] = [*tables, *([] if alone else _of_process)]
    _reads_user, _reads_shipped = not alone, shipped


def tables_for(target: Target) -> Iterator[tuple[str, Table]]:
    """Every table that may serve `target`, in order, with the name of its origin."""
    yield from (("this process", table) for table in _of_process if table.device.name == target.name)
    if _reads_user:
        yield from (("the user", table) for table in _read_all(user_directory()) if table.device.name == target.name)
    shipped = _read_all(SHIPPED) if _reads_shipped else []
    yield from (("the package", table) for table in shipped if table.device.name == target.name)
    others = [table for table in shipped if table.device.name != target.name and table.device.arch == target.arch]
    for table in sorted(others, key=lambda table: _unlike(table.device, target)):
        yield f"the package for {table.device.name}", table


def _unlike(one: Target, other: Target) -> float:
    """How far two GPUs are from each other in multiprocessors and bandwidth."""
    pairs = ((one.num_sms, other.num_sms), (one.read_gbps, other.read_gbps))
    return sum(abs(math.log2(a / b)) if a and b else 1.0 for a, b in pairs)


def _read_all(directory: Path) -> list[Table]:
    tables = []
    for file in sorted(directory.glob("*.json")):
        try:
            tables.append(_read(file, file.stat().st_mtime_ns))
        except (OSError, CheckpointError) as error:
            _tell(f"table passed over: {error}")
    return tables


@functools.lru_cache(maxsize=256)
def _read(file: Path, changed_ns: int) -> Table:
    return read(file)


def read(file: Path) -> Table:
    """Read one file.

    Raises:
        CheckpointError: it is not there, cannot be read, or is not a table.
    """
    return Table.from_json(read_json(file, _REMOVE, if_missing="check the name"), str(file))


def fields_of(config: Any) -> dict[str, Any]:
    """The fields of a configuration, as JSON has them."""
    return json.loads(json.dumps(asdict(config)))


def _obstacle(layer: Layer, sources: tuple[str, ...]) -> str:
    if layer.source != source_hash(sources):
        return f"measured with other kernels ({layer.source}, these are {source_hash(sources)})"
    measured, here = layer.software.get("triton", "unknown"), versions()["triton"]
    if measured.split(".")[:2] != here.split(".")[:2]:  # what decides about generated code
        return f"measured with Triton {measured}, this is {here}"
    return ""


def versions() -> dict[str, str]:
    """Of what decides about speed."""
    return {"halfbyte": __version__, "torch": torch.__version__, "triton": importlib.metadata.version("triton")}


@functools.cache
def source_hash(modules: tuple[str, ...]) -> str:
    """Of the code of these modules, without comments, docstrings and white space; the same with every Python.

    >>> len(source_hash(("halfbyte.kernels.problem",)))
    12
    """
    digest = hashlib.sha256()
    for module in modules:
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None
        digest.update(_code(Path(spec.origin).read_text()).encode())
    return digest.hexdigest()[:12]


def _code(text: str) -> str:
    lines = text.splitlines(keepends=True)
    starts = list(itertools.accumulate(map(len, lines), initial=0))
    kept, done, is_statement = [], 0, True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or (is_statement and token.type == tokenize.STRING):
            kept.append(text[done : starts[token.start[0] - 1] + token.start[1]])
            done = starts[token.end[0] - 1] + token.end[1]
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            is_statement = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return "".join("".join([*kept, text[done:]]).split())


@functools.cache
def _tell(message: str) -> None:
    """Once."""
    logger.info(message)
