"""What `bench serve` measures of an engine: its start and checks, its throughput without a server, its server under load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from halfbyte.bench.records import Column, Status
from halfbyte.checkpoint.typed_json import typed


@dataclass(frozen=True)
class Workload:
    """Prompts that are given together.

    Attributes:
        kind: "prefill": the time of the whole; "decode": the time beyond that of the same prompts with one token out; "server": requests over HTTP.
        num_prompts, tokens_in, tokens_out: how many, of how many tokens each, with how many generated each.
    """

    kind: str
    num_prompts: int
    tokens_in: int
    tokens_out: int

    @property
    def tokens(self) -> int:
        """The tokens that its time is for: those put in, or those decoded after the first.

        >>> Workload("prefill", 2, 1024, 1).tokens, Workload("decode", 2, 128, 64).tokens
        (2048, 126)
        """
        return self.num_prompts * (self.tokens_in if self.kind == "prefill" else self.tokens_out - 1)

    def __str__(self) -> str:
        return f"prefill of {self.tokens_in} tokens" if self.kind == "prefill" else f"{self.kind}, {self.tokens_in} tokens in, {self.tokens_out} out"


@dataclass(frozen=True)
class _EngineRow:
    """What rows of all three kinds have: a `records.Row` but for its columns.

    `engine` is its name and release.
    """

    model: str
    engine: str
    system: str
    status: Status
    reason: str = ""


@dataclass(frozen=True)
class StartRow(_EngineRow):
    """An engine's start, and what is checked before anything is timed; refused when a layer or a repetition is wrong.

    Attributes:
        start_s: from the launch of the engine's process until its first token; processing_s: of that, what follows the reading of the weights;
            kernels_s: of that, in which halfbyte compiles its kernels or fetches them from Triton's cache.
        weights_gib, kv_tokens: memory after loading; tokens that the cache of keys and values holds.
        layer_error: of the worst of the layers and sizes that were compared with fp32, over all tokens; layer_limit: what it may be.
        checked: which layers, at how many tokens; or why none.
        repeats: whether the same prompts gave the same tokens twice; rows of an engine that repeats nothing are kept, for none of ours may do so.
    """

    start_s: float | None = None
    processing_s: float | None = None
    kernels_s: float | None = None
    weights_gib: float | None = None
    kv_tokens: int | None = None
    layer_error: float | None = None
    layer_limit: float | None = None
    checked: str = ""
    repeats: bool | None = None

    unit: ClassVar[str] = "devices"
    size: ClassVar[int] = 1
    columns: ClassVar[tuple[Column, ...]] = (
        Column("start, s", "start_s", ".1f"),
        Column("processing, s", "processing_s", ".2f"),
        Column("of it kernels, s", "kernels_s", ".2f"),
        Column("weights, GiB", "weights_gib", ".2f"),
        Column("cache, tokens", "kv_tokens"),
        Column("layer error", "layer_error", ".1e"),
        Column("same twice", "repeated"),
    )

    @property
    def repeated(self) -> str | None:
        return None if self.repeats is None else "yes" if self.repeats else "no"

    @property
    def subject(self) -> str:
        return f"{self.model} in {self.engine}, start and checks"

    @property
    def result(self) -> str:
        error = "not checked" if self.layer_error is None else f"{self.layer_error:.1e}"
        return f"first token after {self.start_s:.1f} s, layer error {error}, same twice: {self.repeated or 'not checked'}"

    @property
    def remark(self) -> str:
        return f"checked: {self.checked}" if self.checked else ""


@dataclass(frozen=True)
class ThroughputRow(_EngineRow):
    """One workload: the shortest of `samples` runs. `spread` is (longest - shortest) / shortest; `speedup` is over the first system of the run."""

    workload: Workload = Workload("prefill", 0, 0, 0)
    seconds: float | None = None
    spread: float | None = None
    samples: int | None = None
    tokens_per_s: float | None = None
    speedup: float | None = None

    unit: ClassVar[str] = "prompts"
    remark: ClassVar[str] = ""
    columns: ClassVar[tuple[Column, ...]] = (
        Column("s", "seconds", ".3f"),
        Column("spread", "spread", ".1%"),
        Column("tokens/s", "tokens_per_s", ".1f"),
        Column("speed-up", "speedup", ".3f"),
    )

    @property
    def size(self) -> int:
        return self.workload.num_prompts

    @property
    def subject(self) -> str:
        return f"{self.model} in {self.engine}, {self.workload}"

    @property
    def result(self) -> str:
        against = "" if self.speedup is None else f", {self.speedup:.3f}x"
        return f"{self.seconds:.3f} s, {self.tokens_per_s:.1f} tokens/s{against}"


@dataclass(frozen=True)
class ServerRow(_EngineRow):
    """Requests to the engine's server. Names and units are those of `vllm bench serve`.

    Attributes:
        workload: of kind "server".
        concurrency: requests under way together.
        duration: seconds of all requests; completed: those that ended well.
        request_throughput, output_throughput: requests and generated tokens per second.
        request_goodput: requests per second that kept to the limits of --goodput; None without limits.
        mean_, median_, p99_ of ttft_ms: time to the first token; tpot_ms: time per token after it.
    """

    workload: Workload = Workload("server", 0, 0, 0)
    concurrency: int = 1
    duration: float | None = None
    completed: int | None = None
    request_throughput: float | None = None
    output_throughput: float | None = None
    request_goodput: float | None = None
    mean_ttft_ms: float | None = None
    median_ttft_ms: float | None = None
    p99_ttft_ms: float | None = None
    mean_tpot_ms: float | None = None
    median_tpot_ms: float | None = None
    p99_tpot_ms: float | None = None

    unit: ClassVar[str] = "requests"
    remark: ClassVar[str] = ""
    columns: ClassVar[tuple[Column, ...]] = (
        Column("s", "duration", ".2f"),
        Column("tokens/s", "output_throughput", ".1f"),
        Column("TTFT, ms", "median_ttft_ms", ".1f"),
        Column("p99", "p99_ttft_ms", ".1f"),
        Column("TPOT, ms", "median_tpot_ms", ".2f"),
        Column("p99", "p99_tpot_ms", ".2f"),
        Column("goodput/s", "request_goodput", ".2f"),
    )

    @property
    def size(self) -> int:
        return self.workload.num_prompts

    @property
    def subject(self) -> str:
        return f"{self.model} in {self.engine}, {self.workload}, {self.concurrency} together"

    @property
    def result(self) -> str:
        return f"{self.output_throughput:.1f} tokens/s, TTFT {self.median_ttft_ms:.1f} ms, TPOT {self.median_tpot_ms:.2f} ms"


def row_of(fields: object) -> StartRow | ThroughputRow | ServerRow:
    """The row that a results file kept. Raises ValueError where it is something else."""
    names = fields if isinstance(fields, dict) else ()
    kind: type[StartRow | ThroughputRow | ServerRow] = StartRow
    if "workload" in names:
        kind = ServerRow if "concurrency" in names else ThroughputRow
    return typed(kind, fields, "row")
