"""`Time`: what a race finds of one configuration, and `Measure`: what runs races."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple


class Time(NamedTuple):
    """Median time of a call and its interquartile range over the median; or, with a reason, why there is none."""

    us: float = math.inf
    spread: float = 0.0
    reason: str = ""


# (number of tokens, routing, configurations) to the time of each.
Measure = Callable[[int, str, Sequence[Hashable]], Mapping[Hashable, Time]]
