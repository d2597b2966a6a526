"""Two checkouts of halfbyte beside one another on one GPU: is the MoE layer slower anywhere, and has a bit of its result changed?

    git worktree add /tmp/old HEAD~10
    python benchmarks/compare_checkouts.py /tmp/old .                                       # all shapes
    python benchmarks/compare_checkouts.py /tmp/old . --shapes dsr1 --tokens 1,64 --activations fp8 --out checkouts.jsonl
    python benchmarks/compare_checkouts.py /tmp/old . --device cpu --shapes 64,32,4,2       # anywhere: H,I,E,k instead of names

One process for each checkout (checkout_worker.py) holds the layer, drawn there from a seed: the same bytes in both. A sample is some replays of a
CUDA graph of several calls, each with a routing of its own; on a CPU it is the calls themselves. Samples alternate as old, new, new, old, so that a
drift of the clocks falls on both alike. This process imports neither checkout, nor torch.

Bits are compared as SHA-256 of the results of all calls. "old varies", "new varies": what was captured is not what was computed before.
Exit code 1: bits differ, or only one of the two can run a layer. 3: neither could run any.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SAMPLE_US = 4000.0  # what a sample lasts at least
FORMATS = ("nvfp4", "mxfp4")
ACTIVATIONS = ("bf16", "fp8", "mxfp8", "nvfp4")


@dataclass(frozen=True)
class Shape:
    """One layer, in the formats that are worth a look; `gpt_oss`: it has biases and the clamped SwiGLU."""

    name: str
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    formats: tuple[str, ...] = FORMATS
    gpt_oss: bool = False


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b", 2048, 768, 128, 8),
        Shape("qwen3-235b", 4096, 1536, 128, 8),
        Shape("dsr1", 7168, 2048, 256, 8),
        Shape("mixtral", 4096, 14336, 8, 2, ("nvfp4",)),
        Shape("gptoss", 2880, 2880, 128, 4, ("mxfp4",), gpt_oss=True),
    )
}


class Worker:
    """A process that serves one checkout."""

    def __init__(self, checkout: Path, device: str):
        self.checkout = checkout
        source = (checkout / "src").resolve()
        path = os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, str(Path(__file__).with_name("checkout_worker.py")), device]
        self._process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()  # closes its input, which ends it

    def ask(self, request: str, **arguments: Any) -> None:
        """Send a request. The answer is to be fetched before the next one."""
        assert self._process.stdin is not None
        try:
            print(json.dumps({"do": request, **arguments}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._give_up()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._give_up()
        return json.loads(line)

    def _give_up(self) -> None:
        raise SystemExit(f"the process of {self.checkout} ended, with its error above (exit code {self._process.wait()})")


@dataclass(frozen=True)
class Comparison:
    """One row.

    Attributes:
        bits: "equal", "differ", "old varies" or "new varies"; or who can run it, "only old", "only new" or "neither", and `reason` says why.
        old_samples_us, new_samples_us: per call.
    """

    shape: str
    format: str
    activations: str
    num_tokens: int
    bits: str
    reason: str = ""
    old_samples_us: tuple[float, ...] = ()
    new_samples_us: tuple[float, ...] = ()

    @property
    def old_us(self) -> float:
        return statistics.median(self.old_samples_us)

    @property
    def new_us(self) -> float:
        return statistics.median(self.new_samples_us)

    @property
    def ratio(self) -> float:
        """new / old: above 1 is slower."""
        return self.new_us / self.old_us

    def __str__(self) -> str:
        numbers = [f"{self.old_us:.1f}", f"{self.new_us:.1f}", f"{self.ratio:.3f}"] if self.old_samples_us else ["-"] * 3
        return f"| {' | '.join([self.shape, self.format, self.activations, str(self.num_tokens), *numbers, self.bits])} |"


Layer = tuple[Shape, str, str]  # with its format and its activations

HEAD = "| shape | format | activations | tokens | old us | new us | ratio | bits |\n|---|---|---|---|---|---|---|---|"


def both(old: Worker, new: Worker, request: str, **arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answers of both; they work at the same time."""
    old.ask(request, **arguments)
    new.ask(request, **arguments)
    return old.answer(), new.answer()


def compare(old: Worker, new: Worker, layer: Layer, tokens: Sequence[int], rounds: int) -> Iterator[Comparison]:
    """Every number of tokens on one layer."""
    shape, format, activations = layer
    built = both(old, new, "build", shape=asdict(shape), format=format, activations=activations)
    for num_tokens in tokens:
        about = (shape.name, format, activations, num_tokens)
        answers = built if any(built) else both(old, new, "draw", num_tokens=num_tokens)
        obstacles = [answer.get("obstacle", "") for answer in answers]
        if any(obstacles):
            who = "neither" if all(obstacles) else "only new" if obstacles[0] else "only old"
            yield Comparison(*about, who, obstacles[0] or obstacles[1])
        else:
            yield Comparison(*about, verdict(*(answer["digests"] for answer in answers)), "", *time_both(old, new, rounds))


def verdict(old: Sequence[str], new: Sequence[str]) -> str:
    """What two digests of each say.

    >>> verdict(["a", "a"], ["a", "a"]), verdict(["a", "a"], ["b", "b"]), verdict(["a", "b"], ["a", "a"]), verdict(["a", "a"], ["a", "b"])
    ('equal', 'differ', 'old varies', 'new varies')
    """
    for name, digests in (("old", old), ("new", new)):
        if len(set(digests)) > 1:
            return f"{name} varies"
    return "equal" if old[0] == new[0] else "differ"


