"""Where Triton releases differ. Everything else in this package is the same for Triton 3.6 and newer."""

from triton.experimental.gluon.language.nvidia.hopper import tma

# Named async_copy_global_to_shared up to Triton 3.6; a call of that name raises in 3.9.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
