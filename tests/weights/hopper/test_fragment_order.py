"""Fragment order is written once for the host and once for the device: the two agree."""

from __future__ import annotations

from pathlib import Path

from interpreted import run_interpreted_script

from halfbyte.weights.hopper.layout import FRAGMENT_COLUMN_BF16, FRAGMENT_COLUMN_FP8


def test_the_device_has_the_order_of_the_host() -> None:
    run_interpreted_script(Path(__file__).with_name("interpreted_fragment_order.py"))


def test_both_orders_have_every_column_once_and_keep_a_threads_columns_in_one_group_of_16() -> None:
    assert sorted(FRAGMENT_COLUMN_BF16) == sorted(FRAGMENT_COLUMN_FP8) == list(range(64))
    for t in range(4):  # m16n8k16 and m64nNk32: the positions of k that thread t of a quad has, by the manual of PTX
        bf16 = [16 * s + 8 * p + 2 * t + e for s in range(4) for p in range(2) for e in range(2)]
        fp8 = [32 * step + 16 * half + 4 * t + b for step in range(2) for half in range(2) for b in range(4)]
        for positions, columns in ((bf16, FRAGMENT_COLUMN_BF16), (fp8, FRAGMENT_COLUMN_FP8)):
            assert sorted(columns[position] for position in positions) == list(range(16 * t, 16 * t + 16))
