"""`halfbyte eval`: measure a model on questions and text."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from halfbyte.formats.activation_formats import ActivationFormat

EXAMPLE = "halfbyte eval demo-output/nvfp4 --questions demo --text demo --reference demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from halfbyte.cli.terminal import add_threads, percent, positive_int

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
        choices=("bf16", "fp8", "mxfp8", "nvfp4", "auto"),
        default="bf16",
        help="what packed experts compute on; auto: the fastest on Hopper whose perplexity stays within --budget of bf16",
    )
    parser.add_argument("--budget", type=percent, metavar="PERCENT", default=0.5, help="auto: how much perplexity may rise (default: 0.5)")
    parser.add_argument("--device", help="torch device (default: the GPU where there is one)")
    add_threads(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from halfbyte.checkpoint.source import DEMO_MODEL, demo_model_dir
    from halfbyte.cli.progress import Bar
    from halfbyte.cli.terminal import load_model, set_threads, usable_device
    from halfbyte.eval.activations import FASTEST_FIRST, choose_activations
    from halfbyte.eval.data import load_documents, load_questions
    from halfbyte.eval.evaluate import evaluate
    from halfbyte.eval.metrics import text_passages
    from halfbyte.integrations.transformers import set_activations

    set_threads(args.threads)
    if args.model == DEMO_MODEL and args.questions is None and args.text is None:
        args.questions = args.text = DEMO_MODEL
    if args.questions is None and args.text is None:
        raise argparse.ArgumentError(None, "nothing to measure on: give --questions FILE or --text FILE, or both")
    if args.reference is not None and args.text is None:
        raise argparse.ArgumentError(None, "--reference is compared on a text: give --text FILE")
    if args.activations == "auto" and args.text is None:
        raise argparse.ArgumentError(None, "--activations auto chooses by the perplexity of a text: give --text FILE")

    def file(given: str, embedded: str) -> Path:
        return demo_model_dir() / embedded if given == DEMO_MODEL else Path(given)

    # Files first: a wrong name should not cost the loading of a model.
    questions = load_questions(file(args.questions, "eval.jsonl"), limit=args.limit) if args.questions else []
    documents = load_documents(file(args.text, "heldout.txt.xz")) if args.text else []
    device = usable_device(args.device)
    is_auto = args.activations == "auto"
    model, tokenizer = load_model(args.model, device=device, activations="bf16" if is_auto else args.activations)
    reference = load_model(args.reference, device=device)[0] if args.reference else None
    passages = text_passages(tokenizer, documents, limit=args.windows) if documents else []
    tried: dict[ActivationFormat, float] = {}
    if is_auto:
        rounds = itertools.count()
        with Bar("choosing activations", unit="tokens") as bar:

            def perplexity_of(kind: ActivationFormat) -> float:
                before = next(rounds)
                set_activations(model, kind)

                def progress(done: int, total: int) -> None:
                    bar.reach(before * total + done, len(FASTEST_FIRST) * total)

                return cast(float, evaluate(model, tokenizer, passages=passages, progress=progress).perplexity)

            args.activations, tried = choose_activations(perplexity_of, args.budget / 100)
        set_activations(model, args.activations)
    with Bar("evaluating", unit="tokens") as bar:
        report = evaluate(
            model,
            tokenizer,
            questions=questions,
            passages=passages,
            reference=reference,
            batch=args.batch,
            max_new_tokens=args.max_new_tokens,
            progress=bar.reach,
        )
    if args.json:
        choice = {"budget_percent": args.budget, "perplexities": tried} if is_auto else {}
        print(json.dumps({"model": args.model, "activations": args.activations, **choice, "reference": args.reference, **report.as_dict()}))
        return 0
    for kind, perplexity in tried.items():
        rise = perplexity / tried["bf16"] - 1
        print(f"{kind} activations: perplexity {perplexity:.3f} ({rise:+.2%}){', chosen' if kind == args.activations else ''}")
    print(report)
    return 0
