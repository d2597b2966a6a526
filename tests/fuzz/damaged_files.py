"""Files that are cut, absent, something else than files, or texts that are no JSON."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from fuzz.making import Damage, json_files, maker
from fuzz.sound import SHARDS, TOKENIZER, Files, join, split


@maker(3)
def truncated(rng: random.Random, files: Files) -> Damage:
    name = rng.choice([*json_files(files), *SHARDS * 3])
    size, header = len(files[name]), struct.unpack("<Q", files[name][:8])[0] if name in SHARDS else 100
    length = min(rng.choice((0, 1, 7, 8, 9, 8 + header - 1, 8 + header, 8 + header + 1, size - 1, size - 2, rng.randrange(size))), size - 1)
    files[name] = files[name][:length]
    return Damage(f"{name} cut to {length} of {size} bytes")


@maker(1)
def extended(rng: random.Random, files: Files) -> Damage:
    name, more = rng.choice([*SHARDS, *json_files(files)]), rng.choice((b"\0", b"\0" * 8, b"x" * 4096, b"\n{}"))
    files[name] += more
    return Damage(f"{name}: {len(more)} bytes more at the end")


def _directory(path: Path) -> None:
    path.mkdir()


def _socket(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


def _sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 2**39))
        stream.truncate(2**40)


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "a directory": _directory,
    "a pipe": os.mkfifo,
    "a socket": _socket,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /etc/passwd": lambda path: path.symlink_to("/etc/passwd"),
    "a link to its directory": lambda path: path.symlink_to("."),
    "a terabyte of zeros": _sparse,
    "unreadable": lambda path: (path.write_bytes(b"{}"), path.chmod(0)),
}


@maker(3)
def odd_file(rng: random.Random, files: Files) -> Damage:
    name = rng.choice([*json_files(files), *SHARDS, TOKENIZER, "README.md", "notes"])
    kind = rng.choice(list(ODD_FILES))
    files[name] = ODD_FILES[kind]
    return Damage(f"{name} is {kind}")


@maker(1)
def missing_file(rng: random.Random, files: Files) -> Damage:
    name = rng.choice([*json_files(files), *SHARDS])
    del files[name]
    return Damage(f"{name} is absent")


def _latin_1(text: bytes) -> bytes:
    return text[:1] + '"\xfc": 1, '.encode("latin-1") + text[1:]


def _twice(text: bytes) -> bytes:
    """The first key once more, with another value in front."""
    key = next(iter(json.loads(text)))
    return f'{{{json.dumps(key)}: "first", '.encode() + text[1:]


def _twice_inside(text: bytes) -> bytes:
    """A key of an inner object once more."""
    match = re.search(rb'\{"(\w[^"]*)": ', text[1:])
    return text if match is None else text[: match.start() + 2] + b'"' + match[1] + b'": 7, ' + text[match.start() + 2 :]


TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "Latin-1": _latin_1,
    "a NUL": lambda text: text.replace(b":", b":\0", 1),
    "NULs at the end": lambda text: text + b"\0\0",
    "a comma too many": lambda text: text[:-1] + b",}",
    "nothing": lambda text: b"",
    "blanks": lambda text: b"  \n",
    "null": lambda text: b"null",
    "a list": lambda text: b"[" + text + b"]",
    "a number": lambda text: b"12",
    "a string": lambda text: b'"abc"',
    "100,000 brackets": lambda text: b"[" * 100_000,
    "100,000 objects": lambda text: b'{"a":' * 100_000,
    "deep inside": lambda text: text[:1] + b'"x": ' + b"[" * 5_000 + b"]" * 5_000 + b", " + text[1:],
    "a long number": lambda text: text[:1] + b'"x": ' + b"9" * 5_000 + b", " + text[1:],
    "a key twice": _twice,
    "an inner key twice": _twice_inside,
    "an escape that is none": lambda text: text[:1] + b'"\\x": 1, ' + text[1:],
    "a million spaces": lambda text: text[:1] + b" " * 1_000_000 + text[1:],
    "a terminal's escapes": lambda text: text[:1] + b'"\\u001b[2J\\u202e": 1, ' + text[1:],
    "half a character": lambda text: text[:1] + b'"\\ud800": "\\udfff", ' + text[1:],
}
_HARMLESS_TEXTS = ("a million spaces", "a terminal's escapes", "half a character", "deep inside")


@maker(4)
def odd_text(rng: random.Random, files: Files) -> Damage:
    name, kind = rng.choice([*json_files(files), *SHARDS]), rng.choice(list(TEXTS))
    if name in SHARDS:
        header, data = split(files[name])
        files[name] = join(TEXTS[kind](json.dumps(header).encode()), data)
    else:
        files[name] = TEXTS[kind](files[name])
    return Damage(f"{name}: {kind}")


@maker(6)
def flipped_bit(rng: random.Random, files: Files) -> Damage:
    name = rng.choice([*json_files(files), *SHARDS * 4])
    content, legal = bytearray(files[name]), "text"
    position = rng.randrange(len(content))
    if name in SHARDS:
        header = struct.unpack("<Q", content[:8])[0]
        position = rng.choice((rng.randrange(8), 8 + rng.randrange(header), 8 + header + rng.randrange(len(content) - 8 - header)))
        legal = "" if position < 8 else "text" if position < 8 + header else "weights"
    bit = rng.randrange(8)
    content[position] ^= 1 << bit
    files[name] = bytes(content)
    around = bytes(content[max(0, position - 12) : position + 12]) if legal == "text" else b""
    return Damage(f"{name}: bit {bit} of byte {position} flipped {around!r}", legal)
