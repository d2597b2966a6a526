"""The tables that the package brings: their schema, and that every configuration in them runs the layer that it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from halfbyte.kernels.table import choose_untuned
from halfbyte.kernels.tuned import SHIPPED, LayerKey, buckets, fields_of, read
from halfbyte.tuning.layer import Layer
from halfbyte.tuning.models import MODELS

FILES = sorted(SHIPPED.glob("*.json"))


def test_there_is_one() -> None:
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_entry_is_a_configuration_of_its_layer(file: Path) -> None:
    table = read(file)
    for layer in table.layers:
        problem = Layer(MODELS[layer.name], MODELS[layer.name].published, layer.key.activations, table.device).problem
        kernel = choose_untuned(problem)
        assert layer.key == LayerKey.of(kernel.name, problem) and layer.ceilings and layer.software.keys() == {"halfbyte", "torch", "triton"}
        known = {str(config): fields_of(config) for config in kernel.configs(problem)}
        names = [name for _, name in buckets(layer.key.experts)]
        assert [race.bucket for race in layer.races] == [name for name in names if name in {race.bucket for race in layer.races}]
        for race in layer.races:
            assert {race.default, race.taken, *race.times} <= known.keys() and not race.excluded
            assert race.config in (None, known[race.taken]) and (race.config is None) == (race.taken == race.default)
            assert race.us is not None and race.default_us is not None and race.us <= race.default_us
            assert all(len(times) == len(layer.routings) and min(times) > 0 for times in race.times.values())
