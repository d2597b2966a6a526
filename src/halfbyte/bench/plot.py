"""The picture of results: how near each system comes to the floor, over the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.bench.records import Record, Row, title
from halfbyte.errors import UnsupportedError

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise UnsupportedError("the plot needs matplotlib", where=__name__, next_step="run: pip install 'halfbyte[bench]'") from error

_OURS, _OUR_COLOUR = "halfbyte", "#1b7837"
_PEER_COLOURS = ("#2166ac", "#b2182b", "#762a83", "#e08214", "#4d4d4d", "#35978f")
_COLUMNS = 3


def plot_fractions(groups: Sequence[list[Record]], file: Path) -> None:
    """Plot floor / time of every system over tokens, one panel a table, as a PNG. Rows without a time are left out.

    The dotted line parts memory-bound from compute-bound numbers of tokens.
    """
    columns = min(_COLUMNS, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(5.2 * columns, 4.0 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    peers = dict.fromkeys(record.row.system for group in groups for record in group if record.row.system != _OURS)
    colours = {_OURS: _OUR_COLOUR} | {peer: _PEER_COLOURS[index % len(_PEER_COLOURS)] for index, peer in enumerate(peers)}
    for axes, group in zip(panels, groups, strict=False):
        _panel(axes, group, colours)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    figure.suptitle(f"Share of the measured floor, {groups[0][0].environment['device']}")
    lines_of = {line.get_label(): line for axes in panels for line in axes.lines if not line.get_label().startswith("_")}
    if lines_of:
        figure.legend(handles=list(lines_of.values()), loc="outside lower center", ncols=len(lines_of), frameon=False)
    figure.savefig(file, dpi=100)


def _panel(axes: Any, group: list[Record], colours: dict[str, str]) -> None:
    rows = sorted((record.row for record in group), key=lambda row: row.num_tokens)
    for system, colour in colours.items():
        points = [(row.num_tokens, 100 * row.fraction) for row in rows if row.system == system and row.fraction is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, linewidth=2.4 if system == _OURS else 1.4, label=system)
    boundary = _boundary(rows)
    if boundary is not None:
        axes.axvline(boundary, color="0.5", linestyle=":", linewidth=1)
    tokens = sorted({row.num_tokens for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(number) for number in tokens], rotation=45)
    axes.minorticks_off()
    axes.set(title=title(group), xlabel="tokens", ylabel="% of floor", ylim=(0, 105))
    axes.title.set_size("small")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _boundary(rows: Sequence[Row]) -> float | None:
    """Between the last memory-bound number of tokens and the first compute-bound one; None where all are of one kind."""
    memory = [row.num_tokens for row in rows if row.bound == "memory"]
    compute = [row.num_tokens for row in rows if row.bound == "compute"]
    return math.sqrt(max(memory) * min(compute)) if memory and compute else None
