"""Which tensors of a source checkpoint are quantised, which are copied, and what the result will be called. Reads headers only.

Quantised by default: the routed experts, stored one matrix a tensor (`...experts.7.gate_proj.weight`, Mixtral's `w1 w2 w3`) or stacked
(`...experts.gate_up_proj` [E, 2I, H] or [E, H, 2I] and every other layout of `checkpoint.projections`). Stacked ones are written as one matrix a
tensor, which is what engines load. gpt-oss's have biases and alternating rows, and stay stacked as its own format has them.

With `all_linear` also every other 2-D weight, except embeddings, output heads, routers, vision towers, and what models read other than as a linear
layer (by dtype, or as a view of groups). fp8-block tensors that are not quantised are copied as bf16, since a checkpoint declares one quantisation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from halfbyte.checkpoint.dialects import STACKED_DENSE, fp8_scales_of
from halfbyte.checkpoint.fp8_source import read_fp8_block
from halfbyte.checkpoint.projections import (
    DOWN,
    GATE,
    LAYOUTS,
    LEAVES,
    PROJECTION_OF,
    UP,
    Layout,
    Projection,
    StackedSizes,
    fused_with,
    stacked_sizes,
)
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.convert.completeness import check_complete
from halfbyte.errors import CheckpointError, InputError, UnsupportedError
from halfbyte.formats import BlockFormat, fp8_block

_EXPERT = re.compile(rf"^(?P<experts>.*\.experts)\.(?P<expert>\d+)\.(?P<leaf>{'|'.join(PROJECTION_OF)})\.weight$")


def _stacked_pattern(layout: Layout) -> re.Pattern[str]:
    """Names of stacked tensors. Matrices right in a module belong to experts only where it is called after its mixture of experts."""
    before = "moe" if layout.pattern == "{leaf}" else ""
    module = re.escape(layout.pattern).replace(r"\{leaf\}", f"(?P<leaf>{'|'.join(dict.fromkeys(layout.leaves.values()))})")
    return re.compile(rf"^(?P<block>.*{before})\.{module}(?P<suffix>\.weight|)$")


_STACKED = tuple((layout, _stacked_pattern(layout)) for layout in LAYOUTS if layout.stacked)
_NEVER = re.compile(
    r"(^|\.)(lm_head|head|output|\w*embed\w*|wte|wpe|gate|wg|router|shared_expert_gate|weights_proj|o_a_proj|wo_a|\w*conv1?d?"
    r"|visual|vision\w*|patch_\w+|score|classifier)(\.|$)"
)


@dataclass(frozen=True)
class Source:
    """A matrix [rows, columns] in the source: a tensor, or `tensor[expert]`, transposed if so stored, cut to `rows` rows from `first_row`.

    With `stack`, the matrices of so many experts at once: [stack, rows, columns]. `flat`: the tensor has no dimension for experts.
    """

    tensor: str
    rows: int
    columns: int
    expert: int | None = None
    transposed: bool = False
    first_row: int = 0
    stack: int | None = None
    flat: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.columns) if self.stack is None else (self.stack, self.rows, self.columns)

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        """The matrix, a view of the mapped file except for fp8-block, which is decoded to fp32."""
        matrix = checkpoint.read(self.tensor)
        scales = fp8_scales_of(self.tensor)
        if scales in checkpoint:
            return fp8_block.dequantize(*read_fp8_block(checkpoint, self.tensor), torch.float32)
        if self.flat:
            matrix = matrix.view(-1, *((self.columns, self.rows) if self.transposed else (self.rows, self.columns)))
        if self.expert is not None:
            matrix = matrix[self.expert]
        if self.transposed:
            matrix = matrix.mT
        return matrix[..., self.first_row : self.first_row + self.rows, :]


@dataclass(frozen=True)
class Matrix:
    """One weight to quantise.

    Attributes:
        module: its name in the result, e.g. "model.layers.0.mlp.experts.3.gate_proj".
        source: where it comes from.
        group: matrices of one group share a global scale.
        kind: what the report calls it: "gate", "up", "down" for routed experts, else e.g. "self_attn.q_proj".
        experts, expert, role: of a routed expert: its container module, number and part; None for others.
    """

    module: str
    source: Source
    group: str
    kind: str
    experts: str | None = None
    expert: int | None = None
    role: Projection | None = None


@dataclass(frozen=True)
class Copied:
    """A tensor taken over: as it is, or decoded from fp8-block to bf16."""

    tensor: str
    nbytes: int

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        if fp8_scales_of(self.tensor) in checkpoint:
            return fp8_block.dequantize(*read_fp8_block(checkpoint, self.tensor), torch.bfloat16)
        return checkpoint.read(self.tensor)


@dataclass(frozen=True)
class Plan:
    """What becomes of every tensor, in the order it is written, and the modules that stay unquantised."""

    items: tuple[Matrix | Copied, ...]
    excluded: tuple[str, ...]
    source_bytes: int

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return tuple(item for item in self.items if isinstance(item, Matrix))

    @property
    def stacked(self) -> bool:
        """Whether experts stay stacked, as gpt-oss has them."""
        return any(matrix.source.stack for matrix in self.matrices)


def plan_conversion(checkpoint: Checkpoint, format: BlockFormat, *, all_linear: bool = False, skip: Sequence[str] = ()) -> Plan:
    """Decide what happens to each tensor of `checkpoint`.

    Args:
        checkpoint: a dense or fp8-block model.
        format: NVFP4 or MXFP4; every quantised row must divide into its blocks.
        all_linear: quantise other linear layers too, not only the routed experts.
        skip: glob patterns of modules to leave alone ("model.layers.0.*"); the experts of a layer only all together.

    Raises:
        UnsupportedError: the source is quantised already (other than fp8-block).
        CheckpointError: nothing to quantise, a row that does not divide into blocks, or half a model (see `convert.completeness`).
        InputError: a skip pattern that matches nothing, or only a part of a layer's experts or of a fused group.
    """
    if checkpoint.quantization.dialects:
        raise UnsupportedError(
            "the source is already quantised",
            where=str(checkpoint.path),
            given=checkpoint.quantization.kind,
            needed="bf16, fp16, fp32 or fp8-block weights",
            next_step="start from the original model",
        )
    skipping = _Skip(skip)
    items: list[Matrix | Copied] = []
    fp8_scales = {fp8_scales_of(tensor) for tensor in checkpoint.names}
    for tensor in checkpoint.names:
        if tensor in fp8_scales:
            continue
        matrices = _matrices(checkpoint, tensor, all_linear)
        kept = [matrix for matrix in matrices if not skipping.matches(matrix)]
        if kept and len(kept) != len(matrices):
            raise _partly_skipped(kept[0].module)
        items += kept or [Copied(tensor, _copied_bytes(checkpoint, tensor))]
    skipping.check()
    planned = [item for item in items if isinstance(item, Matrix)]
    _check_matrices(checkpoint, planned, format, skipping)
    copied = [item.tensor for item in items if isinstance(item, Copied)]
    check_complete(checkpoint, planned, copied, skipping.touched)
    modules = {
        tensor.removesuffix(".weight") for tensor in copied if not tensor.endswith(STACKED_DENSE.bias) and len(checkpoint.info(tensor).shape) > 1
    }
    return Plan(tuple(items), tuple(sorted(modules | {"lm_head"})), sum(checkpoint.info(name).nbytes for name in checkpoint.names))


class _Skip:
    """The skip patterns: which have matched, and which expert containers or fused groups they touched."""

    def __init__(self, patterns: Sequence[str]):
        self.unused = dict.fromkeys(patterns)
        self.patterns = tuple(patterns)
        self.touched: set[str] = set()

    def matches(self, matrix: Matrix) -> bool:
        matched = [pattern for pattern in self.patterns if fnmatchcase(matrix.module, pattern)]
        for pattern in matched:
            self.unused.pop(pattern, None)
        if matched:
            self.touched.add(matrix.experts or matrix.group)
        return bool(matched)

    def check(self) -> None:
        if self.unused:
            raise InputError("a skip pattern matches no module that would be quantised", given=", ".join(self.unused))


def _matrices(checkpoint: Checkpoint, tensor: str, all_linear: bool) -> list[Matrix]:
    """The matrices to quantise in one source tensor; none if it is to be copied."""
    shape = checkpoint.info(tensor).shape
    if (match := _EXPERT.match(tensor)) and len(shape) == 2:
        return [_expert_matrix(match["experts"], int(match["expert"]), match["leaf"], Source(tensor, *shape))]
    for layout, pattern in _STACKED:
        match = pattern.match(tensor)
        if match and len(shape) == (2 if layout.flat else 3) and (found := _stacked(checkpoint, layout, match["block"], match["suffix"])):
            return _stacked_matrices(checkpoint, tensor, layout, match["block"], match["leaf"], found)
    if all_linear and tensor.endswith(".weight") and len(shape) == 2 and not _NEVER.search(tensor):
        module = tensor.removesuffix(".weight")
        return [Matrix(module, Source(tensor, *shape), _group(module), ".".join(module.split(".")[-2:]))]
    return []


def _expert_matrix(experts: str, expert: int, leaf: str, source: Source) -> Matrix:
    module, role = f"{experts}.{expert}.{leaf}", PROJECTION_OF[leaf]
    return Matrix(module, source, _group(module), role, experts, expert, role)


def _stacked(checkpoint: Checkpoint, layout: Layout, block: str, suffix: str) -> StackedSizes | None:
    """Sizes of the experts that lie in `layout` in the MoE module `block`; None where they lie in another."""
    names = [f"{block}.{layout.module(0, projection)}{suffix}" for projection in layout.projections]
    if not all(name in checkpoint for name in names):
        return None
    up, down = (checkpoint.info(name).shape for name in names[-2:])
    if layout.flat:
        experts = checkpoint.moe.num_experts
        return StackedSizes(experts, up[1], up[0] // experts, transposed=False) if up == down and up[0] % experts == 0 else None
    sizes = stacked_sizes(up, down, halves=2 if layout.fused else 1)
    if sizes is None:
        raise CheckpointError(
            "stacked experts do not belong together", where=names[-1], given=f"gate_up {up}, down {down}", needed="[E, 2I, H] and [E, H, I]"
        )
    return sizes


def _stacked_matrices(checkpoint: Checkpoint, tensor: str, layout: Layout, block: str, leaf: str, sizes: StackedSizes) -> list[Matrix]:
    """The matrices in one of the stacked tensors of a layer's experts."""
    num_experts, hidden, intermediate, transposed = sizes
    container = f"{block}.experts"
    is_down = leaf == layout.leaves[DOWN]
    rows, columns = (hidden, intermediate) if is_down else (intermediate, hidden)
    if any(f"{block}.{layout.module(0, projection)}{STACKED_DENSE.bias}" in checkpoint for projection in layout.projections):
        if not checkpoint.moe.interleaved:
            raise UnsupportedError("stacked experts with biases of another family than gpt-oss", where=tensor, next_step="leave them out with --skip")
        source = Source(tensor, rows if is_down else 2 * rows, columns, transposed=transposed, stack=num_experts)
        return [Matrix(tensor, source, tensor, "down" if is_down else "gate_up", container)]
    names = LEAVES[0] if layout.fused or GATE not in layout.leaves else layout.leaves
    parts = [(projection, 0) for projection, name in layout.leaves.items() if name == leaf]
    if layout.fused and not is_down:
        parts = [(GATE, 0), (UP, intermediate)]
    return [
        Matrix(
            module := f"{block}.{layout.written.format(expert=expert, leaf=names[projection])}",
            Source(tensor, rows, columns, expert, transposed or (layout.flat and is_down), first_row, flat=layout.flat),
            _group(module),
            projection,
            container,
            expert,
            projection,
        )
        for expert in range(num_experts)
        for projection, first_row in parts
    ]


