"""What a prefill GEMM reads and writes, and the tiles that it is cut into (Gluon)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from halfbyte.gluon_compat import aggregate
from halfbyte.weights.hopper.dequant_bf16 import stored_tile


@aggregate
class Tile:
    """What a program multiplies at once: a group of row tiles of one expert, and rows of x from `row_start` on."""

    expert: gl.tensor
    row_start: gl.tensor
    num_rows: gl.tensor
    group: gl.tensor

    @gluon.constexpr_function
    def __init__(self, expert, row_start, num_rows, group):
        self.expert = expert
        self.row_start = row_start
        self.num_rows = num_rows
        self.group = group


@aggregate
class Tensors:
    """What is in global memory, and how many tiles there are. Rows of exponents and biases are those of the matrix, in its order."""

    x: tma.tensor_descriptor
    words: tma.tensor_descriptor
    scales: tma.tensor_descriptor
    shift: gl.tensor
    multiplier: gl.tensor
    exponents: gl.tensor
    x_scale: gl.tensor
    bias: gl.tensor
    y: gl.tensor
    items: gl.tensor
    num_tiles: gl.tensor

    @gluon.constexpr_function
    def __init__(self, x, words, scales, shift, multiplier, exponents, x_scale, bias, y, items, num_tiles):
        self.x = x
        self.words = words
        self.scales = scales
        self.shift = shift
        self.multiplier = multiplier
        self.exponents = exponents
        self.x_scale = x_scale
        self.bias = bias
        self.y = y
        self.items = items
        self.num_tiles = num_tiles

    @gluon.jit
    def tile(self, number, GROUPS: gl.constexpr):
        """Tiles are counted item by item of the work list, group by group."""
        entry = self.items + number // GROUPS * 4
        return Tile(gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), number % GROUPS)


@gluon.jit
def first_row(expert, row_tile, SPEC: gl.constexpr):
    """Where the rows of a tile begin among those of all experts; beyond the last tile, that of the last: nothing of it is stored."""
    return (expert * SPEC.row_tiles + stored_tile(gl.minimum(row_tile, SPEC.row_tiles - 1), SPEC.row_tiles, SPEC.gated)) * 64
