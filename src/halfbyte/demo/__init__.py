"""The demonstration: what FP4 does to a small real model, measured on a CPU in about a minute."""
