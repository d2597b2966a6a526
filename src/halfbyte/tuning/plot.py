"""The picture of races: what comes next to the rule, and where it comes before it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from halfbyte.bench.picture import Figure, write_picture
from halfbyte.errors import InputError, printable
from halfbyte.kernels.tuned import Race, Table, buckets
from halfbyte.tuning.report import title_of

MANY_EXPERTS = 1 << 20  # a layer of so many has every bucket
SLOWEST = 1.25  # what is slower is as dark


def plot(tables: Sequence[Table], file: Path) -> None:
    """A map of layers and buckets, as a PNG: in each cell the fastest candidate beside the rule's, and its time over the rule's.

    That is the time with the routing that suits the candidate least, by which tuning decides. Candidates that were taken have a frame.

    Raises:
        InputError: there are no races.
        CheckpointError: the file cannot be written.
    """
    layers = [layer for table in tables for layer in table.layers if layer.races]
    if not layers:
        raise InputError("nothing to plot", where="--plot", given="tables without races", next_step="leave --plot out")
    raced = {race.bucket for layer in layers for race in layer.races}
    columns = [name for _, name in buckets(MANY_EXPERTS) if name in raced]
    figure = Figure(figsize=(3.5 + 0.75 * len(columns), 2.2 + 0.4 * len(layers)), layout="constrained")
    axes = figure.subplots()
    ratios = [[float("nan")] * len(columns) for _ in layers]
    for row, layer in enumerate(layers):
        for race in layer.races:
            others = rivals(race)
            if race.bucket in columns and others:
                column, name = columns.index(race.bucket), min(others, key=others.__getitem__)
                ratios[row][column] = others[name]
                frame = None if race.config is None else {"boxstyle": "square", "facecolor": "none"}
                text = f"{printable(name)}\n{others[name]:.2f}"
                axes.text(column, row, text, ha="center", va="center", fontsize="xx-small", bbox=frame)
    image = axes.imshow(ratios, cmap="RdBu_r", vmin=2 - SLOWEST, vmax=SLOWEST, aspect="auto", alpha=0.6)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(layers)), [printable(title_of(layer)) for layer in layers])
    axes.set(title="The fastest candidate beside the rule's: its time over the rule's, with the routing that suits it least", xlabel="up to")
    figure.colorbar(image, ax=axes, shrink=0.6, label="below 1: faster than the rule", extend="both")
    write_picture(figure, file)


def rivals(race: Race) -> dict[str, float]:
    """The largest ratio to the rule's time over the routings, of every other candidate."""
    rule = race.times.get(race.default, [])
    others = {name: times for name, times in race.times.items() if name != race.default}
    return {name: max(us / base for us, base in zip(times, rule, strict=False)) for name, times in others.items() if times and rule}
