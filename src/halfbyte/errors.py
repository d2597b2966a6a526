"""The errors halfbyte raises on purpose. Each one says what was given, what is needed, where, and what to do next."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.EPIPE)
# Control characters, and those that turn the direction of writing: what a file calls its tensors must not drive a terminal.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` on one line, fit for a terminal: line breaks become spaces, other control characters are written out.

    >>> print(printable("layers.0\\x1b[2J\\nweight"))
    layers.0\\x1b[2J weight
    """
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], " ".join(text.splitlines()))


def shortened(text: str, most: int = 1_500) -> str:
    """`text` without its middle where it is longer than `most`: a name or a value out of a file may have any length.

    >>> shortened("a" * 40 + "b" * 60, 20)
    'aaaaaaaaaaaaaaa [100 letters] bbbbb'
    """
    return text if len(text) <= most else f"{text[: most * 3 // 4]} [{len(text)} letters] {text[-(most // 4) :]}"


def reason_of(error: Exception, most: int = 300) -> str:
    """What an error of another package says, on one line and not without end; its type where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory: torch says so by a text on a CPU, and by a class on a GPU, which this module must not import."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error is no fault of a model's files, nor ours: too little memory, a full or broken disk, or a reader of our output who has gone."""
    return is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in _OF_THE_MACHINE)


class HalfbyteError(Exception):
    """Base of the three below; `exit_code` is what the command line returns for it."""

    exit_code = 1

    def __init__(self, problem: str, *, where: str = "", given: object = None, needed: object = None, next_step: str = ""):
        """Build the one-line message `where: problem (given ...; needed ...). next_step`; empty parts are left out, and long ones shortened.

        >>> print(HalfbyteError("the download failed: no network.", where="org/name", next_step="try again"))
        org/name: the download failed: no network. Try again
        """
        details = [shortened(f"{name} {value}") for name, value in (("given", given), ("needed", needed)) if value is not None]
        message = f"{shortened(where)}: {shortened(problem)}" if where else shortened(problem)
        if details:
            message += f" ({'; '.join(details)})"
        if next_step:
            message = f"{message.removesuffix('.')}. {next_step[0].upper()}{next_step[1:]}"
        super().__init__(printable(message))


class InputError(HalfbyteError, ValueError):
    """An argument or a tensor passed to a function does not fit."""


class CheckpointError(HalfbyteError):
    """A file or directory is missing, damaged, inconsistent or cannot be written."""


@contextmanager
def foreign(problem: str, *, where: str, next_step: str) -> Iterator[None]:
    """Within, what another package raises, whatever that is for broken files, becomes a CheckpointError.

    >>> with foreign("transformers cannot run the model", where="DIR", next_step="download it again"):
    ...     [][1]
    Traceback (most recent call last):
    ...
    halfbyte.errors.CheckpointError: DIR: transformers cannot run the model: list index out of range. Download it again
    """
    try:
        yield
    except HalfbyteError:
        raise
    except Exception as error:
        if is_of_the_machine(error):
            raise
        raise CheckpointError(f"{problem}: {reason_of(error)}", where=where, next_step=next_step) from error


class UnsupportedError(HalfbyteError):
    """Valid, but not possible here: no kernel, no such format support, missing hardware or optional package."""

    exit_code = 3
