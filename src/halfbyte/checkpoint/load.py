"""Files to canonical `ExpertWeights`: outputs are preallocated and filled expert by expert from the mapped files."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from types import NoneType

import torch

from halfbyte.arguments import as_device, check_type
from halfbyte.checkpoint.defects import describe_missing, describe_scatter
from halfbyte.checkpoint.layer_tensors import LayerTensors
from halfbyte.checkpoint.projections import DOWN, GATE, UP, Projection
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.errors import InputError, printable
from halfbyte.experts import ExpertWeights
from halfbyte.formats import QuantTensor

logger = logging.getLogger(__name__)


def load_experts(model: str | Path | Checkpoint, layer: int, device: torch.device | str = "cpu", *, experts: range | None = None) -> ExpertWeights:
    """Read the experts of one layer into canonical form, whatever the checkpoint's format and naming.

    Peak memory: the result, plus (for fp8-block sources only) one dequantised matrix; files are memory-mapped.

    Args:
        model: directory, Hub name `org/name`, or an open `Checkpoint`.
        layer: decoder layer index.
        device: where the result goes.
        experts: contiguous slice of the experts (expert parallel), all by default. Input scales always cover all of them.

    Raises:
        CheckpointError: a damaged or inconsistent checkpoint, a missing, NaN or non-positive scale, no experts in this layer.
        UnsupportedError: a quantisation or dtype halfbyte does not read; a family it does not know, and names and shapes do not tell (see
            docs/checkpoints.md).
        InputError: `experts` is not a contiguous slice of the layer's experts; `layer` is no integer.

    >>> from pathlib import Path
    >>> w = load_experts(Path(halfbyte.__file__).parent / "demo_model", 0)
    >>> w.w13.shape, w.w2.shape
    (torch.Size([16, 256, 256]), torch.Size([16, 256, 128]))
    """
    checkpoint = model if isinstance(model, Checkpoint) else Checkpoint.open(model)
    place = as_device(device, "load_experts")
    reader = ExpertReader(checkpoint, layer, experts)
    result = reader.allocate(place)
    reader.read(reader.experts, result)
    return result


class ExpertReader:
    """Reads the experts of one layer, in slices, into canonical tensors that are there already.

    Attributes:
        experts: those that may be read.
        format: block format of the experts, None when dense.

    >>> from pathlib import Path
    >>> checkpoint = halfbyte.checkpoint.Checkpoint.open(Path(halfbyte.__file__).parent / "demo_model")
    >>> reader = ExpertReader(checkpoint, 0)
    >>> two = reader.allocate("cpu", 2)
    >>> reader.read(range(6, 8), two)
    >>> torch.equal(two.w2, load_experts(checkpoint, 0).w2[6:8])
    True
    """

    def __init__(self, checkpoint: Checkpoint, layer: int, experts: range | None = None):
        """Look the layer's tensors up, each of which has a use; no data is read. `experts` and errors as in `load_experts`."""
        check_type("load_experts", (range, NoneType), experts=experts)
        self._layer, moe, where = layer, checkpoint.moe, str(checkpoint.path / "config.json")
        moe.check_layer(layer, where)
        self._tensors = LayerTensors(checkpoint, layer)
        self._activation = moe.known_activation(where)
        self.experts = range(moe.num_experts) if experts is None else experts
        if self.experts.step != 1 or not 0 <= self.experts.start <= self.experts.stop <= moe.num_experts:
            raise InputError("experts must be a contiguous slice of the layer's experts", given=experts, needed=f"within range(0, {moe.num_experts})")
        self.format = self._tensors.format
        for projection in self._tensors.projections:  # before anything is allocated for sizes that the files do not have
            self._tensors.check_matrix(0, projection)
        self._tensors.check_all_used()

    def allocate(self, device: torch.device | str, num_experts: int | None = None) -> ExpertWeights:
        """Uninitialised storage for `num_experts` experts from the first on, by default for all of them, on `device` ("meta" too)."""
        tensors, moe = self._tensors, self._tensors.moe
        count, total = len(self.experts) if num_experts is None else num_experts, moe.num_experts

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        gated = GATE in tensors.projections
        gate_rows = moe.intermediate if gated else 0

        def of_w13(experts: int) -> tuple[int, ...]:
            return (experts, 2) if gated else (experts,)

        def weight(rows: int, columns: int, *scale_shape: int) -> QuantTensor | torch.Tensor:
            if self.format is None:
                return empty(count, rows, columns, dtype=tensors.dense_dtype())
            codes = empty(count, rows, columns // 2, dtype=torch.uint8)
            scales = empty(count, rows, columns // self.format.block, dtype=self.format.scale_dtype)
            return QuantTensor(codes, scales, empty(*scale_shape) if self.format.has_global_scale else None, self.format)

        def bias(projection: Projection, rows: int) -> torch.Tensor | None:
            return empty(count, rows, dtype=tensors.bias_dtype(projection)) if tensors.has_bias(projection) else None

        return ExpertWeights(
            weight(gate_rows + moe.intermediate, moe.hidden, *of_w13(count)),
            weight(moe.hidden, moe.intermediate, count),
            self._activation,
            bias(UP, gate_rows + moe.intermediate),
            bias(DOWN, moe.hidden),
            empty(*of_w13(total)) if tensors.has_input_scales(*tensors.projections[:-1]) else None,
            empty(total) if tensors.has_input_scales(DOWN) else None,
            first_expert=self.experts.start,
            num_global_experts=total,
        )

    def read(self, experts: range, out: ExpertWeights) -> None:
        """Fill all of `out` with these experts, one projection at a time, and with the input scales of all experts of the layer.

        Raises:
            CheckpointError: a missing tensor, one of another dtype or shape, a missing, NaN or non-positive scale.
        """
        tensors, middle = self._tensors, self._tensors.moe.intermediate
        rows_of = {GATE: slice(0, middle), UP: slice(-middle, None), DOWN: slice(None)}
        scales = tensors.global_scales(experts)
        if scales is not None:
            for weight, of_weight in ((out.w13, scales[:, :-1]), (out.w2, scales[:, -1])):
                assert isinstance(weight, QuantTensor) and weight.global_scale is not None
                weight.global_scale.copy_(of_weight.reshape(weight.global_scale.shape))
        for slot, expert in enumerate(experts):
            for projection in tensors.projections:
                weight, bias = (out.w2, out.w2_bias) if projection == DOWN else (out.w13, out.w13_bias)
                rows = rows_of[projection]
                if isinstance(weight, QuantTensor):
                    weight.codes[slot, rows].copy_(tensors.codes(expert, projection))
                    weight.scales.view(torch.uint8)[slot, rows].copy_(tensors.scales(expert, projection))
                else:
                    weight[slot, rows].copy_(tensors.dense(expert, projection))
                if bias is not None:
                    bias[slot, rows].copy_(tensors.bias(expert, projection))
        if out.w13_input_scale is not None:
            out.w13_input_scale.copy_(self._input_scales[:, :-1].reshape(out.w13_input_scale.shape))
        if out.w2_input_scale is not None:
            out.w2_input_scale.copy_(self._input_scales[:, -1])

    @cached_property
    def _input_scales(self) -> torch.Tensor:
        """fp32 [E, 3] (2 without gate) of all experts of the layer; missing and scattered ones are logged."""
        scales = self._tensors.input_scales()
        assert scales is not None
        for message in (*describe_missing(self._tensors.missing_input_scales()), *describe_scatter(scales, self._tensors.projections)):
            logger.warning("%s, layer %d: %s", self._tensors.checkpoint.path, self._layer, printable(message))
        return scales
