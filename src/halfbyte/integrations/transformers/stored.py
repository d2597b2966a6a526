"""The quantised matrices that the headers of a checkpoint's files show, whatever its configuration says of them.

The names and shapes of the tensors decide: codes with the block scales that belong to them, or an e4m3 weight with its scale. What is quantised in
another way, or lacks a companion, is an error here, before anything is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from halfbyte.checkpoint.dialects import (
    CODE_DTYPES,
    DEEPSEEK_V4,
    FP8,
    FP8_STACKED,
    GPT_OSS,
    MODELOPT,
    MXFP4_PACK,
    NVFP4_PACK,
    QUARK,
    STACKED_MODELOPT,
    STACKED_MXFP4_PACK,
    STACKED_NVFP4_PACK,
    Dialect,
    is_scale,
)
from halfbyte.checkpoint.source import TensorInfo
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats import BlockFormat
from halfbyte.formats.fp8_block import scale_shape

# Codes are looked for in this order; a suffix and the size of a block tell them apart.
FP4_DIALECTS = (NVFP4_PACK, MXFP4_PACK, STACKED_NVFP4_PACK, STACKED_MXFP4_PACK, GPT_OSS, MODELOPT, QUARK, DEEPSEEK_V4, STACKED_MODELOPT)
# What a tensor of a quantised matrix is for; also the suffix of the Parameter that holds it, behind the name of the matrix.
CODES, BLOCK_SCALE, GLOBAL_SCALE, INPUT_SCALE, PRE_QUANT_SCALE = "", "_scale", "_scale_2", "_input_scale", "_pre_quant_scale"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Stored:
    """A quantised matrix, or all matrices of the experts of a layer: `stem` is its name without suffixes, `tensors` the names by role."""

    stem: str
    dialect: Dialect
    shape: tuple[int, ...]
    tensors: Mapping[str, str] = field(default_factory=dict)

    @property
    def dense_name(self) -> str:
        """The name that the dense weight would have."""
        return self.stem + self.dialect.dense

    @property
    def is_fp8(self) -> bool:
        return self.dialect.format is None


def parameter_dtype(role: str, format: BlockFormat | None) -> torch.dtype:
    """What the Parameter for `role` holds; `format` None is FP8."""
    if role == CODES:
        return torch.uint8 if format else torch.float8_e4m3fn
    if role == BLOCK_SCALE and format:
        return format.scale_dtype
    return torch.float32


def find_stored(tensors: Mapping[str, TensorInfo], is_wanted: Callable[[str], bool]) -> dict[str, Stored]:
    """The quantised matrices of `tensors` by stem; those among them whose codes, by name, are wanted.

    Raises:
        CheckpointError: a scale is missing or has the wrong dtype or shape.
        UnsupportedError: an e4m3 matrix whose scales are none that are known.
    """
    found = {}
    for name, info in tensors.items():
        is_fp4 = info.dtype in CODE_DTYPES
        if not is_fp4 and (info.dtype != torch.float8_e4m3fn or is_scale(name)):
            continue
        stored = (_fp4 if is_fp4 else _fp8)(name, tensors) if is_wanted(name) else None
        if stored is not None:
            found[stored.stem] = stored
    return found


def _fp4(name: str, tensors: Mapping[str, TensorInfo]) -> Stored | None:
    blocks = {}
    for dialect, stem in _readings(name):
        scales = next((stem + suffix for suffix in dialect.scales if stem + suffix in tensors), None)
        if scales is None:
            continue
        block = 2 * math.prod(tensors[name].shape) / max(math.prod(tensors[scales].shape), 1)
        if dialect.format is not None and block == dialect.format.block:
            return _with_companions(stem, dialect, name, scales, tensors)
        blocks[scales] = f"one scale for {block:g} elements"
    if blocks:
        scales, given = next(iter(blocks.items()))
        raise UnsupportedError("this layer is quantised in another format", where=scales, given=given, needed="one for 16 (NVFP4) or 32 (MXFP4)")
    if is_scale(name):
        return None
    dialect, stem = next(_readings(name))
    if dialect.codes:
        raise missing_tensor(stem + dialect.scales[0], "block scales")
    return None  # `find_packed` refuses it where the model has a matrix of this name


def _readings(name: str) -> Iterator[tuple[Dialect, str]]:
    """The dialects whose codes may be called `name`, with the stem."""
    for dialect in FP4_DIALECTS:
        if name.endswith(dialect.codes):
            yield dialect, name.removesuffix(dialect.codes)


def _with_companions(stem: str, dialect: Dialect, codes: str, scales: str, tensors: Mapping[str, TensorInfo]) -> Stored:
    _check_dtype(tensors, scales, dialect.scale_dtypes)
    names = {CODES: codes, BLOCK_SCALE: scales}
    if dialect.global_scale:
        names[GLOBAL_SCALE] = stem + dialect.global_scale
        _check_scalars(tensors, names[GLOBAL_SCALE])
    if dialect.input_scale and stem + dialect.input_scale in tensors:
        names[INPUT_SCALE] = stem + dialect.input_scale
        _check_scalars(tensors, names[INPUT_SCALE])
    if dialect.input_factor and stem + dialect.input_factor in tensors:
        names[PRE_QUANT_SCALE] = stem + dialect.input_factor
        _check_dtype(tensors, names[PRE_QUANT_SCALE], _FLOATS)
    return Stored(stem, dialect, tensors[codes].shape, names)


def _fp8(name: str, tensors: Mapping[str, TensorInfo]) -> Stored:
    dialect = FP8 if name.endswith(FP8.codes) else FP8_STACKED
    stem = name.removesuffix(dialect.codes)
    scales = next((stem + suffix for suffix in dialect.scales if stem + suffix in tensors), None)
    if scales is None:
        raise missing_tensor(stem + dialect.scales[0], "an e4m3 tensor means nothing without its scale")
    info, shape = tensors[scales], tensors[name].shape
    if info.dtype not in (*_FLOATS, torch.float8_e8m0fnu) or len(shape) not in (2, 3) or not _fp8_scales_fit(shape, info.shape):
        raise UnsupportedError(
            "this layer is quantised in another format",
            where=scales,
            given=f"{info.dtype} {info.shape} for e4m3 {shape}",
            needed="one float, one per row, or one for 128 x 128 elements",
        )
    return Stored(stem, dialect, shape, {CODES: name, BLOCK_SCALE: scales})


def _fp8_scales_fit(shape: tuple[int, ...], scales: tuple[int, ...]) -> bool:
    *experts, rows, columns = shape
    matrices = [(1, 1), (rows, 1), scale_shape(rows, columns)]
    return math.prod(scales) == 1 or scales in (shape[:1], *((*experts, *matrix) for matrix in matrices))


def missing_tensor(name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"a quantised layer lacks this tensor ({reason})",
        where=name,
        given="nothing",
        next_step="download the files again, or run `halfbyte inspect` on the checkpoint",
    )


def _check_scalars(tensors: Mapping[str, TensorInfo], name: str) -> None:
    """How many there must be, for one matrix or for all experts, is known where they are used."""
    _check_dtype(tensors, name, _FLOATS)
    if not math.prod(tensors[name].shape):
        raise CheckpointError("a scale without a number", where=name, given=tensors[name].shape, needed="at least one number")


def _check_dtype(tensors: Mapping[str, TensorInfo], name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if name not in tensors:
        raise missing_tensor(name, "every matrix has one")
    if tensors[name].dtype not in dtypes:
        raise CheckpointError(
            "a scale has the wrong dtype",
            where=name,
            given=tensors[name].dtype,
            needed=" or ".join(map(str, dtypes)),
            next_step="run `halfbyte inspect` on the checkpoint, or quantise it again",
        )
