"""The picture of results: how near each system comes to the floor, over the number of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.bench.moe import MoERow
from halfbyte.bench.picture import Figure, write_picture
from halfbyte.bench.records import MOST_PANELS, Record
from halfbyte.errors import InputError

_OURS, _OUR_COLOUR = "halfbyte", "#1b7837"
_PEER_COLOURS = ("#2166ac", "#b2182b", "#762a83", "#e08214", "#4d4d4d", "#35978f")
_COLUMNS = 3


class _Table(NamedTuple):
    device: str
    rows: list[MoERow]


def plot_fractions(groups: Sequence[list[Record]], file: Path) -> None:
    """Plot floor / time of every system over tokens, one panel per table, as a PNG. Rows without a time are left out.

    The dotted line parts memory-bound from compute-bound numbers of tokens. Tables of other benchmarks than the MoE layer's are left out.

    Raises:
        InputError: there is no row of the MoE layer, or there are more than six tables.
        CheckpointError: the file cannot be written.
    """
    tables = [_Table(group[0].environment["device"], _moe_rows(group)) for group in groups if _moe_rows(group)]
    if not tables:
        raise InputError("nothing to plot", given="no row of the MoE layer", needed="rows of halfbyte bench moe", next_step="leave --plot out")
    if len(tables) > MOST_PANELS:
        raise InputError("too many tables for one plot", given=len(tables), needed=f"at most {MOST_PANELS}", next_step="choose some with --only")
    columns = 2 if len(tables) == 4 else min(_COLUMNS, len(tables))
    lines = math.ceil(len(tables) / columns)
    figure = Figure(figsize=(5.2 * columns, 4.0 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    peers = dict.fromkeys(row.system for table in tables for row in table.rows if row.system != _OURS)
    colours = {_OURS: _OUR_COLOUR} | {peer: _PEER_COLOURS[index % len(_PEER_COLOURS)] for index, peer in enumerate(peers)}
    for axes, table in zip(panels, tables, strict=False):
        _panel(axes, table, colours)
    for axes in panels[len(tables) :]:
        axes.set_axis_off()
    figure.suptitle("Share of the measured floor; dotted: memory is the limit on the left, arithmetic on the right")
    lines_of = {line.get_label(): line for axes in panels for line in axes.lines if not line.get_label().startswith("_")}
    if lines_of:
        figure.legend(handles=list(lines_of.values()), loc="outside lower center", ncols=len(lines_of), frameon=False)
    write_picture(figure, file)


def _moe_rows(group: list[Record]) -> list[MoERow]:
    return sorted((record.row for record in group if isinstance(record.row, MoERow)), key=lambda row: row.num_tokens)


def _panel(axes: Any, table: _Table, colours: dict[str, str]) -> None:
    rows = table.rows
    for system, colour in colours.items():
        points = [(row.num_tokens, 100 * row.fraction) for row in rows if row.system == system and row.fraction is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, linewidth=2.4 if system == _OURS else 1.4, label=system)
    boundary = _boundary(rows)
    if boundary is not None:
        axes.axvline(boundary, color="0.5", linestyle=":", linewidth=1)
    tokens = sorted({row.num_tokens for row in rows})
    axes.set_xscale("log", base=2)
    ticks = [number for index, number in enumerate(tokens) if index in (0, len(tokens) - 1) or number * 3 <= tokens[-1]]  # labels apart
    axes.set_xticks(ticks, [f"{number:,}" for number in ticks])
    axes.tick_params(labelsize="small")
    axes.minorticks_off()
    axes.set(title=f"{rows[0].subject}\n{table.device}", xlabel="tokens", ylabel="% of floor", ylim=(0, 105))
    axes.title.set_size("small")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _boundary(rows: Sequence[MoERow]) -> float | None:
    """Between the last memory-bound number of tokens and the first compute-bound one; None where all are of one kind."""
    memory = [row.num_tokens for row in rows if row.bound == "memory"]
    compute = [row.num_tokens for row in rows if row.bound == "compute"]
    return math.sqrt(max(memory) * min(compute)) if memory and compute else None
