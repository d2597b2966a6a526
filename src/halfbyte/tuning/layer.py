"""`Layer`: one kind of MoE layer as the tuner sees it, by its sizes alone. No weights of a checkpoint are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from halfbyte.bench.shapes import MoEShape
from halfbyte.checkpoint.families import describe_moe, find_experts
from halfbyte.checkpoint.quantization import describe_quantization
from halfbyte.checkpoint.source import read_json
from halfbyte.device import Target
from halfbyte.errors import InputError
from halfbyte.experts import RELU2, SWIGLU, ExpertWeights
from halfbyte.formats import BlockFormat, QuantTensor
from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.kernels.problem import Problem
from halfbyte.kernels.table import KernelChoice, choose_untuned, wanted_layout
from halfbyte.kernels.tuned import LayerKey
from halfbyte.weights.layouts import LAYOUTS


@dataclass(frozen=True)
class Layer:
    """A layer, the activations of its calls, and the device that runs them."""

    shape: MoEShape
    format: BlockFormat
    activations: ActivationFormat
    target: Target

    @cached_property
    def problem(self) -> Problem:
        shape = self.shape
        problem = Problem(
            "fused_moe", self.target, self.format, activations=self.activations, dtype=torch.bfloat16, num_experts=shape.num_experts,
            hidden=shape.hidden, intermediate=shape.intermediate, gated=shape.activation.gated, kind=shape.activation.kind,
        )  # fmt: skip
        return problem._replace(layout=wanted_layout(problem)[0])

    @property
    def kernel(self) -> KernelChoice:
        """The kernel of the layer, with its own rule."""
        return choose_untuned(self.problem)

    @property
    def key(self) -> LayerKey:
        return LayerKey.of(self.kernel.name, self.problem)

    def __str__(self) -> str:
        return f"{self.shape.name} {self.format.name.upper()}, {self.activations} activations"

    @staticmethod
    def called(problem: Problem, top_k: int) -> Layer:
        """The layer of a call. Which function stands between the products is not known, and does not matter for their tiles."""
        assert problem.format is not None
        sizes = (problem.hidden, problem.intermediate, problem.num_experts, top_k)
        shape = MoEShape(" x ".join(map(str, sizes)), *sizes, SWIGLU if problem.gated else RELU2)
        return Layer(shape, problem.format, problem.activations, problem.target)  # type: ignore[arg-type]  # activations of a call are one of the formats

    def empty_storage(self, device: str) -> Any:
        """Storage of the layout on `device`, uninitialised."""
        shape, format = self.shape, self.format

        def meta(*sizes: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
            return torch.empty((shape.num_experts, *sizes), dtype=dtype, device="meta")

        def matrix(rows: int, columns: int, *halves: int) -> QuantTensor:
            global_scale = meta(*halves, dtype=torch.float32) if format.has_global_scale else None
            return QuantTensor(meta(rows, columns // 2), meta(rows, columns // format.block), global_scale, format)

        rows13 = shape.halves * shape.intermediate
        w13 = matrix(rows13, shape.hidden, *((2,) if shape.halves == 2 else ()))
        bias13, bias2 = (meta(rows, dtype=torch.bfloat16) if shape.has_bias else None for rows in (rows13, shape.hidden))
        weights = ExpertWeights(w13, matrix(shape.hidden, shape.intermediate), shape.activation, bias13, bias2)
        return LAYOUTS[str(self.problem.layout)].allocate(weights, device)


def shape_of_model(directory: Path) -> MoEShape:
    """The sizes and format of a model's MoE layers, from its config.json (and hf_quant_config.json) alone.

    Raises:
        CheckpointError: no config.json, or values missing in it.
        UnsupportedError: an unknown model_type.
        InputError: its experts are not in FP4.
    """
    config, modelopt = read_json(directory / "config.json"), directory / "hf_quant_config.json"
    place = find_experts(("model.layers.0.mlp.experts.0.gate_proj.weight",))  # where tensors would be is of no interest here
    moe = describe_moe(config, place, where=str(directory / "config.json"))
    format = describe_quantization(config, read_json(modelopt) if modelopt.exists() else None, where=str(directory)).format
    if format is None:
        raise InputError("these experts are not in FP4", where=str(directory), needed="NVFP4 or MXFP4", next_step="tune by --shape and --format")
    top_k = moe.known_top_k or (moe.routing.top_k if moe.routing else 1)
    return MoEShape(directory.name, moe.hidden, moe.intermediate, moe.num_experts, top_k, moe.activation or SWIGLU, moe.biased, format)


def distinct(layers: Sequence[Layer]) -> list[Layer]:
    """One of the layers that a kernel cannot tell apart."""
    return list({layer.key: layer for layer in reversed(layers)}.values())[::-1]
