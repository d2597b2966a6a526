"""JSON that others wrote, alone or as the header of a safetensors file, read with limits.

No size, depth, number or name in it stops the program other than by an error that names the file.
"""

from __future__ import annotations

import json
import lzma
import struct
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.errors import CheckpointError

AGAIN = "download the file again"
READABLE = "make it readable, and repeat the command"
MAX_BYTES = 100_000_000  # of a header, by safetensors' own limit; the index of DeepSeek-R1, which is longest, has 16 MB
MAX_LETTERS = 1_000_000_000  # of a text to measure or calibrate on
_HALVES = tuple(f"\\u{letter}{digit}".encode() for letter in "dD" for digit in "89abcdefABCDEF")


def read_json(file: Path, next_step: str = AGAIN, if_missing: str = "a model directory has config.json and safetensors files") -> dict[str, Any]:
    """The JSON object in a regular file. `next_step` is of the errors, `if_missing` where there is no file.

    Raises:
        CheckpointError: absent, unreadable, another kind of file, too long, or not one JSON object (see `parse_object`).
    """
    if not file.exists():
        raise CheckpointError("missing file", where=str(file), next_step=if_missing)
    raw = _read(file, 0, MAX_BYTES + 1, next_step)
    if len(raw) > MAX_BYTES:
        raise _too_long(file, f"over {MAX_BYTES} bytes", next_step)
    try:
        return parse_object(raw)
    except ValueError as error:
        raise CheckpointError(f"not readable JSON: {error}", where=str(file), next_step=next_step) from error


class Header(NamedTuple):
    """Of a safetensors file: what it says of each tensor, its metadata, and where the data begin and the file ends."""

    entries: dict[str, Any]
    metadata: dict[str, str]
    data_start: int
    size: int


def read_header_of(file: Path, next_step: str = AGAIN) -> Header:
    """The header of a safetensors file; what it says of each tensor is not looked at. `next_step` is of the errors.

    Raises:
        CheckpointError: unreadable, another kind of file, shorter than its header, a header that is too long or not one JSON object.
    """
    start = _read(file, 0, 8, next_step)
    size = file.stat().st_size
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if len(start) < 8 or 8 + length > size:
        raise wrong_length(file, size, 8 + length, next_step)
    if length > MAX_BYTES:
        raise _too_long(file, f"{length} bytes", next_step)
    try:
        entries = parse_object(_read(file, 8, length, next_step))
        metadata = entries.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ is no object of strings")
    except ValueError as error:
        raise damaged_header(file, error, next_step) from error
    return Header(entries, metadata, 8 + length, size)


def wrong_length(file: Path, size: int, needed: int, next_step: str = AGAIN) -> CheckpointError:
    """The error for a safetensors file of `size` bytes that should have `needed`."""
    problem = "truncated safetensors file" if size < needed else "bytes behind the last tensor of a safetensors file"
    return CheckpointError(problem, where=str(file), given=f"{size} bytes", needed=f"{needed} bytes", next_step=next_step)


def damaged_header(file: Path, reason: object, next_step: str = AGAIN) -> CheckpointError:
    """The error for a header that says what cannot be."""
    return CheckpointError(f"damaged safetensors header: {reason}", where=str(file), next_step=next_step)


def parse_object(raw: bytes) -> dict[str, Any]:
    """One JSON object in UTF-8.

    Raises:
        ValueError: something else, a name given twice, half a surrogate pair, or more levels than can be read.

    >>> parse_object(b'{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the name 'a' is given twice
    """
    try:
        content = json.loads(raw.decode(), object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("too many levels") from None
    if not isinstance(content, dict):
        raise ValueError(f"a {type(content).__name__}, not an object")
    if any(half in raw for half in _HALVES):
        json.dumps(content, ensure_ascii=False).encode()  # UnicodeEncodeError, a ValueError, where the other half is missing
    return content


def json_lines(text: str) -> list[str]:
    """The lines of a JSONL file. Within strings JSON allows what else Python takes for the end of a line, U+2028 for instance."""
    return text.split("\n")


def text_of(file: Path) -> str:
    """What a text file says; "" where there is none that can be read."""
    try:
        return file.read_text(encoding="utf-8") if file.is_file() and file.stat().st_size <= MAX_BYTES else ""
    except (OSError, ValueError):
        return ""


def read_text(file: Path) -> str:
    """A text in UTF-8, at most `MAX_LETTERS` long, in a regular file; one that ends in .xz is decompressed.

    Raises:
        OSError, ValueError: there is none, or another kind of file, which may have no end; no UTF-8, or badly compressed.
    """
    if file.exists() and not file.is_file():
        raise ValueError("not a regular file")
    with lzma.open(file, "rt", encoding="utf-8") if file.suffix == ".xz" else file.open(encoding="utf-8") as stream:
        try:
            text = stream.read(MAX_LETTERS + 1)
        except (EOFError, lzma.LZMAError) as error:
            raise ValueError(str(error)) from error
    if len(text) > MAX_LETTERS:
        raise ValueError(f"longer than {MAX_LETTERS} letters")
    return text


def _read(file: Path, first: int, count: int, next_step: str = AGAIN) -> bytes:
    """Up to `count` bytes of a regular file: opening a pipe would wait for somebody to write, and a device may have no end."""
    if not file.is_file():
        raise CheckpointError("not a regular file" if file.exists() else "missing file", where=str(file), next_step=next_step)
    try:
        with file.open("rb") as stream:
            stream.seek(first)
            return stream.read(count)
    except OSError as error:
        next_step = READABLE if isinstance(error, PermissionError) else next_step
        raise CheckpointError(f"cannot read the file: {error.strerror}", where=str(file), next_step=next_step) from error


def _too_long(file: Path, given: str, next_step: str = AGAIN) -> CheckpointError:
    return CheckpointError(
        "no description of a model is as long", where=str(file), given=given, needed=f"at most {MAX_BYTES} bytes of JSON", next_step=next_step
    )


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return unique
