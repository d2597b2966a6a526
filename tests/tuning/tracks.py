"""What a race process does, without a device and without torch, so that it starts at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable, Sequence

from halfbyte.tuning.times import Time


class Track:
    """A configuration named "hangs" or "dies" does; results of those in `wrong` are."""

    def __init__(self, wrong: Sequence[Hashable] = ("wrong",)):
        self._wrong = wrong

    def ceilings(self) -> dict[str, float | None]:
        return {"process": float(os.getpid())}

    def race(self, num_tokens: int, routing: str, configs: Sequence[Hashable], starting: Callable[[Hashable], None]) -> dict[Hashable, Time]:
        for config in configs:
            starting(config)
            if config == "dies":
                os._exit(11)
            if config == "hangs":
                time.sleep(600)
        return {config: Time(reason="the result is wrong") if config in self._wrong else Time(float(num_tokens)) for config in configs}
