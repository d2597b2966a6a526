"""What commands share: types of arguments, a quiet transformers, the choice of device."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from halfbyte.arguments import as_device
from halfbyte.checkpoint.families.description import MAX_LAYERS
from halfbyte.cli.progress import Bar
from halfbyte.errors import CheckpointError, UnsupportedError, foreign

if TYPE_CHECKING:
    from halfbyte.checkpoint import Checkpoint

_Item = TypeVar("_Item")
_MAX_EXPERTS = 1 << 16  # far above any model, and few enough to be gone through one by one
_MAX_THREADS = 1024  # OpenMP ends the process where it cannot make them
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json", "tokenization_*.py")


def _integer(needed: str, low: int, high: int = sys.maxsize) -> Callable[[str], int]:
    """An argparse type: an integer from `low` to `high`, which errors call `needed`."""

    def parse(text: str) -> int:
        digits = text.strip()
        if not re.fullmatch(r"[+-]?[0-9]{1,19}", digits) or not low <= int(digits) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {needed}")
        return int(digits)

    return parse


def _number(needed: str, most: float = sys.float_info.max) -> Callable[[str], float]:
    """An argparse type: a number from 0 to `most`, which errors call `needed`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {needed}")
        return value

    return parse


def utf8(text: str) -> str:
    """An argparse type: text, which is UTF-8 whatever the locale says."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError as error:
        raise argparse.ArgumentTypeError("this is no UTF-8 text") from error


positive_int = _integer("an integer of at least 1", 1)
count = _integer("an integer of at least 0", 0)
layer_count = _integer(f"a number of layers from 1 to {MAX_LAYERS}", 1, MAX_LAYERS)
expert_count = _integer(f"a number of experts from 0 to {_MAX_EXPERTS}", 0, _MAX_EXPERTS)
port = _integer("a port from 0 to 65535", 0, 65535)
percent = _number("a percentage of at least 0")
temperature = _number("a temperature of at least 0")
relative_error = _number("an error of at least 0")
seconds = _number("a number of seconds of at least 0", math.inf)


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add `--threads`, for `set_threads`."""
    number = _integer(f"a number of threads from 1 to {_MAX_THREADS}", 1, _MAX_THREADS)
    parser.add_argument("--threads", type=number, metavar="N", help=f"CPU threads to compute with (default: {torch.get_num_threads()} here)")


def set_threads(count: int | None) -> None:
    """Let torch compute with so many threads in this process; None leaves it as it is."""
    if count is not None:
        torch.set_num_threads(count)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`, for `model_dtype`."""
    what = "what all but packed experts is held and computed in; auto: the model's own, or float32 on a CPU that is slow with 16 bits"
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=what)


def comma_list(item: Callable[[str], _Item]) -> Callable[[str], list[_Item]]:
    """An argparse type: items between commas, none twice."""

    def parse(text: str) -> list[_Item]:
        return [item(part.strip()) for part in dict.fromkeys(text.split(","))]

    return parse


def one_of(kind: str, items: Mapping[str, _Item], otherwise: str = "") -> Callable[[str], _Item]:
    """An argparse type: the item of that name."""

    def parse(text: str) -> _Item:
        if text not in items:
            raise argparse.ArgumentTypeError(f"unknown {kind} {text!r}; choose from {', '.join(items)}{otherwise}")
        return items[text]

    return parse


def usable_device(name: str | None) -> torch.device:
    """The device of that name, or for None the GPU where there is one, else the CPU.

    Raises:
        UnsupportedError: this machine, or this build of torch, has no such device; or it is another kind than halfbyte knows, as "meta" is.
    """
    device = as_device(name or ("cuda" if torch.cuda.is_available() else "cpu"), "--device")
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError("no kernels for this kind of device", where="--device", given=device.type, needed="cpu or cuda")
    return device


def load_model(model: str, device: torch.device, activations: Any = "bf16", *, dtype: str = "auto", shown: bool = True) -> tuple[Any, Any]:
    """`halfbyte.integrations.transformers.load` without transformers' own bars and warnings, of a model that has read one token; ours is `shown`.

    Raises:
        CheckpointError: as `load`; there is no tokenizer, the experts have a defect, or transformers cannot load or run the directory.
        UnsupportedError: as `load`.
    """
    from halfbyte.checkpoint import Checkpoint
    from halfbyte.integrations.transformers import load  # before transformers itself: it says what to install

    quieten_transformers()
    checkpoint = Checkpoint.open(model)  # what is no model at all is told as such
    path = checkpoint.path
    if not any(file for pattern in _TOKENIZER_FILES for file in path.glob(pattern)):
        raise CheckpointError("no tokenizer", where=str(path), needed="tokenizer.json or its like", next_step="copy it from the original model")
    _check_files(path)
    _check_dense_experts(checkpoint)
    with foreign("transformers cannot run this directory", where=str(path), next_step="run `halfbyte inspect` on it, or download it again"):
        with _bar_of_loading(f"loading {model}", shown):
            loaded, tokenizer = load(path, dtype=dtype, device=device, activations=activations)
        with torch.inference_mode():
            loaded(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device))
    return loaded, tokenizer


def _check_files(path: Path) -> None:
    """Raise CheckpointError for what has the name of a text, yet is none: transformers waits for pipes, and goes on without the rest."""
    for file in sorted(path.iterdir()):
        if file.suffix in (".json", ".jinja", ".model", ".txt") and not file.is_file():
            problem = "a link that leads nowhere" if file.is_symlink() and not file.exists() else "not a regular file"
            raise CheckpointError(problem, where=str(file), next_step="download the model again")


def _check_dense_experts(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for the first defect of experts in bf16 or fp8, which stock transformers loads: those in FP4 are checked as they load."""
    from halfbyte.checkpoint import find_defects
    from halfbyte.checkpoint.families import is_known

    if is_known(checkpoint.config, str(checkpoint.path / "config.json")) and not checkpoint.quantization.dialects:
        error = next((defect for defect in find_defects(checkpoint) if defect.severity == "error"), None)
        if error is not None:
            raise CheckpointError(f"layer {error.layer}: {error.message}", where=str(checkpoint.path))


@contextlib.contextmanager
def _bar_of_loading(label: str, shown: bool) -> Iterator[None]:
    """Within, what transformers goes through with a bar of its own, which are the tensors of a model, moves ours."""
    from transformers.utils import logging

    with Bar(label, unit="tensors", shown=shown) as bar:

        def counted(items: Collection[Any]) -> Iterator[Any]:
            for done, item in enumerate(items, 1):
                yield item
                bar.reach(done, len(items))

        previous = logging.set_tqdm_hook(lambda factory, args, options: counted(*args) if args else factory(**options))
        try:
            yield
        finally:
            logging.set_tqdm_hook(previous)


def quieten_transformers() -> None:
    """Turn off transformers' own progress bars and warnings, for this process."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
