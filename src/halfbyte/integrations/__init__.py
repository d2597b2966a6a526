"""Thin adapters, one per host, each imported by its host alone; `packing` and `engines` are what they share."""
