"""What halfbyte does with a damaged model: each command ends in time, within its memory, with a result or with one line that says what is wrong.

What is accepted means what it meant before, or nothing could have told (`making.LEGAL`).
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import resource
import signal
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import torch
from fuzz.making import Damage
from fuzz.sound import TEXT, Files, sound, write

import halfbyte as hb
from halfbyte.checkpoint import Checkpoint
from halfbyte.cli.main import main
from halfbyte.errors import HalfbyteError

CPU_SECONDS = 20  # of one command; the slowest, `eval`, takes less than one
WAITING_SECONDS = 600  # by the clock, for what waits and does nothing; a busy machine must not meet it
MEMORY = 1 << 31  # bytes of address space that one command may add
UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


class Hang(BaseException):
    """No `except Exception` may catch it."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Of time and memory, for what runs inside."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    timers = {signal.ITIMER_PROF: (signal.SIGPROF, CPU_SECONDS), signal.ITIMER_REAL: (signal.SIGALRM, WAITING_SECONDS)}
    handlers = {number: signal.signal(number, stop) for number, _ in timers.values()}
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
        for number, handler in handlers.items():
            signal.signal(number, handler)


class WrongError(Exception):
    """What was done to the model was not answered as it should be."""


def command(*arguments: str) -> tuple[int, str]:
    """Exit code of a command, and its output: that of stdout where it succeeds, else the one line of its error, or the report of `inspect`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = guarded(arguments[0], lambda: main(arguments))
    errors = [line for line in err.getvalue().splitlines() if line.startswith("halfbyte")]
    if code not in (0, 1, 2, 3):
        raise WrongError(f"{arguments[0]} ends with {code}")
    if UNPRINTABLE.search(out.getvalue() + err.getvalue()):
        raise WrongError(f"{arguments[0]} prints control characters")
    if code and not errors and arguments[0] != "inspect":
        raise WrongError(f"{arguments[0]} ends with {code} and says nothing: {err.getvalue()[-300:]!r}")
    if len(errors) > 1 or (errors and len(errors[0]) > 5_000):
        raise WrongError(f"{arguments[0]} says it in {len(errors)} lines, {len(errors[0])} letters")
    if "--json" in arguments and not (errors and out.getvalue() == ""):
        json.loads(out.getvalue(), parse_constant=_no_number)
    return code, errors[0] if errors else out.getvalue()


def _no_number(constant: str) -> None:
    raise WrongError(f"{constant} in a JSON document")


def guarded(what: str, function: Any) -> Any:
    """Call a function under limits; whatever is no error of halfbyte's is wrong."""
    try:
        with limits():
            return function()
    except Hang as error:
        raise WrongError(f"{what}: a hang, in {_place(error)}") from None
    except MemoryError as error:
        raise WrongError(f"{what}: out of memory, in {_place(error)}") from None
    except SystemExit as error:
        return error.code
    except HalfbyteError:
        raise
    except BaseException as error:
        raise WrongError(f"{what}: {type(error).__name__} in {_place(error)}: {str(error)[:200]}") from error


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "src/halfbyte" in frame.filename]
    return f"{frames[-1].filename.rpartition('src/')[2]}:{frames[-1].lineno}" if frames else "code of others"


def meaning(path: Path) -> dict[str, Any]:
    """Everything that the library reads of a model."""
    checkpoint = Checkpoint.open(path)
    moe = checkpoint.moe
    read: dict[str, Any] = {"moe": asdict(moe)}
    for layer in moe.expert_layers:
        w = hb.load_experts(checkpoint, layer)
        hb.prepare(w, "canonical")
        read |= {f"{layer} {name}": tensor for name, tensor in w.dequantize().tensors.items()}
        if moe.routing is not None:  # which only a family that halfbyte knows has
            router = hb.load_router(checkpoint, layer)
            read |= {f"{layer} router {name}": getattr(router, name) for name in ("weight", "logit_bias", "correction_bias", "token_experts")}
    return read


