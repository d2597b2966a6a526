"""`LayerTensors`: where the experts of one layer lie in a checkpoint, whatever its family and dialect; every tensor is checked as it is read.

Names come from `checkpoint.projections` (which matrix) and `checkpoint.dialects` (which part of it).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from halfbyte.checkpoint.dialects import CODE_DTYPES, FP8_BLOCK, STACKED_FORM
from halfbyte.checkpoint.projections import DOWN, GATE, UP, Projection, find_layout, stacked_sizes
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats import BlockFormat
from halfbyte.formats.fp8_block import dequantize as dequantize_fp8_block
from halfbyte.formats.fp8_block import scale_shape as fp8_scale_shape

_DENSE = (torch.bfloat16, torch.float16, torch.float32)


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
        self.moe.check_layer(layer, str(checkpoint.path / "config.json"))
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
        if stacked_form and modules[DOWN] + self.dialect.codes not in checkpoint:
            self.dialect = stacked_form
        self.format: BlockFormat | None = self.dialect.format
        if self.format is not None:
            self._check_blocks(self.format)
        self._transposed = self._is_transposed()
        self._check_input_factors()

    def shape(self, projection: Projection) -> tuple[int, int]:
        """Rows and columns of a projection: [I, H] for gate and up, [H, I] for down."""
        return (self.moe.hidden, self.moe.intermediate) if projection == DOWN else (self.moe.intermediate, self.moe.hidden)

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
        names = [self.name(expert, projection, suffix) for suffix in self.dialect.scales]
        name = next((name for name in names if name in self.checkpoint), names[0])
        stored = self._part(expert, projection, name, self.dialect.scale_dtypes, (self.shape(projection)[1] // self.format.block,))
        scales = self._powers_of_two(name, stored) if stored.dtype == torch.float32 else stored.view(torch.uint8)
        largest = 0x7E if self.format.has_global_scale else 0xFE  # above: NaN, and for e4m3 the negative half
        if scales.numel() and int(scales.max()) > largest:
            raise self._error("block scales are NaN or negative", name, given=f"byte {int(scales.max()):#04x}", needed=f"at most {largest:#04x}")
        return scales

    def dense(self, expert: int, projection: Projection) -> torch.Tensor:
        """An unquantised projection [N, K] in its own dtype; fp8-block is dequantised to bf16."""
        weight, scale = self.dense_parts(expert, projection)
        return weight if scale is None else dequantize_fp8_block(weight, scale)

    def dense_parts(self, expert: int, projection: Projection) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight [N, K] as stored and, for fp8-block, its checked scales."""
        shape, name = self.shape(projection), self.name(expert, projection, self.dialect.codes)
        fp8 = () if self._layout.stacked else (torch.float8_e4m3fn,)
        weight = self._part(expert, projection, name, (self.dense_dtype(), *fp8), shape[1:])
        if weight.dtype != torch.float8_e4m3fn:
            return weight, None
        name = self.name(expert, projection, FP8_BLOCK.scales[0])
        scale = self._read(name, FP8_BLOCK.scale_dtypes, fp8_scale_shape(*shape))
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise self._error("fp8 block scales are not positive finite numbers", name, given=f"smallest {scale.min().item()}")
        return weight, scale

    def dense_dtype(self) -> torch.dtype:
        """dtype that `dense` returns: that of the first expert's first matrix, which all share; bf16 for fp8-block."""
        name = self.name(0, self.projections[0], self.dialect.codes)
        if name not in self.checkpoint:
            raise self._error("missing tensor", name, needed=_names(_DENSE))
        dtype = self.checkpoint.info(name).dtype
        if dtype not in (*_DENSE, torch.float8_e4m3fn):
            raise self._error("wrong dtype", name, given=_names((dtype,)), needed=_names((*_DENSE, torch.float8_e4m3fn)))
        return torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype

    def has_bias(self, projection: Projection) -> bool:
        return bool(self.dialect.bias) and self.name(0, projection, self.dialect.bias) in self.checkpoint

    def bias_dtype(self, projection: Projection) -> torch.dtype:
        """dtype of the bias, which all experts share."""
        return self.checkpoint.info(self.name(0, projection, self.dialect.bias)).dtype

    def bias(self, expert: int, projection: Projection) -> torch.Tensor:
        """The bias [N] of a projection."""
        return self._part(expert, projection, self.name(expert, projection, self.dialect.bias), _DENSE, ())

    def global_scales(self, experts: Iterable[int]) -> torch.Tensor | None:
        """Decode multipliers fp32 [len(experts), 3] of gate, up, down (2 without gate); None for a format without."""
        if self.format is None or not self.format.has_global_scale:
            return None
        return self._scalars(self.dialect.global_scale, experts)

    def input_scales(self) -> torch.Tensor | None:
        """Decode multipliers fp32 [E, 3] (2 without gate) of the calibrated activations of *all* experts; None where no expert has one.

        Raises:
            CheckpointError: some experts have one and some do not, or a value is not positive and finite.
        """
        return self._scalars(self.dialect.input_scale, range(self.moe.num_experts)) if self.has_input_scales() else None

    def has_input_scales(self) -> bool:
        """Whether any expert has one."""
        suffix = self.dialect.input_scale
        return bool(suffix) and any(self.name(e, p, suffix) in self.checkpoint for e in range(self.moe.num_experts) for p in self.projections)

    def _scalars(self, suffix: str, experts: Iterable[int]) -> torch.Tensor:
        """The decode multipliers called `suffix`, fp32 [len(experts), projections]."""
        places = [(expert, projection) for expert in experts for projection in self.projections]
        names = [self.name(*place, suffix) for place in places]
        values = torch.empty(len(names))
        for index, (name, place) in enumerate(zip(names, places, strict=True)):
            if name not in self.checkpoint:
                raise self._error("missing scale", name, given=f"{sum(n in self.checkpoint for n in names)} of {len(names)}", needed="all of them")
            tensor = self._scalar(name, *place)
            values[index] = self.dialect.decode_scalar(tensor)
            if not 0 < values[index] < torch.inf:
                raise self._error("scale is not a positive finite number", name, given=tensor.item(), needed="a positive finite number")
        return values.view(-1, len(self.projections))

    def _scalar(self, name: str, expert: int, projection: Projection) -> torch.Tensor:
        """The scalar [] of one matrix: stacked experts have one for all, one per expert, or one per expert for gate and up each."""
        tensor = self.checkpoint.read(name)
        if tensor.numel() == 1 and tensor.is_floating_point():
            return tensor.reshape(())
        experts = self.moe.num_experts
        halves = 2 if self._layout.fused and projection != DOWN else 1
        if not self._layout.stacked or not tensor.is_floating_point() or tensor.numel() not in (experts, halves * experts):
            needed = f"one number, or one per expert: ({experts},)" if self._layout.stacked else "one fp32 number"
            raise self._error("not a scalar", name, given=f"{tensor.dtype} {tuple(tensor.shape)}", needed=needed)
        of_expert = tensor.reshape(experts, -1)[expert]
        return of_expert[1 if projection == UP and len(of_expert) == 2 else 0]

    def _part(self, expert: int, projection: Projection, name: str, dtypes: tuple[torch.dtype, ...], columns: tuple[int, ...]) -> torch.Tensor:
        """The rows of one projection of one expert, [N, *columns], from a tensor of the layer."""
        layout, rows = self._layout, self.shape(projection)[0]
        if not layout.stacked:
            return self._read(name, dtypes, (rows, *columns))
        rows *= 2 if layout.fused and projection != DOWN else 1
        transposed = bool(columns) and (self._transposed or (layout.flat and projection == DOWN))
        matrix = (*columns, rows) if transposed else (rows, *columns)
        experts = self.moe.num_experts
        if layout.flat:
            stacked = self._read(name, dtypes, (experts * matrix[0], *matrix[1:])).view(experts, *matrix)
        else:
            stacked = self._read(name, dtypes, (experts, *matrix))
        return self._rows_of(stacked[expert].mT if transposed else stacked[expert], projection)

    def _read(self, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self.checkpoint:
            raise self._error("missing tensor", name, needed=f"{_names(dtypes)} {shape}")
        dtype, given = self.checkpoint.dtype_shape(name)
        if dtype not in dtypes or given != shape:
            problem = "wrong dtype" if dtype not in dtypes else "wrong shape"
            raise self._error(problem, name, given=f"{_names((dtype,))} {given}", needed=f"{_names(dtypes)} {shape}")
        return self.checkpoint.read(name)

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
        """Refuse NVFP4_AWQ's factors by name: neither codes nor block scales can take up a factor per input channel exactly."""
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

    def _is_transposed(self) -> bool:
        """Whether stacked matrices are stored [K, N]: both shapes together say so, one alone may fit either way."""
        if not self._layout.stacked or self._layout.flat or self.dialect.blocked:
            return False
        up, down = (self.name(0, part, self.dialect.codes) for part in (UP, DOWN))
        if up not in self.checkpoint or down not in self.checkpoint:
            return False
        sizes = stacked_sizes(
            self.checkpoint.info(up).shape,
            self.checkpoint.info(down).shape,
            halves=2 if self._layout.fused else 1,
            packed=1 if self.format is None else 2,
        )
        return sizes is not None and sizes.transposed

    def _rows_of(self, rows: torch.Tensor, projection: Projection) -> torch.Tensor:
        """The rows of one projection out of a stacked expert."""
        if projection == DOWN or not self._layout.fused:
            return rows
        first = projection == GATE
        if self.moe.interleaved:
            return rows[0 if first else 1 :: 2]
        return rows[: self.moe.intermediate] if first else rows[self.moe.intermediate :]

    def _powers_of_two(self, name: str, scales: torch.Tensor) -> torch.Tensor:
        """fp32 scales that are powers of two as e8m0 bytes."""
        bits = scales.view(torch.int32)
        exponents = bits >> 23
        if scales.numel() and (bool((bits & 0x7FFFFF).any()) or int(exponents.min()) < 1 or int(exponents.max()) > 0xFE):
            raise self._error("block scales are not powers of two", name, given="other fp32 numbers", needed="2^-126 .. 2^127")
        return exponents.to(torch.uint8)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
