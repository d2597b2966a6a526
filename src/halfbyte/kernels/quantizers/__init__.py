"""The quantisers of activations, in Triton (sm_80 and newer)."""