def differences(read: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.shape == b.shape and torch.equal(a.float().nan_to_num(1e9), b.float().nan_to_num(1e9))
        return bool(a == b)

    return sorted({*read, *expected} - {name for name in read.keys() & expected.keys() if same(read[name], expected[name])})


@cache
def expected_of(layout: str) -> dict[str, Any]:
    """What a sound model means, what its quantised form means, and its perplexity."""
    with TemporaryDirectory() as folder:
        path = write(sound(layout), Path(folder) / "model")
        code, _ = command("quantize", str(path), f"{folder}/out")
        quantised = meaning(Path(folder, "out")) if code == 0 else None
        return {"read": meaning(path), "quantised": quantised, "perplexity": perplexity(path)[1]}


def perplexity(path: Path) -> tuple[int, Any]:
    """Exit code of `eval`, and the perplexity, or the error."""
    text = path.parent / "text.txt"
    text.write_text(TEXT)
    code, printed = command("eval", str(path), "--text", str(text), "--windows", "1", "--device", "cpu", "--json")
    return code, json.loads(printed)["perplexity"] if code == 0 else printed


def judge(layout: str, files: Files, done: Damage, folder: Path, rng: random.Random) -> str:
    """ "told", "harmless" or the key of `making.LEGAL` that says why another result is accepted.

    Raises:
        WrongError: anything else.
    """
    path = write(files, folder / "model")
    expected = expected_of(layout)
    torch.set_num_threads(1)
    told, found = "", {}
    try:
        found = guarded("load", lambda: meaning(path))
    except HalfbyteError as error:
        told = str(error)
    changed = [] if told else differences(found, expected["read"])
    if changed and not done.legal:
        raise WrongError(f"load accepts other {changed[:4]}")
    code, report = command("inspect", str(path), *rng.choice(((), ("--json",), ("--tensors",))))
    if bool(code) != bool(told) and "activation unknown" not in told:  # of which inspect warns
        raise WrongError(f"inspect ends with {code}, load says {told!r}: {report[-300:]}")
    code, line = command("prepare", str(path), "--device", "cpu", "--cache-dir", str(folder / "cache"))
    if code and not told:
        raise WrongError(f"prepare ends with {code}, load says nothing: {line}")
    if told and not code and "router" not in told:
        raise WrongError(f"prepare accepts what load refuses: {told}")
    verdict = done.legal if changed else "told" if told else "harmless"
    if expected["quantised"] is not None or rng.random() < 0.1:
        verdict = _judge_quantize(path, folder, expected["quantised"], done, bool(told)) or verdict
    if rng.random() < 0.15:
        verdict = _judge_eval(path, expected["perplexity"], done) or verdict
    return verdict


def _judge_quantize(path: Path, folder: Path, expected: dict[str, Any] | None, done: Damage, refused: bool) -> str:
    code, line = command("quantize", str(path), str(folder / "out"))
    if code:
        left = list((folder / "out").rglob("*")) if (folder / "out").exists() else []
        if left and not (folder / "out" / ".halfbyte-job.json").exists():
            raise WrongError(f"quantize fails and leaves {left}: {line}")
        return ""
    if refused and not done.legal and not done.text.startswith("odd_scale"):
        raise WrongError("quantize accepts what load refuses")
    changed = differences(guarded("load of what quantize wrote", lambda: meaning(folder / "out")), expected or {})
    if changed and not done.legal:
        raise WrongError(f"quantize accepts other {changed[:4]}")
    return done.legal if changed else ""


def _judge_eval(path: Path, expected: float, done: Damage) -> str:
    code, value = perplexity(path)
    if code or value == expected:
        return ""
    if not done.legal and not done.text.startswith("odd_configuration"):
        raise WrongError(f"eval accepts it: perplexity {value}, {expected} before")
    return done.legal
