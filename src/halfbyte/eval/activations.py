"""`choose_activations`: the fastest kind of activations whose cost in quality is within a budget."""

from __future__ import annotations

from collections.abc import Callable

from halfbyte.formats.activation_formats import ActivationFormat

# What differs in speed on Hopper, the only GPU on which it does: "mxfp8" and "nvfp4" compute in bf16 there, for the numbers of other hardware.
FASTEST_FIRST: tuple[ActivationFormat, ...] = ("fp8", "bf16")


def choose_activations(perplexity_of: Callable[[ActivationFormat], float], budget: float) -> tuple[ActivationFormat, dict[ActivationFormat, float]]:
    """Return the first of `FASTEST_FIRST` whose perplexity is at most (1 + budget) times that of "bf16", and all perplexities measured.

    Args:
        perplexity_of: measures a text with a kind of activations; called once a kind, with "bf16" first.
        budget: a fraction; 0.005 allows half a per cent.

    >>> choose_activations({"bf16": 10.0, "fp8": 10.04}.__getitem__, 0.005)
    ('fp8', {'bf16': 10.0, 'fp8': 10.04})
    >>> choose_activations({"bf16": 10.0, "fp8": 10.06}.__getitem__, 0.005)[0]
    'bf16'
    """
    measured: dict[ActivationFormat, float] = {"bf16": perplexity_of("bf16")}
    for kind in FASTEST_FIRST:
        if kind not in measured:
            measured[kind] = perplexity_of(kind)
        if measured[kind] <= (1 + budget) * measured["bf16"]:
            return kind, measured
    return "bf16", measured  # a perplexity that is not a number
