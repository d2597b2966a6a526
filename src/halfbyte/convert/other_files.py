"""Which files of a model directory go along unchanged when its weights are converted."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from halfbyte.checkpoint.json_files import READABLE
from halfbyte.errors import CheckpointError, printable

_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
_REPLACED_FILES = ("config.json", "hf_quant_config.json", "README.md")
_OF_OTHER_WEIGHTS = re.compile(r"(^|/)eval[^/]*(/|\.jsonl?$)")  # results of evaluations
_MOST_BYTES = 10**9  # of a file beside the weights: what is longer is no tokenizer, licence or code
logger = logging.getLogger(__name__)


def other_files(path: Path) -> Iterator[tuple[Path, str]]:
    """Tokenizer, generation settings, licence, model code ...: every visible file that is neither weights nor about them, and its name below `path`.

    Raises:
        CheckpointError: as `_visible_files`.
    """
    roots = [path.resolve()]
    if path.resolve().parent.name == "snapshots":  # of the Hub's cache, whose files are links
        roots.append(path.resolve().parent.parent / "blobs")
    for file in _visible_files(path):
        relative = file.relative_to(path).as_posix()
        if not file.is_file() or file.name.endswith(_WEIGHT_FILES) or _OF_OTHER_WEIGHTS.search(relative) or relative in _REPLACED_FILES:
            continue
        if not any(file.resolve().is_relative_to(root) for root in roots):
            logger.warning("%s is a link that leads out of the model directory: it is not copied", printable(str(file)))
        elif file.stat().st_size > _MOST_BYTES:
            logger.warning("%s has over %d bytes: it is not copied", printable(str(file)), _MOST_BYTES)
        else:
            yield file, relative


def _visible_files(path: Path) -> Iterator[Path]:
    """Everything below a directory that is no directory, without what is hidden or compiled.

    Raises:
        CheckpointError: a directory cannot be listed. What lies there would be missed only when the result is used.
    """

    def refuse(error: OSError) -> NoReturn:
        raise CheckpointError("cannot list the directory", where=error.filename, given=error.strerror, next_step=READABLE) from error

    for folder, folders, files in os.walk(path, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))
