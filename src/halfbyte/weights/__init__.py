"""Canonical experts to kernel-ready ones."""

from halfbyte.weights.checks import ScaleChecks
from halfbyte.weights.engines.trtllm_gen import trtllm_gen_row_order
from halfbyte.weights.prepared import PreparedExperts

__all__ = ["PreparedExperts", "ScaleChecks", "trtllm_gen_row_order"]
