"""`halfbyte eval`: measure a model on questions and text. Started by torchrun, ranks share the questions, the text and the packed experts:

torchrun --nproc-per-node 2 -m halfbyte eval demo-output/nvfp4 --text demo
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

    from halfbyte.eval.evaluate import EvalReport
    from halfbyte.eval.ranks import Ranks
    from halfbyte.formats.activation_formats import ActivationFormat

EXAMPLE = "halfbyte eval demo-output/nvfp4 --questions demo --text demo --reference demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from halfbyte.cli.terminal import add_dtype, add_threads, percent, positive_int
    from halfbyte.formats.activation_formats import ACTIVATION_FORMATS

    parser.add_argument("model", metavar="MODEL", help="a directory, a Hub name org/name, or demo (the embedded model)")
    parser.add_argument("--questions", metavar="FILE", help="JSONL of question and answer, optionally kind and solution; demo: the embedded file")
    parser.add_argument("--text", metavar="FILE", help=".txt or .xz to measure perplexity on; demo: the embedded file")
    parser.add_argument("--reference", metavar="MODEL", help="also report KL(reference || model) on the text")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="at most N questions of each kind")
    parser.add_argument("--windows", type=positive_int, metavar="N", default=120, help="at most N windows of 512 tokens of the text")
    parser.add_argument("--batch", type=positive_int, metavar="N", default=64, help="questions generated together")
    parser.add_argument("--max-new-tokens", type=positive_int, metavar="N", default=256, help="longest answer")
    parser.add_argument(
        "--activations",
        choices=(*ACTIVATION_FORMATS, "auto"),
        default="bf16",
        help="what packed experts compute on; auto: the fastest on Hopper whose perplexity stays within --budget of bf16",
    )
    parser.add_argument("--budget", type=percent, metavar="PERCENT", default=0.5, help="auto: how much perplexity may rise (default: 0.5)")
    parser.add_argument("--device", help="torch device (default: the GPU where there is one)")
    add_dtype(parser)
    add_threads(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Measure, and print a report; on several ranks the first prints.

    Raises:
        InputError, CheckpointError, UnsupportedError: files or models that cannot be used; layers with different numbers of experts on several ranks.
    """
    from halfbyte.cli.ranks import is_torchrun, process_group
    from halfbyte.cli.terminal import usable_device
    from halfbyte.eval.ranks import ALONE, Ranks

    device = usable_device(args.device)
    if not is_torchrun():
        return _run(args, device, ALONE)
    with process_group(device) as own_device:
        return _run(args, own_device, Ranks.of_group())


def _load(model: str, device: torch.device, activations: str, dtype: str, ranks: Ranks) -> tuple[Any, Any]:
    """A model and its tokenizer; with several ranks each keeps its own experts of packed layers."""
    from halfbyte.cli.terminal import load_model

    if ranks.world == 1:
        return load_model(model, device, activations, dtype=dtype)
    import torch

    from halfbyte.integrations.transformers import set_parallel
    from halfbyte.integrations.transformers.parallel import num_experts
    from halfbyte.moe.parallel import ExpertParallel

    cpu = torch.device("cpu")  # whole, which a GPU may have no room for
    loaded, tokenizer = load_model(model, cpu, activations, dtype=dtype, shown=ranks.rank == 0)
    experts = num_experts(loaded)
    if experts is not None:
        set_parallel(loaded, ExpertParallel(None, experts))
    return loaded.to(device), tokenizer


