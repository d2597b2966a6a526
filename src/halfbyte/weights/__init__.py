"""Canonical experts to kernel-ready ones."""

from halfbyte.weights.engines.trtllm_gen import trtllm_gen_row_order
from halfbyte.weights.load import iter_prepared, load_prepared
from halfbyte.weights.prepared import PreparedExperts, prepare

__all__ = ["PreparedExperts", "iter_prepared", "load_prepared", "prepare", "trtllm_gen_row_order"]
