"""Whether a source is a whole model, before anything is written: every expert and projection, shapes that agree, and what config.json says of them.

Reads headers, routers, and the scales of fp8 blocks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import torch

from halfbyte.checkpoint.dialects import fp8_scales_of
from halfbyte.checkpoint.families import format_range, is_known
from halfbyte.checkpoint.families.description import Config
from halfbyte.checkpoint.fp8_source import read_fp8_scales
from halfbyte.checkpoint.layer_tensors import LayerTensors
from halfbyte.checkpoint.projections import DOWN, GATE, PROJECTIONS, Projection
from halfbyte.checkpoint.router import load_router
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.errors import CheckpointError, UnsupportedError

logger = logging.getLogger(__name__)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_AGAIN = "download the model again, or leave these experts unquantised with --skip"
_CONTAINER = re.compile(r"^(.*\.experts)\.")
Shapes = dict[Projection, dict[int, tuple[int, int]]]  # rows and columns of every expert's matrices


class _Source(Protocol):
    @property
    def tensor(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def expert(self) -> int | None: ...


class ExpertMatrix(Protocol):
    """What is looked at of a matrix of the plan; `experts`, `expert` and `role` are None where it is no expert's."""

    @property
    def source(self) -> _Source: ...
    @property
    def experts(self) -> str | None: ...
    @property
    def expert(self) -> int | None: ...
    @property
    def role(self) -> Projection | None: ...


def check_complete(checkpoint: Checkpoint, matrices: Iterable[ExpertMatrix], copied: Collection[str], skipped: Collection[str]) -> None:
    """Refuse half a model.

    Args:
        checkpoint: the source.
        matrices: what is to be quantised.
        copied: tensors that are taken over.
        skipped: containers of experts that the user leaves alone.

    Raises:
        CheckpointError: tensors that the index leaves out, missing or additional experts and projections, shapes that do not belong together or
            contradict config.json, two tensors for one matrix, fp8 blocks without usable scales, a router that `load_router` refuses.
        UnsupportedError: experts in a layout or dtype that is not read.
    """
    if checkpoint.unlisted:
        raise CheckpointError(
            f"the index leaves out tensor {checkpoint.unlisted[0]}",
            where=str(checkpoint.file_of(checkpoint.unlisted[0])),
            given=f"{len(checkpoint.unlisted)} such tensors",
            next_step="download the model again",
        )
    found: dict[str, Shapes] = {}
    tensors: dict[str, None] = {}
    for matrix in matrices:
        tensors[matrix.source.tensor] = None
        if matrix.experts is not None and matrix.expert is not None and matrix.role is not None:
            _check_number(checkpoint, matrix)
            of_role = found.setdefault(matrix.experts, {}).setdefault(matrix.role, {})
            if matrix.expert in of_role:
                given, where = matrix.source.tensor, str(checkpoint.file_of(matrix.source.tensor))
                problem = f"two tensors for one matrix: {matrix.role} of {matrix.experts}.{matrix.expert}"
                raise CheckpointError(problem, where=where, given=given, needed="experts one by one or stacked, not both", next_step=_AGAIN)
            of_role[matrix.expert] = (matrix.source.rows, matrix.source.columns)
    _check_dtypes(checkpoint, tensors, copied)
    _check_copied(checkpoint, copied, skipped)
    _check_configuration(checkpoint, found, skipped)


def _check_number(checkpoint: Checkpoint, matrix: ExpertMatrix) -> None:
    tensor = matrix.source.tensor
    if matrix.source.expert is None and not tensor.startswith(f"{matrix.experts}.{matrix.expert}."):
        raise CheckpointError("no number of an expert", where=str(checkpoint.file_of(tensor)), given=tensor, needed="0, 1, 2, ...", next_step=_AGAIN)


