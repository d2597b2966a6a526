"""A checkpoint's experts into memory, ready for the kernels: from its files, or from those that an earlier start left."""

from halfbyte.loading.prepared import iter_prepared, load_prepared

__all__ = ["iter_prepared", "load_prepared"]