def _group(module: str) -> str:
    """Matrices that engines may fuse are quantised with one global scale."""
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{'+'.join(fused_with(leaf))}"


def _copied_bytes(checkpoint: Checkpoint, tensor: str) -> int:
    info = checkpoint.info(tensor)
    return 2 * info.nbytes if fp8_scales_of(tensor) in checkpoint else info.nbytes


def _check_matrices(checkpoint: Checkpoint, matrices: Sequence[Matrix], format: BlockFormat, skipping: _Skip) -> None:
    if not matrices:
        step = "skip less: --skip leaves out all there is" if skipping.touched else "for a dense model use --all-linear"
        raise CheckpointError("there is nothing to quantise", where=str(checkpoint.path), needed="routed experts", next_step=step)
    for matrix in matrices:
        if (matrix.experts or matrix.group) in skipping.touched:
            raise _partly_skipped(matrix.module)
        if matrix.source.columns % format.block:
            raise CheckpointError(
                f"rows of tensor {matrix.source.tensor} do not divide into {format!r} blocks",
                where=str(checkpoint.file_of(matrix.source.tensor)),
                given=f"{matrix.source.columns} columns",
                needed=f"a multiple of {format.block}",
                next_step=f"leave it unquantised with --skip '{matrix.experts + '.*' if matrix.experts else matrix.module}'",
            )


def _partly_skipped(module: str) -> InputError:
    return InputError(
        "--skip leaves out a part of what engines load as one (a layer's experts, q k v, gate and up)",
        given=f"{module} is not skipped",
        next_step="skip all of it or none",
    )