def _check_dtypes(checkpoint: Checkpoint, quantised: Iterable[str], copied: Iterable[str]) -> None:
    for name in quantised:
        dtype = checkpoint.info(name).dtype
        if dtype not in (*_FLOATS, torch.float8_e4m3fn):
            needed = "bfloat16, float16, float32, or float8_e4m3fn in blocks"
            raise UnsupportedError(
                f"tensor {name} cannot be quantised", where=str(checkpoint.file_of(name)), given=dtype, needed=needed, next_step=_AGAIN
            )
    lone = next((name for name in copied if name.endswith(fp8_scales_of(""))), None)  # those of a weight that is there are not copied
    if lone is not None:
        weight = lone.removesuffix(fp8_scales_of(""))
        raise CheckpointError(f"scales without their weight: {lone}", where=str(checkpoint.file_of(lone)), needed=weight, next_step=_AGAIN)
    for name in (*quantised, *copied):
        if checkpoint.info(name).dtype == torch.float8_e4m3fn or fp8_scales_of(name) in checkpoint:
            read_fp8_scales(checkpoint, name)


def _check_copied(checkpoint: Checkpoint, copied: Iterable[str], skipped: Collection[str]) -> None:
    """Matrices of experts that nobody recognised would stay as they are beside the quantised ones."""
    for name in copied:
        match = _CONTAINER.match(name)
        if match and match[1] not in skipped and len(checkpoint.info(name).shape) > 1 and not name.endswith("bias"):
            raise UnsupportedError(
                f"experts in a layout that is not read: {name}",
                where=str(checkpoint.file_of(name)),
                given=f"{checkpoint.info(name).dtype} {checkpoint.info(name).shape}",
                needed="one [N, K] matrix per expert and projection, or stacked gate_up_proj and down_proj",
                next_step=_AGAIN,
            )


def _check_experts(experts: str, shapes: Shapes, where: str) -> None:
    """The experts of one layer among themselves, where no configuration says what they are."""
    ids = sorted({expert for of_role in shapes.values() for expert in of_role})
    for role in PROJECTIONS:
        of_role = shapes.get(role, {})
        if role == GATE and not of_role:
            continue  # experts without a gate; whether the model has one, its configuration says
        missing = sorted(set(range(ids[-1] + 1 if ids[-1] < 2 * len(ids) + 64 else len(ids))) - of_role.keys())
        if missing:
            raise CheckpointError(
                f"missing experts: {role} of {experts}",
                where=where,
                given=format_range(sorted(of_role)),
                needed=f"all from 0 on; {format_range(missing)} missing",
                next_step=_AGAIN,
            )
    first = shapes[DOWN][0]
    for role, of_role in shapes.items():
        needed = first if role == DOWN else first[::-1]
        for expert, shape in of_role.items():
            if shape != needed or not all(shape):
                raise CheckpointError(
                    f"expert matrices do not belong together: {role} of {experts}.{expert}", where=where, given=shape, needed=needed, next_step=_AGAIN
                )


def _check_configuration(checkpoint: Checkpoint, found: Mapping[str, Shapes], skipped: Collection[str]) -> None:
    """Every layer that the configuration gives experts has them, of its number and sizes, and no other layer."""
    where = str(checkpoint.path / "config.json")
    config = Config(checkpoint.config, where)
    if config.model_type == "None":
        raise CheckpointError("missing value", where=where, needed="model_type", next_step="without it nobody can load the result")
    if not found:
        return
    if is_known(checkpoint.config, where):
        moe = checkpoint.moe
        for layer in moe.expert_layers:
            if f"{moe.block_of(layer)}.experts" not in skipped:
                _check_layer(LayerTensors(checkpoint, layer))
            if moe.routing is not None:
                load_router(checkpoint, layer)
        return
    logger.warning(
        "%s: model_type %r is no family that halfbyte knows: what config.json says of its experts is not checked", where, config.model_type
    )
    for experts, shapes in found.items():
        _check_experts(experts, shapes, str(checkpoint.path))
    if "num_hidden_layers" in config:
        config.num_layers  # noqa: B018  # a number, at least
    most = max(found, key=lambda experts: len(found[experts][DOWN]))
    config.check_num_experts(len(found[most][DOWN]), f"{most}.{max(found[most][DOWN])}")


def _check_layer(tensors: LayerTensors) -> None:
    for expert in range(tensors.moe.num_experts):
        for projection in tensors.projections:
            tensors.check_matrix(expert, projection)
