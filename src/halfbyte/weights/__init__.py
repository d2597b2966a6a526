"""Canonical experts to kernel-ready ones."""

from halfbyte.weights.prepared import PreparedExperts, prepare

__all__ = ["PreparedExperts", "prepare"]
