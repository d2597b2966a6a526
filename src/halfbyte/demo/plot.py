"""The picture of a demo: size and quality, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.bench.picture import Figure, write_picture
from halfbyte.eval.evaluate import EvalReport

_COLOURS = {"bf16": "#4d4d4d", "NVFP4": "#1b7837", "MXFP4": "#2166ac"}


def plot_quality(rows: Sequence[tuple[str, int, EvalReport]], file: Path) -> None:
    """Plot size, exact match and perplexity of (name, bytes on disk, quality) as three rows of bars from zero, a PNG.

    The whisker on exact match is one standard error of a mean over that many questions.
    """
    names = [name for name, _, _ in rows]
    sizes = [size / 1e6 for _, size, _ in rows]
    perplexities = [quality.perplexity or math.nan for _, _, quality in rows]
    matches = [100 * (quality.exact_match or 0) for _, _, quality in rows]
    errors = [100 * _standard_error(quality) for _, _, quality in rows]
    questions = sum(kind.questions for kind in rows[0][2].kinds.values())

    figure = Figure(figsize=(11, 2.9), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    _bars(panels[0], names, sizes, [f"{size:.1f} MB" for size in sizes], "Model on disk: smaller is better")
    labels = [f"{match:.1f} ± {error:.1f} %" for match, error in zip(matches, errors, strict=True)]
    _bars(panels[1], names, matches, labels, "Questions answered exactly: more is better", errors)
    first, *others = perplexities
    labels = [f"{first:.2f}", *(f"{value:.2f} ({value / first - 1:+.1%})" for value in others)]
    _bars(panels[2], names, perplexities, labels, "Perplexity of held-out text: lower is better")
    panels[0].invert_yaxis()  # shared: the first row on top
    figure.suptitle("FP4 experts in the halfbyte demo model", size="large")
    note = f"± is one standard error with {questions} questions. They come from 11 story families: no measure of GSM8K ability."
    figure.supxlabel(note, size="small", color="0.35")
    write_picture(figure, file, dpi=150)


def _bars(axes: Any, names: list[str], values: list[float], labels: list[str], title: str, errors: list[float] | None = None) -> None:
    axes.barh(names, values, height=0.62, color=[_COLOURS[name] for name in names], xerr=errors, ecolor="0.2", capsize=3)
    ends = [value + error for value, error in zip(values, errors or [0.0] * len(values), strict=True)]
    for row, (end, label) in enumerate(zip(ends, labels, strict=True)):
        axes.annotate(label, (end, row), xytext=(5, 0), textcoords="offset points", va="center", size="small")
    axes.set(xlim=(0, 1.5 * max(ends)), xticks=[])
    axes.set_title(title, size="medium", loc="left")
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _standard_error(quality: EvalReport) -> float:
    """Of the mean over kinds, each an independent proportion."""
    variances = [kind.exact_match * (1 - kind.exact_match) / kind.questions for kind in quality.kinds.values()]
    return math.sqrt(sum(variances)) / len(variances)
