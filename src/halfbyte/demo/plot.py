"""The picture of a demo: quality over size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.errors import UnsupportedError
from halfbyte.eval.evaluate import EvalReport

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise UnsupportedError("the plot needs matplotlib", where=__name__, next_step="run: pip install 'halfbyte[bench]'") from error

# Colour, and the side of the point its label stands on: the two FP4 models are of nearly one size.
_STYLES = {"bf16": ("#4d4d4d", "right"), "NVFP4": ("#1b7837", "right"), "MXFP4": ("#2166ac", "left")}


def plot_quality(rows: Sequence[tuple[str, int, EvalReport]], file: Path) -> None:
    """Plot perplexity and exact match of (name, bytes on disk, quality) over size, as a PNG.

    The bar on exact match is one standard error of a mean over that many questions.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    best = min(quality.perplexity or math.inf for _, _, quality in rows)
    for name, size, quality in rows:
        perplexity, exact_match = quality.perplexity or math.nan, 100 * (quality.exact_match or 0)
        _point(left, name, size / 1e6, perplexity, 0, f"{perplexity:.2f} ({perplexity / best - 1:+.1%})")
        _point(right, name, size / 1e6, exact_match, 100 * _standard_error(quality), f"{exact_match:.1f} %")
    left.set(title="Perplexity of held-out text: lower is better", ylabel="perplexity")
    right.set(title="Exact match, mean of six kinds: higher is better", ylabel="% of questions")
    for axes in (left, right):
        axes.set(xlabel="model on disk, MB", xlim=(0, 1.4 * max(size for _, size, _ in rows) / 1e6))
        axes.title.set_size("medium")
        axes.margins(y=0.25)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("FP4 experts in the halfbyte demo model (no measure of GSM8K ability)")
    figure.savefig(file, dpi=150)


def _point(axes: Any, name: str, x: float, y: float, error: float, value: str) -> None:
    colour, side = _STYLES[name]
    axes.errorbar(x, y, yerr=error or None, fmt="o", markersize=8, capsize=4, color=colour)
    axes.annotate(
        f"{name}, {x:.1f} MB\n{value}",
        (x, y),
        xytext=(10 if side == "right" else -10, 0),
        textcoords="offset points",
        va="center",
        ha="left" if side == "right" else "right",
        color=colour,
    )


def _standard_error(quality: EvalReport) -> float:
    """Of the mean over kinds, each an independent proportion."""
    variances = [kind.exact_match * (1 - kind.exact_match) / kind.questions for kind in quality.kinds.values()]
    return math.sqrt(sum(variances)) / len(variances)
