"""What a decode GEMM reads and writes, and what it is compiled for (`gemm_decode`). Plain Python: nothing here needs Triton or a device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from halfbyte.weights.hopper.layout import WordsFor


class DecodeTensors(NamedTuple):
    """What is in global memory, one parameter of the kernel. What the kernel does not read may be anything.

    Attributes:
        x, x_scale: the activations, and a scale for each of their rows.
        words, scales, shift, multiplier, bias: the matrix. Biases are those of its rows, in its order.
        y: the result.
        rows: the expert ids (direct), or the entries of the work list.
        num_items, token_of_row: of the work list.
    """

    x: torch.Tensor
    x_scale: torch.Tensor
    words: torch.Tensor
    scales: torch.Tensor
    shift: torch.Tensor
    multiplier: torch.Tensor
    bias: torch.Tensor
    y: torch.Tensor
    rows: torch.Tensor
    num_items: torch.Tensor
    token_of_row: torch.Tensor


class DecodeSpec(NamedTuple):
    """One matrix of one layer, and how its rows are found. A tuple, because Triton writes constants as JSON.

    Attributes:
        columns, row_tiles: of the matrix: its columns, and tiles of 64 of its rows.
        x_stride, y_columns: elements of a row of x, of a row of the result.
        nvfp4, words_for: how the weights are coded.
        scaled: rows of x have a scale each.
        rows_in_shared: of x, in the shared memory of a program (direct): one for each token, up to a power of two; 0 where x is read as it comes.
        is_rounded: to fp8, when they are put there.
        is_w13: the result goes through the activation; gated: and has a half that gates the other.
        kind, alpha, beta, limit: which activation (`epilogue.activate`).
        has_bias: the matrix has biases.
        direct: programs find their rows in the ids of `top_k` experts per token.
        parts, slices: how many programs share the columns, and how many groups of four warps in each.
    """

    columns: int
    row_tiles: int
    x_stride: int
    y_columns: int
    nvfp4: bool
    words_for: WordsFor
    scaled: bool
    rows_in_shared: int
    is_rounded: bool
    is_w13: bool
    gated: bool
    kind: int
    alpha: float
    beta: float
    limit: float
    has_bias: bool
    direct: bool
    top_k: int
    parts: int
    slices: int
