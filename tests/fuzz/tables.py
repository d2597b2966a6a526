"""Tables of `halfbyte tune`, damaged: calls pass them over, `tune --report` and the next race say what is wrong or write them again."""

from __future__ import annotations

import os
import random
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

from fuzz.judge import WrongError, command, guarded
from fuzz.leftovers import BYSTANDER, MAKERS, files_of
from fuzz.sound import Files, write

from halfbyte.bench.shapes import MoEShape
from halfbyte.device import Target
from halfbyte.errors import HalfbyteError
from halfbyte.formats import NVFP4
from halfbyte.kernels import tuned
from halfbyte.kernels.problem import Size
from halfbyte.kernels.sm90.configs import SMALL
from halfbyte.kernels.table import choose
from halfbyte.kernels.tuned import Race, fields_of
from halfbyte.tuning.layer import Layer
from halfbyte.tuning.run import record_of
from halfbyte.tuning.store import place_of
from halfbyte.tuning.store import write as write_races

H200 = Target("NVIDIA H200", "sm_90", 132, 50 << 20, 4600.0)
LAYERS = [Layer(shape, NVFP4, "bf16", H200) for shape in (MoEShape("small", 512, 256, 32, 4), MoEShape("large", 4096, 1024, 128, 8))]
BUCKET = "16 rows per expert"


def record(layer: Layer, us: float = 90.0) -> tuned.Layer:
    """One bucket has been raced, and another configuration than the rule's won."""
    times = {"TINY": [100.0] * 3, "SMALL": [us] * 3}
    race = Race(BUCKET, 96, "TINY", "SMALL", fields_of(SMALL), us, 100.0, 0.01, times, {})
    return replace(record_of(layer), races=(race,))


@cache
def sound_tables() -> Files:
    with tempfile.TemporaryDirectory() as directory:
        for layer in LAYERS:
            write_races(H200, record(layer), Path(directory))
        return {name: content for name, content in files_of(Path(directory)).items() if name != ".lock"}


def chosen(layer: Layer) -> object:
    choose.cache_clear()
    size = Size(12 * layer.shape.num_experts // layer.shape.top_k, layer.shape.top_k)
    return choose(layer.problem).choose_config(layer.problem, size)


def run_case(rng: random.Random) -> tuple[str, str]:
    """Damage the tables of two layers, and judge: the verdict, "told", "harmless" or "table" (another one, which may be true), and what was done."""
    files, said = dict(sound_tables()), "tables"
    for _ in range(rng.choice((1, 1, 2))):
        names = [name for name in files if files[name] is sound_tables().get(name)]
        if names:
            name, chosen_maker = rng.choice(names), rng.choice(MAKERS)
            said += f"; {chosen_maker.__name__}: {name} {chosen_maker(rng, files, name)}"
    with tempfile.TemporaryDirectory() as directory, mock.patch.dict(os.environ, {"HALFBYTE_CACHE_DIR": directory}):
        (Path(directory) / "bystander").write_bytes(BYSTANDER)
        tuned.take([], shipped=False)
        try:
            verdict = judge(write(files, tuned.user_directory()))
        except WrongError as error:
            return f"wrong: {error}", said
        finally:
            tuned.take([])
            choose.cache_clear()
        if (Path(directory) / "bystander").read_bytes() != BYSTANDER:
            return "wrong: another file was written to", said
    return verdict, said


def judge(directory: Path) -> str:
    """No damage reaches a call, a report or a race other than as one line.

    Raises:
        WrongError: it does.
    """
    is_sound, is_table = {}, True
    for layer in LAYERS:
        file = place_of(H200, layer.key, directory)
        try:
            table = guarded("read", lambda: tuned.read(file))  # noqa: B023 (called at once)
            is_sound[layer] = table.layers == (record(layer),) and table.device == H200
        except HalfbyteError:
            is_sound[layer] = is_table = False
        for options in ((), ("--json",)):
            command("tune", "--report", str(file), *options)
    command("tune", "--report")
    for layer in LAYERS:
        config = guarded("choose", lambda: chosen(layer))  # noqa: B023
        if config != SMALL and (is_sound[layer] or config not in layer.kernel.configs(layer.problem)):
            raise WrongError(f"{layer.shape.name} takes {config}")
    for layer in LAYERS:
        try:
            guarded("write", lambda: write_races(H200, record(layer, 80.0)))  # noqa: B023
        except HalfbyteError:
            continue
        (race,) = [race for race in tuned.read(place_of(H200, layer.key)).layers[0].races if race.bucket == BUCKET]
        if race != record(layer, 80.0).races[0] or chosen(layer) != SMALL:
            raise WrongError(f"{layer.shape.name} does not take what was raced again")
    return "harmless" if all(is_sound.values()) else "table" if is_table else "told"
