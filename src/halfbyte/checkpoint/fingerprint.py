"""Is this still the checkpoint that something was made from? Answered without reading any weights."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path

_DESCRIPTIONS = ("config.json", "hf_quant_config.json", "model.safetensors.index.json")


def fingerprint(path: Path, files: Iterable[Path]) -> str:
    """64 hexadecimal digits that follow from the description files, and the name, size, header and time of change (in seconds) of every weight file.

    Found is every file that was written again by ordinary means, even with tensors of the same names and sizes. Not found are other contents in a
    file whose size, header and time are as they were: a damaged disk, a tool that sets times back, a change in the same second. Copies keep their
    fingerprint when they keep their times (`cp -p`, `rsync -a`).
    """
    digest = hashlib.sha256()
    for name in _DESCRIPTIONS:
        file = path / name
        digest.update(hashlib.sha256(file.read_bytes() if file.exists() else b"").digest())
    for file in sorted(files):
        status = file.stat()
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = hashlib.sha256(stream.read(length)).hexdigest()
        digest.update(json.dumps([file.name, status.st_size, int(status.st_mtime), header]).encode())
    return digest.hexdigest()