def time_both(old: Worker, new: Worker, rounds: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Samples of each, one process at a time: in every round old, new, new, old."""

    def sample(worker: Worker, repeats: int) -> dict[str, Any]:
        worker.ask("sample", repeats=repeats)
        return worker.answer()

    longest_us = max(answer["us"] * answer["calls"] for answer in (sample(old, 1), sample(new, 1)))
    repeats = max(1, math.ceil(SAMPLE_US / longest_us))
    samples: dict[Worker, list[float]] = {old: [], new: []}
    for _ in range(rounds):
        for worker in (old, new, new, old):
            samples[worker].append(sample(worker, repeats)["us"])
    return tuple(samples[old]), tuple(samples[new])


def environment(old: Worker, new: Worker, argv: Sequence[str]) -> dict[str, Any]:
    """What is compared, where, and how. Folders of this machine are not in it.

    Raises:
        SystemExit: a process runs another halfbyte than that of its checkout.
    """
    answers = both(old, new, "describe")
    for worker, answer in zip((old, new), answers, strict=True):
        if not Path(answer["file"]).resolve().is_relative_to((worker.checkout / "src").resolve()):
            raise SystemExit(f"{worker.checkout} was not imported, but {answer['file']}: something puts it before PYTHONPATH")
    options = [part for part in argv if part not in (str(old.checkout), str(new.checkout))]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": answers[0]["device"],
        "torch": answers[0]["torch"],
        "command": shlex.join(["python", "benchmarks/compare_checkouts.py", "OLD", "NEW", *options]),
        "old": f"{answers[0]['version']} ({commit(old.checkout)})",
        "new": f"{answers[1]['version']} ({commit(new.checkout)})",
    }


def commit(checkout: Path) -> str:
    """The commit of a checkout, with "-dirty" when it differs."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True).stdout.strip()

    if Path(git("rev-parse", "--show-toplevel") or os.devnull).resolve() != checkout.resolve():
        return "commit unknown"  # a copy, perhaps inside another checkout
    return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")


def summary(rows: Sequence[Comparison]) -> str:
    """What could not be compared and why, the median and the worst ratio, how many rows have different bits."""
    lines = list(dict.fromkeys(f"{row.shape} {row.format} {row.activations}: {row.bits} can run it: {row.reason}" for row in rows if row.reason))
    timed = [row for row in rows if row.old_samples_us]
    if timed:
        worst = max(timed, key=lambda row: row.ratio)
        where = f"{worst.shape} {worst.format} {worst.activations}, T = {worst.num_tokens}"
        lines.append(f"median ratio {statistics.median(row.ratio for row in timed):.3f}, worst {worst.ratio:.3f} ({where})")
    return "\n".join([*lines, f"{sum(row.bits != 'equal' for row in timed)} of {len(timed)} rows with different bits"])


def exit_code(rows: Sequence[Comparison]) -> int:
    """1 when anything differs, 3 when nothing could be compared, 0 otherwise."""
    found = {row.bits for row in rows} - {"neither"}
    return 1 if found - {"equal"} else 0 if found else 3


def shapes_of(text: str) -> list[Shape]:
    """An argparse type: names of `SHAPES`, or four numbers.

    >>> shapes_of("64,32,4,2")[0].num_experts, [shape.name for shape in shapes_of("dsr1,gptoss")]
    (4, ['dsr1', 'gptoss'])
    """
    if re.fullmatch(r"\d+(,\d+){3}", text):
        return [Shape(text, *map(int, text.split(",")))]
    unknown = [name for name in text.split(",") if name not in SHAPES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown shape {unknown[0]!r}; give H,I,E,k or names of {', '.join(SHAPES)}")
    return [SHAPES[name] for name in text.split(",")]


def some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: some of these names, between commas."""

    def parse(text: str) -> list[str]:
        unknown = [name for name in text.split(",") if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {unknown[0]!r}; choose from {', '.join(names)}")
        return text.split(",")

    return parse


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def counts(text: str) -> list[int]:
    """An argparse type: numbers between commas."""
    return [positive(part) for part in text.split(",")]


def checkout_of(text: str) -> Path:
    """An argparse type: a folder with src/halfbyte."""
    if not (Path(text) / "src/halfbyte/__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no checkout of halfbyte: it has no src/halfbyte")
    return Path(text)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=checkout_of, metavar="OLD")
    parser.add_argument("new", type=checkout_of, metavar="NEW")
    parser.add_argument("--shapes", type=shapes_of, default=list(SHAPES.values()), metavar="NAME,...", help=f"of {', '.join(SHAPES)}; or H,I,E,k")
    parser.add_argument("--formats", type=some_of(FORMATS), default=list(FORMATS), metavar="NAME,...")
    parser.add_argument("--activations", type=some_of(ACTIVATIONS), default=["bf16", "fp8"], metavar="NAME,...")
    parser.add_argument("--tokens", type=counts, default=[1, 16, 64, 256, 1024, 4096], metavar="T,...")
    parser.add_argument("--rounds", type=positive, default=6, metavar="N", help="of four samples, two for each checkout")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append every row to this file, as soon as it is measured")
    args = parser.parse_args(argv)
    layers = [each for each in itertools.product(args.shapes, args.formats, args.activations) if each[1] in each[0].formats]
    rows = []
    with Worker(args.old, args.device) as old, Worker(args.new, args.device) as new:
        described = environment(old, new, argv)
        print(f"{described['device']}, torch {described['torch']}; halfbyte old {described['old']}, new {described['new']}\n\n{HEAD}", flush=True)
        for layer in layers:
            for row in compare(old, new, layer, args.tokens, args.rounds):
                print(row, flush=True)
                rows.append(row)
                if args.out:
                    with args.out.open("a") as stream:
                        print(json.dumps({"benchmark": "checkouts", "environment": described, "row": asdict(row)}), file=stream)
    print(f"\n{summary(rows)}")
    return exit_code(rows)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
