"""Kernels in plain Triton, for any CUDA GPU that Triton compiles for. Imported on first use, never by `import halfbyte`."""
