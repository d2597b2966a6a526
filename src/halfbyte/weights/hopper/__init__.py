"""The layout of the Hopper kernels: what it is, how weights get there and back, and how kernels decode it."""
