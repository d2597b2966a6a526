"""`print_document`: JSON as commands print it. Without torch, which `doctor` must do without."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def print_document(document: Any, default: Callable[[Any], Any] | None = None) -> None:
    """Print what a command found as one JSON document: all that `--json` leaves on stdout (docs/json.md). `default`: as of `json.dumps`."""
    print(json.dumps(document, indent=2, allow_nan=False, default=default))
