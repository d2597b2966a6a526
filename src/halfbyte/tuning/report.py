"""What races say: tables in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from halfbyte.bench.ceilings import Ceilings
from halfbyte.bench.shapes import MoEShape, floor_of
from halfbyte.checkpoint.typed_json import typed
from halfbyte.errors import printable
from halfbyte.formats import FORMATS
from halfbyte.kernels.tuned import Layer, Race, Table
from halfbyte.tuning.models import MODELS


def summary(layers: Iterable[Layer]) -> str:
    """How far the kernels' own rules are from the best candidates, by activations and routing, and what the tables gain."""
    layers = list(layers)
    regrets: dict[tuple[str, str], list[float]] = {}
    for layer in layers:
        for race in layer.races:
            for routing, regret in zip(layer.routings, _regrets(race), strict=False):
                regrets.setdefault((layer.key.activations, routing), []).append(regret)
    if not regrets:
        return "no races"
    gains = [race.default_us / race.us for layer in layers for race in layer.races if race.config is not None and race.us and race.default_us]
    won = f"Buckets with a faster configuration: {len(gains)}" + (f", by {min(gains):.3f} to {max(gains):.3f}." if gains else ".")
    lines = [
        "The rule's time over that of the best candidate:",
        "",
        "| activations | routing | races | geometric mean | largest | above 1.03 |",
        "|---|---|---|---|---|---|",
    ]
    for (activations, routing), values in sorted(regrets.items(), key=lambda item: item[0][0]):
        mean, high = math.exp(sum(map(math.log, values)) / len(values)), sum(value > 1.03 for value in values)
        lines.append(f"| {printable(activations)} | {printable(routing)} | {len(values)} | {mean:.3f} | {max(values):.3f} | {high} |")
    return "\n".join([*lines, "", won])


def render(tables: Sequence[Table]) -> str:
    """A table for each layer: of every bucket all candidates' times, and how near the one that is taken comes to the floor."""
    return "\n\n".join(_render(table, layer) for table in tables for layer in table.layers if layer.races)


def title_of(layer: Layer) -> str:
    """What names a layer's table and its panel."""
    return f"{layer.name} {layer.key.format.upper()}, {layer.key.activations} activations"


def _regrets(race: Race) -> list[float]:
    """The rule's time over the best candidate's, with every routing."""
    rule = race.times.get(race.default, [])
    return [us / min(times[index] for times in race.times.values()) for index, us in enumerate(rule)]


def _render(table: Table, layer: Layer) -> str:
    sizes = f"{layer.key.experts} experts of {layer.key.hidden} x {layer.key.intermediate}, {layer.top_k} per token"
    software = ", ".join(f"{name} {version}" for name, version in layer.software.items())
    about = f"{table.device.name}, {layer.measured}, {software}, kernels {layer.source}; us with {', '.join(layer.routings)} routing"
    lines = [
        f"### {title_of(layer)}",
        "",
        f"{sizes}. {about}.",
        "",
        "| up to | tokens | rule | taken | of floor | candidates |",
        "|---|---|---|---|---|---|",
    ]
    for race in layer.races:
        times = "; ".join(f"{name} {', '.join(f'{us:.1f}' for us in each)}" for name, each in race.times.items())
        failed = "".join(f"; {name}: {reason}" for name, reason in race.excluded.items())
        lines.append(f"| {race.bucket} | {race.num_tokens} | {race.default} | {race.taken} | {_of_floor(layer, race)} | {times}{failed} |")
    return "\n".join(map(printable, lines))


def _of_floor(layer: Layer, race: Race) -> str:
    """Share of the floor with uniform routing; "" where the table does not say enough."""
    key, shape, format = layer.key, MODELS.get(layer.name), FORMATS.get(layer.key.format)
    try:
        ceilings = typed(Ceilings, layer.ceilings, "ceilings")
    except ValueError:
        return ""
    if format is None or race.taken not in race.times:
        return ""
    if shape is None:
        shape = MoEShape(layer.name, key.hidden, key.intermediate, key.experts, layer.top_k)
    touched = key.experts * (1 - (1 - layer.top_k / key.experts) ** race.num_tokens)
    floor = floor_of(shape, format, race.num_tokens, touched, ceilings, key.activations)
    return f"{floor.us / race.times[race.taken][0]:.0%}"
