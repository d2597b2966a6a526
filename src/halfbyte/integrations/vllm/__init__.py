"""halfbyte in vLLM: `pip install halfbyte` beside vLLM, and `vllm serve MODEL` runs FP4 experts on halfbyte's kernels. See docs/vllm.md.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). Nothing else here is for callers.
"""

from __future__ import annotations

import logging

from halfbyte.integrations.engines import FAILURES  # here, for vLLM goes on without a plug-in that cannot be imported

STATS: dict[str, float] = {}
"""Numbers of the model that this process serves: `EngineModel.stats`."""


def register() -> None:
    """Put the hook into vLLM. Where that fails, vLLM starts without halfbyte, and the log says why."""
    try:
        from halfbyte.integrations.vllm.hook import install

        install()
    except FAILURES as error:
        logging.getLogger("vllm.halfbyte").warning("halfbyte is not used: %s: %s", type(error).__name__, error)
