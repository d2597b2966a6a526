"""`halfbyte doctor`: print what `halfbyte.doctor.report` finds."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from halfbyte.doctor import render, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 when something is broken, 0 otherwise."""
    findings = report()
    print(json.dumps([asdict(finding) for finding in findings], indent=1) if args.json else render(findings))
    return 0 if all(finding.ok for finding in findings) else 1
