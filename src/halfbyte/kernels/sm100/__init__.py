"""Blackwell: compiled in CI, never run, in no table."""
