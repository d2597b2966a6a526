"""`halfbyte doctor`: print what `halfbyte.doctor.report` finds."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from halfbyte.doctor import next_step, render, report, verdict

EXAMPLE = "halfbyte doctor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 when something is broken, 0 otherwise."""
    from halfbyte.cli.documents import print_document

    findings = report()
    if args.json:
        document = {"verdict": verdict(findings), "findings": [asdict(finding) for finding in findings], "next_step": next_step()}
        print_document(document)
    else:
        print(f"{verdict(findings)}\n\n{render(findings)}\n\nNext: {next_step()}")
    return 0 if all(finding.ok for finding in findings) else 1
