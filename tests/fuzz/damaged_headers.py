"""Headers of safetensors files that say what cannot be, or not what is there."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

from fuzz.making import Damage, edit_header, maker, shard_of
from fuzz.sound import SHARDS, Files, join, split

NUMBERS = (-1, 0, 1, 2**31, 2**32 + 1, 2**62, 2**63, 2**64, 10**30, 1.5, True, None, "64", [64], {}, "9" * 400)


def _set_shape(rng: random.Random, entry: dict[str, Any]) -> None:
    shape = entry["shape"]
    entry["shape"] = rng.choice(
        (
            [*shape, 1],
            [1, *shape],
            shape[::-1],
            [*shape[:-1], 0],
            [*shape, rng.choice(NUMBERS)],
            [str(size) for size in shape],
            "64",
            None,
            7,
            [[*shape]],
            [1] * 100_000,
            [-size for size in shape] or [-1],
            [float(size) for size in shape] or [1.0],
        )
    )


def _set_offsets(rng: random.Random, entry: dict[str, Any]) -> None:
    first, end = entry["data_offsets"]
    entry["data_offsets"] = rng.choice(
        (
            [end, first],
            [first, end, end],
            [first],
            [first + 1, end + 1],
            [max(first - 1, 0), max(first - 1, 0) + end - first],
            [0, end - first],
            [first + 2**40, end + 2**40],
            [rng.choice(NUMBERS), end],
            [first, rng.choice(NUMBERS)],
            None,
            {},
            [float(first), float(end)],
        )
    )


DTYPES = (
    *("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I64", "I32", "U8", "I8", "BOOL", "F8_E4M3FNUZ", "C64", "f32", ""),
    *(None, 3, []),
)


@maker(6)
def odd_entry(rng: random.Random, files: Files) -> Damage:
    shard, name = shard_of(rng, files, rng.choice((r"experts", r"experts", r"")))

    def change(header: dict[str, Any]) -> None:
        entry = header[name]
        kind = rng.randrange(6)
        if kind == 0:
            entry["dtype"] = rng.choice(DTYPES)
        elif kind == 1:
            _set_shape(rng, entry)
        elif kind in (2, 3):
            _set_offsets(rng, entry)
        elif kind == 4:
            del entry[rng.choice(list(entry))]
        else:
            header[name] = rng.choice((None, [], {}, "x", 3, [entry]))

    before = split(files[shard])[0][name]
    edit_header(files, shard, change)
    return Damage(f"{shard}: {name} was {before}, is {str(split(files[shard])[0].get(name))[:120]}")


@maker(1)
def exchanged_offsets(rng: random.Random, files: Files) -> Damage:
    """Two tensors of one size, each where the other is: no file can say that this is not meant."""
    shard, name = shard_of(rng, files, "experts")
    header = split(files[shard])[0]
    size = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
    others = [o for o in header if o not in (name, "__metadata__") and header[o]["data_offsets"][1] - header[o]["data_offsets"][0] == size]
    other = rng.choice(others or [name])

    def change(header: dict[str, Any]) -> None:
        header[name]["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], header[name]["data_offsets"]

    edit_header(files, shard, change)
    return Damage(f"{shard}: {name} and {other} exchanged", "weights")


@maker(1)
def odd_metadata(rng: random.Random, files: Files) -> Damage:
    shard, value = rng.choice(SHARDS), rng.choice(([], "x", 3, None, {"format": 3}, {"format": ["pt"]}, {"a": {"b": {}}}, {"format": "np"}))
    edit_header(files, shard, lambda header: header.update({"__metadata__": value}))
    return Damage(f"{shard}: __metadata__ {value!r}")


@maker(1)
def header_length(rng: random.Random, files: Files) -> Damage:
    shard = rng.choice(SHARDS)
    length = rng.choice((0, 1, 2, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 100_000_001, len(files[shard]) - 8, len(files[shard]) - 7))
    files[shard] = struct.pack("<Q", length) + files[shard][8:]
    return Damage(f"{shard}: a header of {length} bytes")


@maker(1)
def doubled_entry(rng: random.Random, files: Files) -> Damage:
    """One name twice in a header, with two places."""
    shard, name = shard_of(rng, files, "experts")
    header, data = split(files[shard])
    other = rng.choice([other for other in header if other != "__metadata__"])
    text = json.dumps(header)
    files[shard] = join(text[:-1] + f", {json.dumps(name)}: {json.dumps(header[other])}}}", data)
    return Damage(f"{shard}: {name} twice, the second time as {other}")
