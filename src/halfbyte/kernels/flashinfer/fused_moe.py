"""The mixture-of-experts layer on FlashInfer's kernels for Blackwell, the best there are on those GPUs. Not run here: there was no such GPU.

`KERNELS` has what each of the two multiplies, and on which GPUs. Semantics are those of `kernels.reference.fused_moe`, but for: trtllm-gen takes the
weights of the routing in bf16; the activated product is quantised without being rounded to bf16 before. GELU is exact in CUTLASS and approximated by
tanh in trtllm-gen.

Tests compute what the functions are documented to, from the very arguments that are handed over, and compare those with the signatures of two
releases (tests/kernels/flashinfer). FlashInfer compiles or downloads its kernels at the first call: `warm_up` makes one. It takes its memory from
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from halfbyte.formats.activation_formats import ActivationFormat
from halfbyte.formats.fp8_tensor import Fp8Tensor
from halfbyte.kernels.flashinfer import arguments, package
from halfbyte.kernels.problem import Hidden, Problem, Size, Support
from halfbyte.weights.engines.common import EngineExperts

CONFIG = "chosen by FlashInfer"
# A grid of trtllm-gen has up to (tokens x experts per token) / 8 + experts blocks in a dimension that ends at 65,535.
MAX_BLOCKS, SMALLEST_TILE = 65535, 8


class Kernel(NamedTuple):
    """One of FlashInfer's functions, which reads the layout of its name.

    Attributes:
        function: its name in the package.
        arguments: what it is called with.
        archs: the GPUs it is for.
        activations: by format of the weights, what it multiplies them by.
        kinds: by format, the functions between the two matrices, each with its name in FlashInfer's ActivationType.
        needs_input_scales: for nvfp4 activations; otherwise a scale per token does.
        pads_output: it writes all columns that the layout has.
    """

    function: str
    arguments: Callable[..., dict[str, Any]]
    archs: tuple[str, ...]
    activations: Mapping[str, tuple[str, ...]]
    kinds: Mapping[str, Mapping[str, str]]
    needs_input_scales: bool
    pads_output: bool


_EXACT = {"swiglu": "Swiglu", "geglu": "Geglu", "relu2": "Relu2"}
KERNELS = {
    "trtllm_gen": Kernel(
        "trtllm_fp4_block_scale_routed_moe",
        arguments.of_trtllm_gen,
        ("sm_100", "sm_103"),
        {"nvfp4": ("nvfp4",), "mxfp4": ("bf16", "mxfp8")},
        {"nvfp4": {"swiglu": "Swiglu", "geglu_tanh": "Geglu", "relu2": "Relu2"}, "mxfp4": {"swiglu": "Swiglu"}},
        needs_input_scales=False,
        pads_output=False,
    ),
    "cutlass": Kernel(
        "cutlass_fused_moe",
        arguments.of_cutlass,
        ("sm_100", "sm_103", "sm_120", "sm_121"),
        {"nvfp4": ("nvfp4",), "mxfp4": ("mxfp8",)},
        {"nvfp4": _EXACT, "mxfp4": _EXACT},
        needs_input_scales=True,
        pads_output=True,
    ),
}


def layout(problem: Problem) -> str:
    return next((name for name, kernel in KERNELS.items() if problem.target.arch in kernel.archs), "trtllm_gen")


def supports(problem: Problem) -> Support:
    found = _refusal(problem)
    return Support.yes("FlashInfer's kernels, on Blackwell's FP4 tensor cores") if found is None else Support.no(found)


def _refusal(problem: Problem) -> str | None:
    layout, arch, format = str(problem.layout), problem.target.arch, problem.format
    if layout not in KERNELS:
        return f"reads layouts {' and '.join(map(repr, KERNELS))}, the weights are in {problem.layout!r}"
    kernel = KERNELS[layout]
    if arch not in kernel.archs:
        return f"layout {layout!r} is for {' and '.join(kernel.archs)}, this is {arch}"
    if format is None:
        return "reads NVFP4 and MXFP4 weights, these are dense"
    if problem.activations not in kernel.activations[format.name]:
        return f"{layout} multiplies {format!r} by activations in {' or '.join(kernel.activations[format.name])}, not {problem.activations}"
    if problem.quantized is not None and (problem.quantized, problem.activations) != ("mxfp8", "mxfp8"):
        return f"quantises hidden states itself, these arrive in {problem.quantized}"
    if problem.quantized is None and problem.dtype not in (None, torch.bfloat16):
        return f"takes bf16, hidden is {problem.dtype}: pass hidden.bfloat16()"
    if problem.kind not in kernel.kinds[format.name]:
        return f"{layout} has no {problem.kind} for {format!r} experts"
    if kernel.needs_input_scales and problem.activations == "nvfp4" and not problem.calibrated:
        return f"{layout} quantises activations with input scales, which these experts lack"
    if problem.batch_invariant:
        return "FlashInfer chooses kernels by the number of tokens, and batch_invariant is asked for"
    return package.refusal()


def configs(problem: Problem) -> tuple[str, ...]:
    return (CONFIG,)


def choose_config(problem: Problem, size: Size) -> str:
    return CONFIG


def run(
    hidden: Hidden,
    experts: EngineExperts,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    activations: ActivationFormat = "bf16",
    expert_offset: int = 0,
    out: torch.Tensor | None = None,
    batch_invariant: bool = False,
    config: str | None = None,
) -> torch.Tensor:
    """hidden [T, H] bf16 or MXFP8, topk_ids int [T, k], topk_weights float [T, k] to [T, H] bf16, or out.

    Raises:
        UnsupportedError: NVFP4 experts without input scales that have a bias, beta or limit.
    """
    assert isinstance(hidden, torch.Tensor | Fp8Tensor), "the table gives this kernel nothing else"
    arguments.check_scalars(experts)
    num_tokens, top_k = topk_ids.shape
    if out is None:
        out = torch.empty((num_tokens, experts.hidden), dtype=torch.bfloat16, device=experts.device)
    if num_tokens == 0:
        return out
    kernel, flashinfer = KERNELS[experts.layout], package.flashinfer()
    function = getattr(flashinfer, kernel.function)
    activation_type = getattr(flashinfer.ActivationType, kernel.kinds[experts.format.name][experts.activation.kind])
    width = experts.padded_hidden if kernel.pads_output else experts.hidden
    direct = out.dtype == torch.bfloat16 and out.is_contiguous() and out.shape[1] == width
    result = out if direct else torch.empty((num_tokens, width), dtype=torch.bfloat16, device=experts.device)
    step = (MAX_BLOCKS - experts.num_global_experts) * SMALLEST_TILE // top_k
    rows = arguments.encode(hidden, experts, activations)
    for first in range(0, num_tokens, step):
        here = slice(first, first + step)
        named = kernel.arguments(rows.of(here), experts, topk_ids[here], topk_weights[here], expert_offset, result[here])
        function(**named, activation_type=activation_type)
    return out if result is out else out.copy_(result[:, : experts.hidden])
