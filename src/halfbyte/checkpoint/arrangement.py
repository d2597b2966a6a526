"""`Arrangement`: which part of which tensor the matrix of one expert is. Names are in `checkpoint.projections`; here are shapes and rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from halfbyte.checkpoint.projections import DOWN, GATE, UP, Layout, Projection, stacked_sizes


@dataclass(frozen=True)
class Arrangement:
    """How the tensors of a layer hold the matrices [N, K] of its experts: each by itself, or many in one.

    What is stored for a row is `columns`: a number of elements, several dimensions of blocks, or () for a bias.

    Attributes:
        layout: what they are called, and which of them share a tensor.
        num_experts, hidden, intermediate: E, H and I of one expert.
        interleaved: gate and up rows of one matrix alternate.
        transposed: stacked matrices lie as [K, N].
    """

    layout: Layout
    num_experts: int
    hidden: int
    intermediate: int
    interleaved: bool
    transposed: bool = False

    def shape(self, projection: Projection) -> tuple[int, int]:
        """Rows and columns of a projection: [I, H] for gate and up, [H, I] for down."""
        return (self.hidden, self.intermediate) if projection == DOWN else (self.intermediate, self.hidden)

    def stored_shape(self, projection: Projection, columns: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor that holds a projection, [N, *columns] of one expert."""
        rows = self.shape(projection)[0]
        if not self.layout.stacked:
            return (rows, *columns)
        rows *= 2 if self.layout.fused and projection != DOWN else 1
        matrix = (*columns, rows) if columns and self._lies_transposed(projection) else (rows, *columns)
        return (self.num_experts * matrix[0], *matrix[1:]) if self.layout.flat else (self.num_experts, *matrix)

    def rows_of(self, stored: torch.Tensor, expert: int, projection: Projection, columns: tuple[int, ...]) -> torch.Tensor:
        """The rows [N, *columns] of a projection of one expert, out of the tensor that holds them."""
        if not self.layout.stacked:
            return stored
        of_expert = (stored.unflatten(0, (self.num_experts, -1)) if self.layout.flat else stored)[expert]
        rows = of_expert.mT if columns and self._lies_transposed(projection) else of_expert
        if projection == DOWN or not self.layout.fused:
            return rows
        first = projection == GATE
        if self.interleaved:
            return rows[0 if first else 1 :: 2]
        return rows[: self.intermediate] if first else rows[self.intermediate :]

    def fits_transposed(self, shapes: Mapping[Projection, tuple[int, ...]], columns: Mapping[Projection, tuple[int, ...]], packed: int) -> bool:
        """Whether stacked tensors of these shapes hold transposed matrices: both together say so, one alone may fit either way.

        `packed` elements of a row lie in one of a tensor.
        """
        sizes = stacked_sizes(shapes.get(UP, ()), shapes.get(DOWN, ()), halves=2 if self.layout.fused else 1, packed=packed)
        if sizes is not None:
            return sizes.transposed
        # One of them is damaged: the other one may tell.
        usual = {part: self.stored_shape(part, columns[part]) for part in shapes}
        return any(shape != usual[part] and shape == (usual[part][0], *usual[part][:0:-1]) for part, shape in shapes.items())

    def _lies_transposed(self, projection: Projection) -> bool:
        return self.transposed or (self.layout.flat and projection == DOWN)
