"""Kernels that every GPU from sm_80 on shares: sorting, summing, routing, and rounding activations."""
