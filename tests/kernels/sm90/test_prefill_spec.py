"""What of a prefill kernel follows from its configuration and the size of the matrix."""

from __future__ import annotations

from halfbyte.kernels.sm90 import configs
from halfbyte.kernels.sm90.prefill_spec import derived


def test_weights_are_loaded_a_run_ahead_where_a_matrix_has_enough_columns() -> None:
    def ahead(config: configs.PrefillConfig) -> list[tuple[bool, int]]:
        """w13 and w2 of Qwen3-30B, w2 of Qwen3-235B, w13 of DeepSeek-R1."""
        fields = [derived(config, 64, columns // 64) for columns in (2048, 768, 1536, 7168)]
        return [(each["words_ahead"], each["product_tiles"]) for each in fields]

    assert ahead(configs.TINY) == [(True, 4), (False, 1), (True, 4), (True, 4)]
    assert ahead(configs.MEDIUM) == [(True, 1), (False, 1), (True, 1), (True, 1)]
    assert ahead(configs.LARGE) == ahead(configs.FP8_SMALL) == [(False, 1)] * 4  # which lack registers for it


def test_no_step_reaches_across_a_run() -> None:
    assert [derived(configs.TINY, 64, tiles)["steps"] for tiles in (1, 4, 5, 45)] == [1, 1, 2, 12]  # of 256 columns
    assert [derived(configs.LARGE, 64, tiles)["steps"] for tiles in (1, 4, 5, 45)] == [1, 4, 5, 45]  # of 64


def test_a_group_is_what_the_consumers_multiply_at_once() -> None:
    assert [(each["group_tiles"], each["groups"]) for each in (derived(configs.MEDIUM, rows, 8) for rows in (1, 4, 5))] == [(4, 1), (4, 1), (4, 2)]
