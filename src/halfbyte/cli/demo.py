"""`halfbyte demo`: see halfbyte.demo."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import time
from pathlib import Path

from halfbyte.cli.parser import path
from halfbyte.demo import QUESTION
from halfbyte.errors import UnsupportedError

EXAMPLE = "halfbyte demo --output my-demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from halfbyte.cli.terminal import add_dtype, add_threads

    parser.add_argument("--full", action="store_true", help="measure on all 1,200 questions and all of the text")
    parser.add_argument("--output", type=path, metavar="DIR", default=Path("demo-output"), help="where the models, plot and result go")
    add_dtype(parser)
    add_threads(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the story")


def run(args: argparse.Namespace) -> int:
    """Run the demo and say where its results are.

    Raises:
        InputError, CheckpointError: the output directory is taken or cannot be written.
        UnsupportedError: transformers or matplotlib is not installed.
    """
    missing = [name for name in ("transformers", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError("the demo needs a package", needed=" and ".join(missing), next_step="run: pip install 'halfbyte[demo]'")
    from halfbyte.cli.documents import print_document
    from halfbyte.cli.progress import Bar
    from halfbyte.cli.terminal import quieten_transformers, set_threads
    from halfbyte.demo.run import run_demo

    set_threads(args.threads)
    start = time.perf_counter()
    quieten_transformers()
    say = _silence if args.json else _say
    bar = functools.partial(Bar, unit="tokens")
    result = run_demo(args.output, full=args.full, dtype=args.dtype, say=say, stream=not args.json, progress_bar=bar)
    if args.json:
        print_document(result)
        return 0
    print(
        f"\nDone in {time.perf_counter() - start:.0f} s. In {args.output}: nvfp4, mxfp4 (checkpoints), demo.png (the plot), demo.json (all numbers)."
    )
    print(f'Next: halfbyte generate {args.output}/nvfp4 "{QUESTION}"')
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _silence(line: str) -> None:
    """Nobody reads along."""
