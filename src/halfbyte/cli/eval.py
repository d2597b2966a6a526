"""`halfbyte eval`: measure a model on questions and text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

from halfbyte.errors import InputError

if TYPE_CHECKING:
    from halfbyte.formats.activation_formats import ActivationFormat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from halfbyte.cli.terminal import percent, positive_int

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
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    from halfbyte.checkpoint.source import DEMO_MODEL, demo_model_dir
    from halfbyte.cli.progress import Bar
    from halfbyte.cli.terminal import load_model, usable_device
    from halfbyte.eval.activations import FASTEST_FIRST, choose_activations
    from halfbyte.eval.data import load_documents, load_questions
    from halfbyte.eval.evaluate import evaluate, steps
    from halfbyte.eval.metrics import text_passages
    from halfbyte.integrations.transformers import set_activations

    if args.model == DEMO_MODEL and args.questions is None and args.text is None:
        args.questions = args.text = DEMO_MODEL
    if args.questions is None and args.text is None:
        raise InputError("nothing to measure on", where="halfbyte eval", needed="--questions FILE or --text FILE, or both")
    if args.reference is not None and args.text is None:
        raise InputError("a reference is compared on a text", where="halfbyte eval", needed="--text FILE")
    if args.activations == "auto" and args.text is None:
        raise InputError("activations are chosen by the perplexity of a text", where="halfbyte eval --activations auto", needed="--text FILE")

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
        with Bar("choosing activations", len(FASTEST_FIRST) * len(passages)) as bar:

            def perplexity_of(kind: ActivationFormat) -> float:
                set_activations(model, kind)
                return cast(float, evaluate(model, tokenizer, passages=passages, advance=bar.update).perplexity)

            args.activations, tried = choose_activations(perplexity_of, args.budget / 100)
        set_activations(model, args.activations)
    with Bar("evaluating", steps(questions, passages, reference)) as bar:
        report = evaluate(
            model,
            tokenizer,
            questions=questions,
            passages=passages,
            reference=reference,
            batch=args.batch,
            max_new_tokens=args.max_new_tokens,
            advance=bar.update,
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
