"""`LayerTensors`: where the experts of one layer lie in a checkpoint, whatever its family and dialect; every tensor is checked as it is read.

Names come from `checkpoint.projections` (which matrix) and `checkpoint.dialects` (which part of it).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Literal

import torch

from halfbyte.arguments import dtype_name
from halfbyte.checkpoint.arrangement import Arrangement
from halfbyte.checkpoint.dialects import CODE_DTYPES, FP8_BLOCK, STACKED_FORM, fp8_scales_of
from halfbyte.checkpoint.families import KNOWN_MODEL_TYPES, tensor_names
from halfbyte.checkpoint.fp8_source import read_fp8_block, read_fp8_scales
from halfbyte.checkpoint.projections import DOWN, UP, Projection, find_layout, place_of
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats import BlockFormat, count_nonfinite, e8m0
from halfbyte.formats.fp8_block import dequantize as dequantize_fp8_block

_MAGNITUDES = 0x77  # of two codes in a byte: all but their signs
_DENSE = (torch.bfloat16, torch.float16, torch.float32)
_AS_IT_IS: Mapping[torch.dtype, torch.dtype] = {}


class LayerTensors:
    """The experts of one MoE layer of a checkpoint: each method finds, checks and returns one projection of one expert.

    Attributes:
        projections: gate, up and down, or the last two where experts have no gate.
        dialect: how their matrices are stored; `DENSE` for fp8-block too.
        format: block format of the experts, None when dense (bf16, fp16, fp32 or fp8-block).
    """

    def __init__(self, checkpoint: Checkpoint, layer: int):
        """Raises CheckpointError for a layer without routed experts, UnsupportedError for a format halfbyte does not read."""
        self.checkpoint, self.moe = checkpoint, checkpoint.moe
        self.block = self.moe.block_of(layer)
        gated = self.moe.activation is None or self.moe.activation.gated
        self._layout = layout = find_layout(checkpoint, self.block, gated=gated)
        self.projections = layout.projections
        modules = {projection: f"{self.block}.{layout.module(0, projection)}" for projection in self.projections}
        dialects = {checkpoint.quantization.dialect_of(module) for module in modules.values()}
        if len(dialects) != 1:
            given = ", ".join(sorted(dialect.name for dialect in dialects))
            raise UnsupportedError("gate, up and down are stored in different formats", where=self.block, given=given, needed="one format")
        self.dialect = dialects.pop()
        stacked_form = STACKED_FORM.get(self.dialect) if layout.stacked else None
        if stacked_form and not any(module + self.dialect.codes in checkpoint for module in modules.values()):
            self.dialect = stacked_form
        self.format: BlockFormat | None = self.dialect.format
        if self.format is not None:
            self._check_blocks(self.format)
        sizes = (self.moe.num_experts, self.moe.hidden, self.moe.intermediate)
        arrangement = Arrangement(layout, *sizes, self.moe.interleaved)
        self._arrangement = replace(arrangement, transposed=self._is_transposed(arrangement))
        self._check_input_factors()

    def shape(self, projection: Projection) -> tuple[int, int]:
        """Rows and columns of a projection: [I, H] for gate and up, [H, I] for down."""
        return self._arrangement.shape(projection)

    def name(self, expert: int, projection: Projection, suffix: str) -> str:
        """Name of the tensor that holds a part of a projection (of all experts, when stacked)."""
        return f"{self.block}.{self._layout.module(expert, projection)}{suffix}"

    def codes(self, expert: int, projection: Projection) -> torch.Tensor:
        """Packed e2m1 codes, uint8 [N, K/2]."""
        shape = self.dialect.codes_shape(self.shape(projection)[1])
        codes = self._part(expert, projection, self.name(expert, projection, self.dialect.codes), CODE_DTYPES, shape)
        return codes.view(torch.uint8).flatten(1)

    def scales(self, expert: int, projection: Projection) -> torch.Tensor:
        """Block scales as bytes, uint8 [N, K/block]; checked to have no NaN and no sign."""
        assert self.format
        name = self.name(expert, projection, self._block_scales)
        stored = self._part(expert, projection, name, (self._scale_dtype,), (self.shape(projection)[1] // self.format.block,))
        scales = self._powers_of_two(name, stored) if stored.dtype == torch.float32 else stored.view(torch.uint8)
        largest = self.format.largest_scale_byte
        if scales.numel() and int(scales.max()) > largest:
            raise self._error("block scales are NaN or negative", name, given=f"byte {int(scales.max()):#04x}", needed=f"at most {largest:#04x}")
        return scales

    def dense(self, expert: int, projection: Projection) -> torch.Tensor:
        """An unquantised projection [N, K] in its own dtype, finite; fp8-block is dequantised to bf16."""
        weight, scale = self.dense_parts(expert, projection)
        if scale is not None:
            return dequantize_fp8_block(weight, scale)
        return self._finite(self.name(expert, projection, self.dialect.codes), weight)

    def dense_parts(self, expert: int, projection: Projection) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight [N, K] as stored and, for fp8-block, its checked scales."""
        shape, name = self.shape(projection), self.name(expert, projection, self.dialect.codes)
        weight = self._part(expert, projection, name, self._matrix_dtypes, shape[1:])
        return read_fp8_block(self.checkpoint, name) if self._is_fp8(name) else (weight, None)

    def dense_dtype(self) -> torch.dtype:
        """dtype that `dense` returns, which all matrices of the layer share; bf16 for fp8-block.

        Raises:
            CheckpointError: they do not, or have one that is not read.
        """
        return self._dense_dtype

    @cached_property
    def _dense_dtype(self) -> torch.dtype:
        fp8 = {} if self._layout.stacked else {torch.float8_e4m3fn: torch.bfloat16}
        return self._shared_dtype(self.projections, self.dialect.codes, _DENSE, fp8)

    def has_bias(self, projection: Projection) -> bool:
        """Whether the experts add a bias to this projection: gate and up have one each, or none has."""
        return bool(self.dialect.bias) and (self.moe.biased or (projection == DOWN) in self._biased)

    @cached_property
    def _biased(self) -> set[bool]:
        """Whether down has a bias (True), and gate and up have (False): where most are there the others are missing, else they are superfluous."""
        present: dict[bool, list[bool]] = {True: [], False: []}
        for expert in self._holders:
            for part in self.projections:
                present[part == DOWN].append(self.name(expert, part, self.dialect.bias) in self.checkpoint)
        return {side for side, found in present.items() if 2 * sum(found) >= len(found)}

    def bias_dtype(self, projection: Projection) -> torch.dtype:
        """dtype of the bias, which all experts share, as gate and up do; errors as `dense_dtype`."""
        return self._bias_dtypes[projection == DOWN]

    @cached_property
    def _bias_dtypes(self) -> dict[bool, torch.dtype]:
        sides = {part == DOWN: [other for other in self.projections if (other == DOWN) == (part == DOWN)] for part in self.projections}
        return {side: self._shared_dtype(parts, self.dialect.bias, _DENSE) for side, parts in sides.items() if self.has_bias(parts[0])}

    def _shared_dtype(
        self, parts: Sequence[Projection], suffix: str, known: tuple[torch.dtype, ...], read_as: Mapping[torch.dtype, torch.dtype] = _AS_IT_IS
    ) -> torch.dtype:
        """The dtype, one of the `known`, of the tensors of these projections of all experts, those that are there; some are `read_as` another."""
        names = list(dict.fromkeys(self.name(expert, part, suffix) for expert in self._holders for part in parts))
        dtypes = {name: self.checkpoint.info(name).dtype for name in names if name in self.checkpoint}
        if not dtypes:
            raise self._error("missing tensor", names[0], needed=_names(known))
        read = {name: read_as.get(dtype, dtype) for name, dtype in dtypes.items()}
        (common, _), *others = Counter(read.values()).most_common()
        odd = next((name for name, dtype in read.items() if dtype not in known or (others and dtype != common)), None)
        if odd is None:
            return common
        like = next((name for name, dtype in read.items() if name != odd and dtype in known), None)
        needed = _names((read[like],)) + f", as {like} is" if like else _names((*known, *read_as))
        raise self._error("wrong dtype", odd, given=f"{_names((dtypes[odd],))} {self.checkpoint.info(odd).shape}", needed=needed)

    def bias(self, expert: int, projection: Projection) -> torch.Tensor:
        """The bias [N] of a projection."""
        name = self.name(expert, projection, self.dialect.bias)
        if name not in self.checkpoint:
            others = (self.name(expert, part, self.dialect.bias) for part in self.projections)
            present = next((other for other in others if other in self.checkpoint), "no other")
            raise self._error("missing tensor", name, given=f"{present} of this expert", needed="a bias of each matrix, or of none")
        return self._finite(name, self._part(expert, projection, name, (self.bias_dtype(projection),), ()))

    def global_scales(self, experts: Iterable[int]) -> torch.Tensor | None:
        """Decode multipliers fp32 [len(experts), 3] of gate, up, down (2 without gate); None for a format without.

        A matrix whose codes are all zero is zero whatever its scale: where that is 0 or infinite, as pruned experts are exported, it becomes 1.
        """
        if self.format is None or not self.format.has_global_scale:
            return None
        matrices = [(expert, projection) for expert in experts for projection in self.projections]
        values = torch.empty(len(matrices), dtype=torch.float32)
        names = [self.name(*matrix, self.dialect.global_scale) for matrix in matrices]
        for index, (matrix, name) in enumerate(zip(matrices, names, strict=True)):
            if name not in self.checkpoint:
                raise self._error("missing scale", name, given=f"{sum(n in self.checkpoint for n in names)} of {len(names)}", needed="all of them")
            scale, stored = self._scalar(name, *matrix)
            if scale in (0.0, torch.inf) and not (self.codes(*matrix) & _MAGNITUDES).any():
                scale = 1.0
            values[index] = self._positive(name, scale, stored)
        return values.view(-1, len(self.projections))

    def input_scales(self) -> torch.Tensor | None:
        """Decode multipliers fp32 [E, 3] (2 without gate) of the calibrated activations of *all* experts; None where no expert has one.

        What is missing (see `missing_input_scales`) is the largest of the layer for the same input, as calibration fills it in; NaN where the layer
        has none for that input.

        Raises:
            CheckpointError: a value is not positive and finite.
        """
        if not self.has_input_scales(*self.projections):
            return None
        values = []
        for expert in range(self.moe.num_experts):
            for projection in self.projections:
                name = self.name(expert, projection, self.dialect.input_scale)
                values.append(self._positive(name, *self._scalar(name, expert, projection)) if name in self.checkpoint else torch.nan)
        scales = torch.tensor(values, dtype=torch.float32).view(-1, len(self.projections))
        for same_input in (scales[:, :-1], scales[:, -1:]):
            known = same_input[~same_input.isnan()]
            if len(known):
                same_input.nan_to_num_(nan=known.max().item())
        return scales

    def has_input_scales(self, *projections: Projection) -> bool:
        """Whether any expert has one for any of these projections."""
        suffix = self.dialect.input_scale
        return bool(suffix) and any(self.name(e, p, suffix) in self.checkpoint for e in range(self.moe.num_experts) for p in projections)

    def missing_input_scales(self) -> list[str]:
        """The names of those that are not there, though others of the layer are."""
        suffix, experts = self.dialect.input_scale, range(self.moe.num_experts)
        names = list(dict.fromkeys(self.name(e, p, suffix) for e in experts for p in self.projections)) if suffix else []
        missing = [name for name in names if name not in self.checkpoint]
        return missing if len(missing) < len(names) else []

    def check_matrix(self, expert: int, projection: Projection) -> Literal[True]:
        """Compare a matrix with the configuration, by header alone; of fp8 blocks the scales are read. True: it fits.

        Raises:
            CheckpointError: a missing tensor, or one of another dtype or shape.
        """
        name = self.name(expert, projection, self.dialect.codes)
        if name not in self.checkpoint:
            others = {self.name(expert, other, self.dialect.codes) for other in self.projections}
            present = sorted(other for other in others if other in self.checkpoint)
            raise self._error("missing tensor", name, given=f"of this expert {', '.join(present) or 'no matrix'}", needed="all of its matrices")
        self._check(name, self._matrix_dtypes, self._arrangement.stored_shape(projection, self.dialect.codes_shape(self.shape(projection)[1])))
        if self.format is None and self._is_fp8(name):
            read_fp8_scales(self.checkpoint, name)
        return True

    @property
    def _matrix_dtypes(self) -> tuple[torch.dtype, ...]:
        """Those of codes; or the one that dense matrices share, with fp8 blocks beside bf16."""
        if self.format is not None:
            return CODE_DTYPES
        return (self._dense_dtype, torch.float8_e4m3fn) if self._dense_dtype == torch.bfloat16 and not self._layout.stacked else (self._dense_dtype,)

    def _is_fp8(self, name: str) -> bool:
        """Whether a dense matrix is one of fp8 blocks; CheckpointError where it has their scales and is none."""
        dtype = self.checkpoint.info(name).dtype
        if dtype != torch.float8_e4m3fn and fp8_scales_of(name) in self.checkpoint:
            raise self._error("wrong dtype", name, given=f"{_names((dtype,))}, and {fp8_scales_of(name)}", needed="float8_e4m3fn with these scales")
        return dtype == torch.float8_e4m3fn

    @property
    def _holders(self) -> range:
        """The experts that have tensors of their own: of stacked ones the first stands for all."""
        return range(1 if self._layout.stacked else self.moe.num_experts)

    def check_all_used(self) -> None:
        """Raises UnsupportedError for a tensor of the layer's experts that nothing here reads: a scale or a bias that would be left out."""
        read = set()
        for projection in self.projections:
            biases = (self.dialect.bias,) if self.has_bias(projection) else ()
            suffixes = (self.dialect.codes, *filter(None, self._scale_suffixes()), *biases)
            read |= {self.name(expert, projection, suffix) for expert in self._holders for suffix in suffixes}
        if self.moe.family in KNOWN_MODEL_TYPES:  # some call a router's tensor experts.e_score_correction_bias
            read |= {f"{self.block}.{name}" for name in tensor_names(self.moe.family).correction_bias}
        names = self.checkpoint.names
        first, last = (bisect_left(names, self.block + end) for end in (".", "/"))  # "/" follows "." in the order of names
        unused = [name for name in names[first:last] if name not in read and self._is_of_experts(name)]
        if unused:
            raise UnsupportedError(
                f"a tensor of the experts that halfbyte does not read: {unused[0]}",
                where=str(self.checkpoint.file_of(unused[0])),
                given=f"{len(unused)} such tensors",
                needed=f"codes, scales and biases as {self.dialect.name} has them",
            )

    def _is_of_experts(self, name: str) -> bool:
        place = place_of(name)
        return place is not None and place.block == self.moe.block

    def _scale_suffixes(self) -> tuple[str, ...]:
        """Of all that belongs to the codes of a matrix, the block scales under the one name that they have."""
        if self.format is None:
            return () if self._layout.stacked else FP8_BLOCK.scales
        return (self._block_scales, self.dialect.global_scale, self.dialect.input_scale)

    @cached_property
    def _block_scales(self) -> str:
        """The name that most of them have, the first where none has one."""
        matrices = [(expert, part) for expert in self._holders for part in self.projections]
        return max(self.dialect.scales, key=lambda suffix: sum(self.name(*matrix, suffix) in self.checkpoint for matrix in matrices))

    @cached_property
    def _scale_dtype(self) -> torch.dtype:
        return self._shared_dtype(self.projections, self._block_scales, self.dialect.scale_dtypes)

    def _scalar(self, name: str, expert: int, projection: Projection) -> tuple[float, float]:
        """The decode multiplier that the scalar of one matrix means, and the scalar as stored.

        Stacked experts have one for all, one per expert, or one per expert for gate and up each.
        """
        tensor = self.checkpoint.read(name)
        experts = self.moe.num_experts
        halves = 2 if self._layout.fused and projection != DOWN else 1
        counts = {1, experts, halves * experts} if self._layout.stacked else {1}
        if tensor.numel() not in counts or tensor.dtype not in (*_DENSE, torch.float64):
            needed = f"one number, or one per expert: ({experts},)" if self._layout.stacked else "one fp32 number"
            raise self._error("not a scalar", name, given=f"{tensor.dtype} {tuple(tensor.shape)}", needed=needed)
        of_expert = tensor.reshape(1) if tensor.numel() == 1 else tensor.reshape(experts, -1)[expert]
        stored = of_expert[1 if projection == UP and len(of_expert) == 2 else 0]
        return self.dialect.decode_scalar(stored).item(), stored.item()

    def _finite(self, name: str, values: torch.Tensor) -> torch.Tensor:
        if count := count_nonfinite(values):
            raise self._error("NaN or infinite values", name, given=f"{count} of {values.numel()}", needed="finite values")
        return values

    def _positive(self, name: str, scale: float, stored: float) -> float:
        if not 0 < scale < torch.inf:
            raise self._error("scale is not a positive finite number", name, given=stored, needed="a positive finite number")
        return scale

    def _part(self, expert: int, projection: Projection, name: str, dtypes: tuple[torch.dtype, ...], columns: tuple[int, ...]) -> torch.Tensor:
        """The rows of one projection of one expert, [N, *columns], from a tensor of the layer."""
        self._check(name, dtypes, self._arrangement.stored_shape(projection, columns))
        return self._arrangement.rows_of(self.checkpoint.read(name), expert, projection, columns)

    def _check(self, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
        if name not in self.checkpoint:
            raise self._error("missing tensor", name, needed=f"{_names(dtypes)} {shape}")
        dtype, given = self.checkpoint.dtype_shape(name)
        if dtype not in dtypes or given != shape:
            problem = "wrong dtype" if dtype not in dtypes else "wrong shape"
            raise self._error(problem, name, given=f"{_names((dtype,))} {given}", needed=f"{_names(dtypes)} {shape}")

    def _error(self, problem: str, name: str, *, given: object = None, needed: object = None) -> CheckpointError:
        file = self.checkpoint.file_of(name) if name in self.checkpoint else self.checkpoint.path
        stored = f"{self.format!r} experts ({self.checkpoint.quantization.kind})" if self.format else "unquantised experts"
        return CheckpointError(
            f"{problem}: {name}",
            where=str(file),
            given=given,
            needed=needed,
            next_step=f"the configuration says {stored}: check it, or export the model again",
        )

    def _check_blocks(self, format: BlockFormat) -> None:
        for label, size in (("hidden size", self.moe.hidden), ("expert intermediate size", self.moe.intermediate)):
            if size % format.block:
                raise CheckpointError(
                    f"the {label} does not divide into {format!r} blocks",
                    where=str(self.checkpoint.path / "config.json"),
                    given=size,
                    needed=f"a multiple of {format.block}",
                    next_step="leave these experts unquantised",
                )

    def _check_input_factors(self) -> None:
        """Refuse NVFP4_AWQ's factors by name: neither codes nor block scales can take up a factor per input channel exactly (docs/checkpoints.md)."""
        suffix = self.dialect.input_factor
        if not suffix:
            return
        for name in (self.name(expert, part, suffix) for expert in range(self.moe.num_experts) for part in self.projections):
            if name in self.checkpoint:
                raise UnsupportedError(
                    f"the input of this matrix has to be multiplied channel by channel: {name}",
                    where=str(self.checkpoint.file_of(name)),
                    given="NVFP4_AWQ with pre_quant_scale",
                    needed="NVFP4 without",
                    next_step="quantise the original model again without AWQ",
                )

    def _is_transposed(self, arrangement: Arrangement) -> bool:
        """Whether stacked matrices are stored [K, N]."""
        if not self._layout.stacked or self._layout.flat or self.dialect.blocked:
            return False
        names = {part: self.name(0, part, self.dialect.codes) for part in (UP, DOWN)}
        shapes = {part: self.checkpoint.info(name).shape for part, name in names.items() if name in self.checkpoint}
        columns = {part: self.dialect.codes_shape(arrangement.shape(part)[1]) for part in shapes}
        return arrangement.fits_transposed(shapes, columns, packed=1 if self.format is None else 2)

    def _powers_of_two(self, name: str, scales: torch.Tensor) -> torch.Tensor:
        """fp32 scales that are powers of two as e8m0 bytes."""
        stored, bad = e8m0.of_powers_of_two(scales)
        if bad.any():
            raise self._error("block scales are not powers of two", name, given="other fp32 numbers", needed="2^-126 .. 2^127")
        return stored


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(dtype_name(dtype) for dtype in dtypes)
