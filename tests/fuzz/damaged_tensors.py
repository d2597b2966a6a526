"""Tensors that are lost, called otherwise, of another shape, or of values that are no numbers."""

from __future__ import annotations

import random
import re
import struct
from typing import Any

from fuzz.making import Damage, edit_json, maker, shard_of
from fuzz.sound import SHARDS, Files, join, split

from halfbyte.checkpoint.source import INDEX


def move_tensor(files: Files, name: str, new: str | None, *, keep: bool = False) -> None:
    """Rename a tensor in its header and in the index; None removes it, `keep` leaves the old one too."""
    for shard in SHARDS:
        header, data = split(files[shard])
        if name not in header:
            continue
        parts = {key: data[slice(*entry["data_offsets"])] for key, entry in header.items() if key != "__metadata__"}
        entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
        if new is not None:
            parts[new], entries[new] = parts[name], {**entries[name]}
        if not keep:
            del parts[name], entries[name]
        files[shard] = _assembled(entries, parts)

        def change(index: dict[str, Any], shard: str = shard) -> None:
            if not keep:
                del index["weight_map"][name]
            if new is not None:
                index["weight_map"][new] = shard

        edit_json(files, INDEX, change)


def _assembled(entries: dict[str, Any], parts: dict[str, bytes]) -> bytes:
    header, offset = {}, 0
    for key, entry in entries.items():
        header[key] = {**entry, "data_offsets": [offset, offset + len(parts[key])]}
        offset += len(parts[key])
    return join({"__metadata__": {"format": "pt"}, **header}, b"".join(parts.values()))


@maker(4)
def lost_tensors(rng: random.Random, files: Files) -> Damage:
    pattern = rng.choice(
        (
            r"experts\.0\.", r"experts\.3\.", r"layers\.1\..*experts", r"experts", r"(up_proj|w3)[._]", r"(down_proj|w2)[._]", r"scale", r"scale_2$",
            r"bias$", r"layers\.0\.", r"layers\.1\..*(gate|router)\.", r"", r"global_scale$",
        )
    )  # fmt: skip
    names = [name for shard in SHARDS for name in split(files[shard])[0] if name != "__metadata__" and re.search(pattern, name)]
    names = names if names and rng.random() < 0.5 else [shard_of(rng, files, r"experts|gate\.|router")[1]]
    for name in names:
        move_tensor(files, name, None)
    return Damage(f"{len(names)} tensors removed, {names[0]} ... (pattern {pattern!r})")


@maker(4)
def renamed_tensor(rng: random.Random, files: Files) -> Damage:
    _, name = shard_of(rng, files, "experts")
    old, new = rng.choice(
        (
            ("experts.0", "experts.4"), ("experts.2", "experts.7"), ("experts.1.", "experts.01."), ("experts.", "expert."), ("layers.1", "layers.2"),
            ("layers.1", "layers.10"), ("experts.", "experts.99999999999999999999"), ("experts.", "experts.-1."), ("layers.", "layers.\x1b[2J"),
            ("proj", "Proj"), ("weight", "weights"), ("experts", "shared_experts"), ("layers", "x" * 5_000), ("layers.0", "layers.٠"),
            ("scale", "scales"), ("", ""), ("experts.", "experts./../"), ("layers.1.", "layers.1.\0"),
        )
    )  # fmt: skip
    renamed = name.replace(old, new, 1) if old else ""
    if renamed == name:
        renamed = f"{name}x"
    move_tensor(files, name, renamed, keep=rng.random() < 0.3)
    return Damage(f"{name} called {renamed[:200]!r}")


@maker(2)
def shifted_experts(rng: random.Random, files: Files) -> Damage:
    """Every expert of a layer one number up, or two of them exchanged: whose router says otherwise, nobody can tell; a gap can be told."""
    layer, swap = rng.randrange(2), rng.random() < 0.3
    names = [name for shard in SHARDS for name in split(files[shard])[0] if re.search(rf"layers\.{layer}\..*experts\.\d", name)]
    if not names:
        return lost_tensors(rng, files)
    number = {0: 1, 1: 0} if swap else {expert: expert + 1 for expert in range(4)}
    target = {name: re.sub(r"(?<=experts\.)\d", lambda match: str(number.get(int(match[0]), int(match[0]))), name) for name in names}
    for name in names:
        move_tensor(files, name, f"moving.{target[name]}")
    for name in names:
        move_tensor(files, f"moving.{target[name]}", target[name])
    return Damage(f"experts of layer {layer} renumbered {number}", "weights" if swap else "")


