"""halfbyte in SGLang: `pip install halfbyte` beside SGLang, and its server runs FP4 experts on halfbyte's kernels. See docs/sglang.md.

SGLang calls `register` in each of its processes (entry point group `sglang.srt.plugins`). Nothing else here is for callers.
"""

from __future__ import annotations

import logging

from halfbyte.integrations.engines import FAILURES  # here, for SGLang goes on without a plug-in that cannot be imported

STATS: dict[str, float] = {}
"""Numbers of the model that this process serves: `EngineModel.stats`."""


def register() -> None:
    """Put the hooks into SGLang. Where that fails, SGLang starts without halfbyte, and the log says why."""
    try:
        from halfbyte.integrations.sglang.hook import install

        install()
    except FAILURES as error:
        logging.getLogger("sglang.halfbyte").warning("halfbyte is not used: %s: %s", type(error).__name__, error)
