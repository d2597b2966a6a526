"""`run_demo`: quantise the embedded model to both FP4 formats, let the NVFP4 one solve problems, and measure all three."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from halfbyte import __version__
from halfbyte.checkpoint.source import demo_model_dir
from halfbyte.convert.quantize_model import QuantizeOptions, quantize_model
from halfbyte.demo.plot import plot_quality
from halfbyte.device import model_dtype
from halfbyte.errors import CheckpointError, InputError
from halfbyte.eval.data import Question, is_correct, load_documents, load_questions
from halfbyte.eval.evaluate import EvalReport, evaluate
from halfbyte.eval.generation import complete, prompt_ids
from halfbyte.eval.metrics import Passage, ReadOnce, answer_passage, score_passages, text_passages

NOTE = "These numbers compare formats on one small model. They are no measure of GSM8K ability: its questions come from 11 story families."
QUESTIONS_A_KIND = 10  # and WINDOWS of 512 tokens of text: what two CPU cores measure three times in half a minute to a minute
WINDOWS = 16
RESULT = "demo.json"  # also marks a directory as ours, to be overwritten by the next demo

ProgressBar = Callable[[str], AbstractContextManager[Any]]  # from a label to something with `reach(done, total)`, in tokens


@dataclass(frozen=True)
class Variant:
    """One row of the result: where the model lies, its safetensors bytes, the bytes of its experts, and its quality."""

    name: str
    directory: Path
    disk_bytes: int
    expert_bytes: int
    quality: EvalReport | None = None


def run_demo(
    output: Path, *, full: bool = False, dtype: str = "auto", say: Callable[[str], None] = print, stream: bool = True, progress_bar: ProgressBar
) -> dict[str, Any]:
    """Write OUTPUT/nvfp4, OUTPUT/mxfp4 (checkpoints), OUTPUT/demo.png and OUTPUT/demo.json; return what demo.json holds.

    Args:
        output: a new or empty directory, or that of an earlier demo, whose results are replaced.
        full: measure on all questions and all text.
        dtype: what all but packed experts is computed in; "auto" as of `model_dtype`.
        say: takes each line for the reader.
        stream: show the worked problems token by token on stdout.

    Raises:
        InputError: `output` holds something else.
        CheckpointError: `output` cannot be written.
    """
    seconds: dict[str, float] = {}
    _claim(output)
    say("Quantising the embedded model (Qwen3-MoE, 11 M parameters, 16 experts, bf16) to NVFP4 and MXFP4 ...")
    with _timed(seconds, "quantize"), _beside(import_module, "halfbyte.integrations.transformers"):  # which takes as long
        variants = _quantize(output)
    models = _load(variants, model_dtype(torch.device("cpu"), dtype))
    reference, tokenizer = models["bf16"]
    passages = text_passages(tokenizer, load_documents(demo_model_dir() / "heldout.txt.xz"), limit=None if full else WINDOWS)

    problems = _problems(load_questions(demo_model_dir() / "eval.jsonl"))
    questions = load_questions(demo_model_dir() / "eval.jsonl", limit=None if full else QUESTIONS_A_KIND)
    say("\nThree held-out problems, solved by the NVFP4 model:")
    ahead = [] if full else [passages, [answer_passage(tokenizer, question) for question in questions]]  # of all, most would be read again
    with _timed(seconds, "solve"), _threads_shared(len(models)), _beside(_read, reference, ahead):
        solved = [_solve(*models["NVFP4"], problem, say, stream) for problem in problems]

    say(f"Measuring on {len(questions)} questions and {sum(passage.scored for passage in passages)} tokens of text ...")
    with _timed(seconds, "measure"):
        reports = _measure(models, questions, passages, progress_bar)
    measured = [replace(variant, quality=reports[variant.name]) for variant in variants]
    say(f"\n{table(measured)}\n\nComputed in {reports['bf16'].dtype}.\n{NOTE}")

    with _timed(seconds, "plot"):
        plot_quality([(v.name, v.disk_bytes, v.quality) for v in measured if v.quality], output / "demo.png")
    result = {
        "halfbyte": __version__,
        "note": NOTE,
        "full": full,
        "variants": [asdict(variant) | {"directory": str(variant.directory)} for variant in measured],
        "solved": solved,
        "seconds": seconds,
        "plot": str(output / "demo.png"),
    }
    (output / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def table(variants: list[Variant]) -> str:
    """The variants side by side; `KL` is from bf16, in nats per token."""
    lines = [f"{'experts':8} {'on disk':>10} {'experts':>10} {'exact match':>12} {'answer NLL':>11} {'perplexity':>11} {'KL':>8}"]
    for variant in variants:
        quality = variant.quality
        if quality is None or quality.exact_match is None:
            continue
        kl = "-" if quality.kl is None else f"{quality.kl:.4f}"
        lines.append(
            f"{variant.name:8} {variant.disk_bytes / 1e6:7.2f} MB {variant.expert_bytes / 1e6:7.2f} MB"
            f" {quality.exact_match:12.1%} {quality.answer_nll:11.4f} {quality.perplexity:11.3f} {kl:>8}"
        )
    return "\n".join(lines)


def _claim(output: Path) -> None:
    """Make `output` ours, and empty of an earlier demo's checkpoints."""
    if output.exists() and not (output / RESULT).exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError("exists and holds something else than an earlier demo", where=str(output), next_step="choose another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / RESULT).write_text("{}\n", encoding="utf-8")
        for name in ("nvfp4", "mxfp4"):
            if (output / name).exists():
                shutil.rmtree(output / name)
    except OSError as error:
        raise CheckpointError(f"cannot write here: {error}", where=str(output), next_step="choose another --output") from error


def _quantize(output: Path) -> list[Variant]:
    source = demo_model_dir()
    variants = []
    for options in (QuantizeOptions(format="nvfp4"), QuantizeOptions(format="mxfp4")):
        name, directory = options.format.upper(), output / options.format
        report = quantize_model(source, directory, options)
        variants.append(Variant(name, directory, _weight_bytes(directory), report.quantized_bytes))
    return [Variant("bf16", source, _weight_bytes(source), report.quantized_source_bytes), *variants]


def _load(variants: list[Variant], dtype: str) -> dict[str, tuple[Any, Any]]:
    """Model and tokenizer of each; what the reference has read is kept, for itself and for those that are compared with it."""
    from halfbyte.integrations.transformers import load  # imported here, as it takes seconds

    models = {variant.name: load(variant.directory, dtype=dtype) for variant in variants}
    model, tokenizer = models["bf16"]
    return models | {"bf16": (ReadOnce(model, batches=8), tokenizer)}


def _read(model: Any, texts: list[list[Passage]]) -> None:
    for passages in texts:
        score_passages(model, passages)


def _weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _problems(questions: list[Question]) -> list[Question]:
    """The last of each kind that is worked out in words: no choice of ours, and not among those measured by default."""
    last = {question.kind: question for question in questions}
    return [last["story"], last["long"], last["legs"]]


def _solve(model: Any, tokenizer: Any, question: Question, say: Callable[[str], None], stream: bool) -> dict[str, Any]:
    say(f"\nQ: {question.text.strip()}")
    ids = complete(model, tokenizer, prompt_ids(tokenizer, question.text), stream=stream)
    completion = tokenizer.decode(ids, skip_special_tokens=True)
    correct = is_correct(question, completion)
    say(f"   right answer: {question.answer}  ({'correct' if correct else 'WRONG'})")
    return {"question": question.text, "completion": completion, "answer": str(question.answer), "correct": correct}


def _measure(
    models: dict[str, tuple[Any, Any]], questions: list[Question], passages: list[Passage], progress_bar: ProgressBar
) -> dict[str, EvalReport]:
    """The quality of each model, all measured at the same time where torch has several threads: a step of few rows keeps no more than one busy."""
    reference, at_once = models["bf16"][0], 1 if torch.get_num_threads() == 1 else len(models)
    interrupted = threading.Event()

    def measure(name: str) -> EvalReport:
        model, tokenizer = models[name]
        with progress_bar(f"measuring {name}") as bar:

            def progress(done: int, total: int) -> None:
                if interrupted.is_set():
                    raise CancelledError
                bar.reach(done, total)

            against = None if model is reference else reference
            return evaluate(model, tokenizer, questions=questions, passages=passages, reference=against, batch=128, progress=progress)

    with _threads_shared(at_once), ThreadPoolExecutor(at_once, "halfbyte-measure") as pool:
        running = {name: pool.submit(measure, name) for name in models}
        try:
            for future in as_completed(running.values()):
                future.result()
        except BaseException:  # Ctrl-C, too: the others end with their next step
            interrupted.set()
            raise
    return {name: future.result() for name, future in running.items()}


@contextmanager
def _threads_shared(parts: int) -> Iterator[None]:
    """Within, torch computes with its threads divided by `parts`, in this thread and in those that begin."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, num_threads // parts))
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def _beside(work: Callable[..., object], *arguments: Any) -> Iterator[None]:
    """Within, another thread does this work. Leaving waits for it, and raises what it raised."""
    with ThreadPoolExecutor(1, "halfbyte-beside") as pool:
        future = pool.submit(work, *arguments)
        yield
    future.result()


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)
