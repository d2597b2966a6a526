"""Fragment order on the device: `layout.FRAGMENT_COLUMN_BF16` and `FRAGMENT_COLUMN_FP8` as arithmetic, for Triton and Gluon kernels.

Columns stay in pairs (16 t + 4 s + 2 p and the one after it), so most of this counts in pairs: pair 8 t + 2 s + p of a block of 32. In bf16 it stands
at position 8 s + 4 p + t, the eight pairs of a thread t so 4 apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

PAIR_STEP = tl.constexpr(4)  # between the pairs of a group of 16 columns, which stay in order


@triton.jit
def column_at(position):
    """Column at a position of a block of 64, bf16."""
    return 16 * (position // 2 % 4) + 4 * (position // 16) + 2 * (position // 8 % 2) + position % 2


@triton.jit
def pair_at(position):
    """Pair of columns at a position, counted in pairs from the first block on, bf16."""
    return position // 32 * 32 + 8 * (position % 4) + 2 * (position // 8 % 4) + position // 4 % 2


@triton.jit
def first_position_of(group):
    """Position, in pairs, of the first pair of a group of 16 columns, bf16."""
    return group // 4 * 32 + group % 4


@triton.jit
def pair_of_fp8_word(word):
    """The first of the two neighbouring pairs whose four codes are word 4 s + t of a block of 16, fp8.

    The bytes of the word are (p 0, e 0), (1, 0), (0, 1), (1, 1), for odd s with the halves exchanged.
    """
    return word // 16 * 32 + word % 4 * 8 + word // 4 % 4 * 2
