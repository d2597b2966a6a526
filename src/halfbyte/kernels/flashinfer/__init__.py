"""Kernels of the optional package flashinfer-python for Blackwell GPUs: the module of one provider, `fused_moe`."""
