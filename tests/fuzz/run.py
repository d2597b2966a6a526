"""Damage models, what runs leave and tuned tables, and see what halfbyte says.

In tests/, with src on the path: python -m fuzz.run --cases 5000 --seed 1
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fuzz import leftovers, tables
from fuzz.damage import damage
from fuzz.judge import WrongError, judge
from fuzz.sound import LAYOUTS, sound

LEFTOVERS, TABLES = 0.12, 0.04  # of all cases


def run_case(layout: str, seed: str, kind: str = "any") -> tuple[str, str]:
    """One damaged model, or what runs on a sound one left: the verdict ("wrong" and why, or as `judge.judge`), and what was done."""
    rng = random.Random(f"{layout} {seed}")
    drawn = rng.random() if kind == "any" else 0.5
    if kind == "leftovers" or drawn < LEFTOVERS:
        return leftovers.run_case(layout, rng)
    if kind == "tables" or drawn > 1 - TABLES:
        return tables.run_case(rng)
    files = dict(sound(layout))
    done = damage(rng, files)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return judge(layout, files, done, Path(folder), rng), done.text
        except WrongError as error:
            return f"wrong: {error}", done.text


def main() -> int:
    """Run cases, print those that are wrong and how many were judged how; 1 where any is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300, help="in all, spread over the layouts")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="only these")
    parser.add_argument("--kind", choices=("any", "models", "leftovers", "tables"), default="any", help="what is damaged")
    parser.add_argument("--only", metavar="N", type=int, action="append", help="only the cases of these numbers")
    parser.add_argument("--verbose", action="store_true", help="print every case")
    args = parser.parse_args()
    logging.disable()
    layouts, verdicts, start = args.layout or list(LAYOUTS), Counter[str](), time.monotonic()
    for number in args.only or range(args.cases):
        layout = layouts[number % len(layouts)]
        verdict, text = run_case(layout, f"{args.seed} {number}", args.kind)
        verdicts[verdict.partition(":")[0]] += 1
        if args.verbose or verdict.startswith("wrong"):
            print(f"{number} {layout}: {text}\n    {verdict}", flush=True)
    print(f"{sum(verdicts.values())} cases in {time.monotonic() - start:.0f} s: {dict(verdicts)}")
    return int(verdicts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