def _run(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> int:
    from halfbyte.checkpoint.source import DEMO_MODEL, demo_model_dir
    from halfbyte.cli.progress import Bar
    from halfbyte.cli.terminal import set_threads
    from halfbyte.device import model_dtype
    from halfbyte.env import expanded
    from halfbyte.eval.data import load_documents, load_questions
    from halfbyte.eval.evaluate import evaluate
    from halfbyte.eval.metrics import text_passages

    def file(given: str, embedded: str) -> Path:
        return demo_model_dir() / embedded if given == DEMO_MODEL else expanded(given)

    set_threads(args.threads)
    named_questions, named_text = _measured_on(args)
    # Files first: a wrong name should not cost the loading of a model.
    questions = load_questions(file(named_questions, "eval.jsonl"), limit=args.limit) if named_questions else []
    documents = load_documents(file(named_text, "heldout.txt.xz")) if named_text else []
    is_auto = args.activations == "auto"
    dtype = model_dtype(device, args.dtype)
    model, tokenizer = _load(args.model, device, "bf16" if is_auto else args.activations, dtype, ranks)
    reference = _load(args.reference, device, "bf16", dtype, ranks)[0] if args.reference else None
    passages = text_passages(tokenizer, documents, limit=args.windows) if documents else []
    activations, tried = _choose(args.budget / 100, model, tokenizer, passages, ranks) if is_auto else (args.activations, {})
    with Bar("evaluating", unit="tokens", shown=ranks.rank == 0) as bar:
        report = evaluate(
            model,
            tokenizer,
            questions=questions,
            passages=passages,
            reference=reference,
            batch=args.batch,
            max_new_tokens=args.max_new_tokens,
            progress=bar.reach,
            ranks=ranks,
        )
    if ranks.rank == 0:
        _print(args, activations, tried, report)
    return 0


def _measured_on(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """--questions and --text; where neither is given, the embedded model is measured on its own.

    Raises argparse.ArgumentError when arguments contradict each other, each being right alone.
    """
    from halfbyte.checkpoint.source import DEMO_MODEL

    if args.model == DEMO_MODEL and args.questions is None and args.text is None:
        return DEMO_MODEL, DEMO_MODEL
    if args.questions is None and args.text is None:
        raise argparse.ArgumentError(None, "nothing to measure on: give --questions FILE or --text FILE, or both")
    if args.reference is not None and args.text is None:
        raise argparse.ArgumentError(None, "--reference is compared on a text: give --text FILE")
    if args.activations == "auto" and args.text is None:
        raise argparse.ArgumentError(None, "--activations auto chooses by the perplexity of a text: give --text FILE")
    return args.questions, args.text


def _choose(budget: float, model: Any, tokenizer: Any, passages: list[Any], ranks: Ranks) -> tuple[ActivationFormat, dict[ActivationFormat, float]]:
    """The activations that --activations auto takes, which `model` then computes on, and the perplexity with each that was tried."""
    from halfbyte.cli.progress import Bar
    from halfbyte.eval.activations import FASTEST_FIRST, choose_activations
    from halfbyte.eval.evaluate import evaluate
    from halfbyte.integrations.transformers import set_activations

    rounds = itertools.count()
    with Bar("choosing activations", unit="tokens", shown=ranks.rank == 0) as bar:

        def perplexity_of(kind: ActivationFormat) -> float:
            before = next(rounds)
            set_activations(model, kind)

            def progress(done: int, total: int) -> None:
                bar.reach(before * total + done, len(FASTEST_FIRST) * total)

            return cast(float, evaluate(model, tokenizer, passages=passages, progress=progress, ranks=ranks).perplexity)

        chosen, tried = choose_activations(perplexity_of, budget)
    set_activations(model, chosen)
    return chosen, tried


def _print(args: argparse.Namespace, activations: str, tried: dict[ActivationFormat, float], report: EvalReport) -> None:
    from halfbyte.cli.documents import print_document

    if args.json:
        choice = {"budget_percent": args.budget, "perplexities": tried} if tried else {}
        print_document({"model": args.model, "activations": activations, **choice, "reference": args.reference, **report.as_dict()})
        return
    for kind, perplexity in tried.items():
        rise = perplexity / tried["bf16"] - 1
        print(f"{kind} activations: perplexity {perplexity:.3f} ({rise:+.2%}){', chosen' if kind == activations else ''}")
    print(report)