@maker(3)
def other_shape(rng: random.Random, files: Files) -> Damage:
    """A tensor with fewer or more elements, well described by its header."""
    shard, name = shard_of(rng, files, rng.choice(("experts", "experts", r"gate\.|router")))
    header, data = split(files[shard])
    parts = {key: data[slice(*entry["data_offsets"])] for key, entry in header.items() if key != "__metadata__"}
    entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
    shape = entries[name]["shape"]
    first = shape[0] if shape else 1
    row = len(parts[name]) // max(first, 1)
    kind = rng.randrange(4)
    if kind == 0:
        parts[name], entries[name]["shape"] = parts[name][:-row] if row else b"", [first - 1, *shape[1:]]
    elif kind == 1:
        parts[name], entries[name]["shape"] = parts[name] + parts[name][-row:], [first + 1, *shape[1:]]
    elif kind == 2:
        parts[name], entries[name]["shape"] = b"", [0, *shape[1:]]
    else:
        entries[name]["shape"] = shape[::-1] if len(set(shape)) > 1 else [1, 1, *shape, 1]
    files[shard] = _assembled(entries, parts)
    return Damage(f"{name} {entries[name]['dtype']} {shape} is now {entries[name]['shape']}")


@maker(4)
def odd_scale(rng: random.Random, files: Files) -> Damage:
    """Bytes of a scale, or of any other tensor, set to what is no number."""
    shard, name = shard_of(rng, files, rng.choice(("scale", "scale", "scale", "experts", "gate|router")) if _has_scales(files) else "experts")
    header, data = split(files[shard])
    entry = header[name]
    first, end = entry["data_offsets"]
    values = {
        "F32": [struct.pack("<f", value) for value in (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0, 1e-45, 3e38)],
        "BF16": [b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"],
        "F8_E4M3": [b"\x7f", b"\xff", b"\xb8", b"\x80", b"\0"],
        "F8_E8M0": [b"\xff", b"\0", b"\xfe"],
        "I64": [struct.pack("<q", value) for value in (-1, 4, 2**62, -(2**63))],
        "I32": [struct.pack("<i", value) for value in (-1, 4)],
    }.get(entry["dtype"], [b"\xff", b"\0", b"\x7f"])
    value = rng.choice(values)
    place = first + len(value) * rng.randrange(max((end - first) // len(value), 1))
    several = rng.random() < 0.3
    changed = bytearray(data)
    changed[first:end] = value * ((end - first) // len(value)) if several else changed[first:end]
    changed[place : place + len(value)] = value
    files[shard] = join(header, bytes(changed))
    return Damage(f"{name} {entry['dtype']}: {'all' if several else 'one'} {value.hex()}", _legal_value(name, entry["dtype"], value))


def _has_scales(files: Files) -> bool:
    return any("scale" in name for shard in SHARDS for name in split(files[shard])[0])


def _legal_value(name: str, dtype: str, value: bytes) -> str:
    """ "weights" where the bytes are a number that such a tensor may have."""
    if "scale" not in name or "experts" not in name:
        is_number = not (dtype == "F8_E4M3" and value in (b"\x7f", b"\xff")) and not (dtype in ("F32", "BF16") and value[-2:] in (b"\xc0\x7f",))
        return "weights" if is_number or dtype == "U8" or dtype == "I8" else ""
    if dtype == "F32":
        return "weights" if struct.unpack("<f", value)[0] > 0 and struct.unpack("<f", value)[0] < float("inf") else ""
    legal = {"F8_E4M3": (b"\0",), "F8_E8M0": (b"\0", b"\xfe"), "U8": (b"\0", b"\x7f")}.get(dtype, ())
    return "weights" if value in legal else ""


@maker(1)
def other_tensor(rng: random.Random, files: Files) -> Damage:
    """A tensor that is no expert's and no router's, removed or renamed."""
    _, name = shard_of(rng, files, r"attn|norm|embed|head")
    new = rng.choice((None, name.replace("layers.1", "layers.2") + "x", name.upper()))
    move_tensor(files, name, new)
    return Damage(f"{name} called {new}", "outside")
