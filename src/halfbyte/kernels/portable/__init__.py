"""The layer on canonical weights, in Triton (sm_80 and newer): correct, not fast."""
