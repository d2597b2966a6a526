"""`model_card`: the README.md of a quantised checkpoint. The source's own would say things of other weights."""

from __future__ import annotations

import re
from pathlib import Path

from halfbyte import __version__
from halfbyte.convert.report import QuantizeReport, decibels

_KEPT = ("license", "license_name", "license_link", "language")  # of the front matter: what holds for the quantised weights too


def model_card(report: QuantizeReport, flags: str, source_card: str) -> str:
    """Markdown with front matter: source, format, the command, and the SQNR by kind of matrix.

    Args:
        report: of the conversion, complete.
        flags: the options of the command, "" or beginning with a blank.
        source_card: the README.md of the source, "" where it has none; the licence is taken from it.
    """
    name = _name(report.source)
    kept = [line for line in _front_matter(source_card) if line.split(":")[0] in _KEPT]
    share = f"{report.quantized_bytes / report.quantized_source_bytes:.1%}"
    rows = [f"| {kind} | {sqnr.matrices} | {decibels(sqnr.mean_db)} | {decibels(sqnr.worst_db)} |" for kind, sqnr in sorted(report.sqnr.items())]
    lines = [
        "---",
        *kept,
        f"base_model: {name}",
        "tags:",
        f"- {report.format}",
        "- halfbyte",
        "---",
        "",
        f"# {name}, {report.format.upper()}",
        "",
        f"{report.matrices} matrices of `{name}` in {report.format.upper()}, written for {report.output}; they take {share} of what they took.",
        "All other tensors are those of the source. Made by halfbyte " + __version__ + ":",
        "",
        f"    halfbyte quantize SOURCE DESTINATION --format {report.format}{flags}",
        "",
        "Signal to quantisation noise of the weights, in dB. It is no measure of what a model answers: `halfbyte eval` measures that.",
        "",
        "| matrices | number | mean | worst |",
        "|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _name(source: str) -> str:
    """The Hub's name where it is one, else the last folder."""
    return source if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists() else Path(source).resolve().name


def _front_matter(card: str) -> list[str]:
    match = re.match(r"---\n(.*?)\n---\n", card, flags=re.DOTALL)
    return match[1].splitlines() if match else []
