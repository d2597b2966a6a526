"""What the ways to damage a model share: how they are registered, and edits of headers and JSON files."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fuzz.sound import SHARDS, Files, join, split

from halfbyte.checkpoint.source import INDEX

CONFIG, HF_QUANT = "config.json", "hf_quant_config.json"
# Why other values, or another meaning, may be accepted: nothing can tell the result from a sound model.
LEGAL = {
    "weights": "codes and weights have no check digits: any bits but NaN are values, and any finite positive scale is a scale",
    "configuration": "another value of the right type and range is the configuration of another model",
    "absent": "a key that is absent or null has the default of its family, as in transformers",
    "text": "one letter of a JSON text may turn a value into another one, or a key into one that nobody reads",
    "tokenizer": "another tokenizer splits a text into other tokens",
    "table": "another number, name or date in a table is a race that somebody may have run",
    "outside": "tensors outside experts and routers are copied by `quantize` and read by transformers, which refuses what it misses",
}


@dataclass
class Damage:
    """What was done. `legal`: a key of `LEGAL`, where another result may be accepted."""

    text: str
    legal: str = ""


Maker = Callable[[random.Random, Files], Damage]
MAKERS: list[Maker] = []


def maker(weight: int) -> Callable[[Maker], Maker]:
    """Register a function, drawn `weight` times as often as one of weight 1."""

    def register(function: Maker) -> Maker:
        MAKERS.extend([function] * weight)
        return function

    return register


def json_files(files: Files) -> list[str]:
    return [name for name in (CONFIG, INDEX, HF_QUANT) if name in files]


def edit_json(files: Files, name: str, change: Callable[[Any], object]) -> None:
    document = json.loads(files[name])
    change(document)
    files[name] = json.dumps(document).encode()


def shard_of(rng: random.Random, files: Files, pattern: str) -> tuple[str, str]:
    """A shard, and a tensor in it whose name matches."""
    found = [(shard, name) for shard in SHARDS for name in split(files[shard])[0] if name != "__metadata__" and re.search(pattern, name)]
    return rng.choice(found)


def edit_header(files: Files, shard: str, change: Callable[[dict[str, Any]], object]) -> None:
    header, data = split(files[shard])
    change(header)
    files[shard] = join(header, data)
