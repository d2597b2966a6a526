"""What pictures are drawn in and written by. Importing this says what to install, so a command that plots imports it before any work."""

from __future__ import annotations

from pathlib import Path

from halfbyte.checkpoint.writer import replacing
from halfbyte.errors import UnsupportedError

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise UnsupportedError("the plot needs matplotlib", where=__name__, next_step="run: pip install 'halfbyte[bench]'") from error

__all__ = ["Figure", "write_picture"]


def write_picture(figure: Figure, file: Path, dpi: int = 100) -> None:
    """Write a PNG, which is there only when it is complete.

    Raises:
        CheckpointError: the file cannot be written.
    """
    with replacing(file) as partial:
        figure.savefig(partial, format="png", dpi=dpi)
