"""lm-eval with halfbyte in transformers or vLLM: `python benchmarks/lm_eval/run.py MODEL... [--limit N]`, in the repository's root.

Runs both tasks of this folder on each model in turn, and prints one table; `make lm-eval` is the whole set-up for the demo model on a CPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

import halfbyte.integrations.transformers  # noqa: F401 - registers; vLLM finds its plug-in itself

_HERE = Path(__file__).parent
# Prompts bring their <bos>; scores need no compiled graphs.
_MODEL_ARGS = {"hf": {"dtype": "auto"}, "vllm": {"dtype": "auto", "max_model_len": 1024, "add_bos_token": False, "enforce_eager": True}}
_SHOWN = (
    ("exact match", "halfbyte_questions", "exact_match,none", ".3f"),
    ("standard error", "halfbyte_questions", "exact_match_stderr,none", ".3f"),
    ("nats per solution", "halfbyte_solutions", "nll,none", ".3f"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="a directory or a Hub name")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N of the 1,200 questions")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="questions at a time")
    parser.add_argument("--backend", choices=_MODEL_ARGS, default="hf", help="of lm-eval")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep the scores")
    args = parser.parse_args()
    scores = {}
    print(f"| model | {' | '.join(head for head, *_ in _SHOWN)} |\n|{'---|' * (1 + len(_SHOWN))}", flush=True)
    for model in args.models:
        results = lm_eval.simple_evaluate(
            model=args.backend,
            model_args={"pretrained": model, **_MODEL_ARGS[args.backend]},
            tasks=["halfbyte_questions", "halfbyte_solutions"],
            task_manager=TaskManager(include_path=str(_HERE), include_defaults=False),
            batch_size=args.batch,
            device=args.device,
            limit=args.limit,
        )["results"]
        scores[model] = {head: results[task][metric] for head, task, metric, _ in _SHOWN}
        cells = (format(results[task][metric], style) for _, task, metric, style in _SHOWN)
        print(f"| {model} | {' | '.join(cells)} |", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"limit": args.limit, "lm_eval": lm_eval.__version__, "scores": scores}, indent=1) + "\n")


if __name__ == "__main__":
    main()
