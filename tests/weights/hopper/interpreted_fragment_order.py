"""Run by test_fragment_order.py under TRITON_INTERPRET=1: the device's arithmetic against the host's tables, over two blocks of 64 columns."""

import torch
import triton
import triton.language as tl

from halfbyte.weights.hopper.fragment_order import PAIR_STEP, column_at, first_position_of, pair_at, pair_of_fp8_word
from halfbyte.weights.hopper.layout import FRAGMENT_COLUMN_BF16, FRAGMENT_COLUMN_FP8


@triton.jit
def evaluate(columns_ptr, pairs_ptr, positions_ptr, words_ptr):
    position, pair, group, word = tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, 8), tl.arange(0, 32)
    tl.store(columns_ptr + position, column_at(position))
    tl.store(pairs_ptr + pair, pair_at(pair))
    tl.store(positions_ptr + group, first_position_of(group))
    tl.store(words_ptr + word, pair_of_fp8_word(word))


if __name__ == "__main__":
    columns, pairs, positions, words = (torch.empty(size, dtype=torch.int32) for size in (64, 64, 8, 32))
    evaluate[(1,)](columns, pairs, positions, words)
    assert columns.tolist() == list(FRAGMENT_COLUMN_BF16)
    host = [64 * (position // 64) + FRAGMENT_COLUMN_BF16[position % 64] for position in range(128)]
    assert [2 * pair + e for pair in pairs.tolist() for e in range(2)] == host
    for group, first in enumerate(positions.tolist()):  # of a group of 16 columns: eight pairs, in order
        at = [first + PAIR_STEP.value * i for i in range(8)]
        assert [host[2 * position] for position in at] == [16 * group + 2 * i for i in range(8)]
    for word, pair in enumerate(words.tolist()):
        order = (0, 2, 1, 3) if word // 4 % 2 == 0 else (1, 3, 0, 2)
        expected = [64 * (word // 16) + FRAGMENT_COLUMN_FP8[4 * (word % 16) + byte] for byte in range(4)]
        assert [2 * pair + column for column in order] == expected, word
    print("ok")
