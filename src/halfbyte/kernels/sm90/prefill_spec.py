"""What a prefill GEMM is compiled for (`gemm_prefill`). Plain Python: nothing here needs Triton or a device."""

from __future__ import annotations

from typing import Any, NamedTuple

from halfbyte.kernels.arithmetic import ceil_div
from halfbyte.kernels.sm90.configs import MIN_TILES_AHEAD, PrefillConfig
from halfbyte.weights.hopper.layout import WordsFor


class PrefillSpec(NamedTuple):
    """One matrix of one layer, and the configuration that multiplies by it. A tuple, because Triton writes constants as JSON.

    Attributes:
        row_tiles, column_tiles: tiles of 64 rows and columns that the matrix has.
        y_columns: of a row of the result.
        nvfp4, words_for: how the weights are coded.
        scaled: rows of x have a scale each.
        is_w13: the result goes through the activation; gated: and has a half that gates the other.
        kind, alpha, beta, limit: which activation (`epilogue.activate`).
        has_bias: the matrix has biases.
        sizes to warp_rows: fields of a `PrefillConfig`.
        max_rows: tokens of the largest tile.
        group_tiles, groups: row tiles that a program multiplies at once, and how many times so many the matrix has.
        steps: stages of x in all of K.
    """

    row_tiles: int
    column_tiles: int
    y_columns: int
    nvfp4: bool
    words_for: WordsFor
    scaled: bool
    is_w13: bool
    gated: bool
    kind: int
    alpha: float
    beta: float
    limit: float
    has_bias: bool
    sizes: tuple[tuple[int, int], ...]
    consumers: int
    step_k: int
    x_stages: int
    w_stages: int
    box: int
    consumer_registers: int
    launch_registers: int
    row_tiles_per_consumer: int
    fp8: bool
    words_ahead: bool
    product_tiles: int
    one_ring: bool
    warp_rows: int
    max_rows: int
    group_tiles: int
    groups: int
    steps: int


def derived(config: PrefillConfig, row_tiles: int, column_tiles: int) -> dict[str, Any]:
    """The fields that follow from the configuration and the size of the matrix. A step does not reach across a run of four tiles."""
    group_tiles = config.consumers * config.row_tiles_per_consumer
    whole, rest = divmod(column_tiles, 4)
    steps = whole * (4 * 64 // config.step_k) + ceil_div(rest * 64, config.step_k)
    words_ahead = config.words_ahead and column_tiles >= MIN_TILES_AHEAD
    return vars(config) | {
        "words_ahead": words_ahead,
        "product_tiles": config.product_tiles if words_ahead else 1,
        "max_rows": config.max_rows,
        "group_tiles": group_tiles,
        "groups": ceil_div(row_tiles, group_tiles),
        "steps": steps,
    }
