"""Experts into memory, ready for the kernels: from canonical weights, from a checkpoint's files, or from those that an earlier start left."""

from halfbyte.loading.prepared import iter_prepared, load_prepared, prepare

__all__ = ["iter_prepared", "load_prepared", "prepare"]
