"""Integer arithmetic on the host. Triton's own functions do the same, but wrap what they return: several microseconds each, at every launch."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    """
    >>> ceil_div(7, 3)
    3
    """
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n > 0.

    >>> [next_power_of_2(n) for n in (1, 2, 3, 64, 65)]
    [1, 2, 4, 64, 128]
    """
    return 1 << (n - 1).bit_length()
