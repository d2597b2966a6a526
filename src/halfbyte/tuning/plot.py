"""The picture of races: every candidate beside the rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from halfbyte.bench.picture import Figure, write_picture
from halfbyte.errors import InputError
from halfbyte.kernels.tuned import Table
from halfbyte.tuning.report import title_of


def plot(tables: Sequence[Table], file: Path) -> None:
    """Time of every candidate over that of the rule's, by bucket, uniform routing; one panel per layer, as a PNG.

    Raises:
        InputError: there are no races.
        CheckpointError: the file cannot be written.
    """
    layers = [layer for table in tables for layer in table.layers if layer.races]
    if not layers:
        raise InputError("nothing to plot", where="--plot", given="tables without races", next_step="leave --plot out")
    columns = min(3, len(layers))
    lines = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, layer in zip(panels, layers, strict=False):
        names = dict.fromkeys(name for race in layer.races for name in race.times)
        for name in names:
            points = [
                (index, race.times[name][0] / race.times[race.default][0])
                for index, race in enumerate(layer.races)
                if {name, race.default} <= race.times.keys()
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=name)
        axes.set_xticks(range(len(layer.races)), [race.bucket for race in layer.races], rotation=90, fontsize="xx-small")
        axes.set(title=title_of(layer), ylabel="time over the rule's", ylim=(0.8, 1.5))
        axes.title.set_size("small")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="xx-small", ncols=2)
    for axes in panels[len(layers) :]:
        axes.set_axis_off()
    write_picture(figure, file)
