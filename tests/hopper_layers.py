"""Layers, tokens and checks for the tests of the Hopper kernels, on a GPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from helpers import assert_close_rel, assert_equal_bits

import halfbyte as hb
from halfbyte.experts import DEEPSEEK_V4_SWIGLU, GEGLU, GEGLU_TANH, GPT_OSS_SWIGLU, RELU2, SWIGLU, Activation, ExpertWeights
from halfbyte.kernels.problem import Size, layer_problem
from halfbyte.kernels.reference.fused_moe import run as reference
from halfbyte.kernels.work_list import WorkList
from halfbyte.weights.hopper.layout import HopperExperts, padded_size

ACTIVATIONS = {"swiglu": SWIGLU, "gpt-oss": GPT_OSS_SWIGLU, "deepseek-v4": DEEPSEEK_V4_SWIGLU, "geglu": GEGLU, "tanh": GEGLU_TANH, "relu2": RELU2}
# A whole layer on fp8 tensor cores, for the reason given beside `gate.fp8_allowance`: 3.3e-2 and 1.4e-2 were measured with the tokens of these tests.
FP8_LIMITS = {"token": 5e-2, "overall": 2e-2}


def in_turns(names: Iterable[str], tails: Iterable[tuple[int, int]]) -> list[tuple[str, hb.BlockFormat, int, int]]:
    """Every kernel with every tail, the two formats in turns: each of these is compiled for many seconds, and what a tail needs is the same in both.

    A kernel has the same format with the same tail in every test, so that tests share what is compiled.

    >>> in_turns(["tiny", "large"], [(256, 128), (2880, 96)])
    [('tiny', MXFP4, 256, 128), ('tiny', NVFP4, 2880, 96), ('large', NVFP4, 256, 128), ('large', MXFP4, 2880, 96)]
    """
    formats, number = (hb.NVFP4, hb.MXFP4), {name: i for i, name in enumerate(configs())}
    return [(name, formats[(number[name.lower()] + j) % 2], *tail) for name in names for j, tail in enumerate(tails)]


def activation_of(hidden: int) -> Activation:
    """The activation of layers of these tests: that of gpt-oss, which has biases, where they have its width."""
    return GPT_OSS_SWIGLU if hidden == 2880 else SWIGLU


def configs() -> dict[str, object]:
    """Every configuration by the name of its constant, in small letters."""
    from halfbyte.kernels.sm90 import configs as module

    exact = ("DIRECT", "DECODE", "MICRO", "TINY", "SMALL", "MEDIUM", "LARGE", "HUGE")
    fp8 = ("FP8_TINY", "FP8_WIDE", "FP8_SMALL", "FP8_MEDIUM", "FP8_LARGE", "FP8_HUGE")
    return {name.lower(): getattr(module, name) for name in (*exact, *fp8)}


def rounds_weights(prepared: hb.PreparedExperts, topk_ids: torch.Tensor, activations: str) -> bool:
    from halfbyte.kernels.sm90 import configs as module

    problem = layer_problem("fused_moe", prepared.storage, prepared.target, prepared.layout, activations)
    return module.rounds_weights(module.choose_config(problem, Size(*topk_ids.shape)))


def workspace(experts: HopperExperts, topk_ids: torch.Tensor, config: object) -> tuple[WorkList, torch.Tensor, torch.Tensor]:
    """Slots sorted by expert, and h [rows, I padded] and y [rows, H] full of NaN."""
    from halfbyte.kernels.shared.sort import run as sort

    work, rows = sort(topk_ids, 0, experts.num_experts, config.max_rows), topk_ids.numel()
    h, y = (
        torch.full((rows, columns), torch.nan, dtype=torch.bfloat16, device="cuda") for columns in (padded_size(experts.intermediate), experts.hidden)
    )
    return work, h, y


def make_experts(num_experts: int, hidden: int, intermediate: int, format: hb.BlockFormat, activation: Activation = SWIGLU) -> ExpertWeights:
    """Random experts on the GPU; gate and up have different global scales, biases with the gpt-oss activation."""
    random = torch.Generator("cuda").manual_seed(hidden + intermediate)
    halves = activation.halves
    gate_up = torch.randn(num_experts, halves, intermediate, hidden, generator=random, device="cuda") / hidden**0.5
    gate_up[:, -1] *= 1.7
    w2 = torch.randn(num_experts, hidden, intermediate, generator=random, device="cuda") / intermediate**0.5
    scale = gate_up.abs().amax((2, 3)) / (6 * 448) if format is hb.NVFP4 else None
    if scale is not None and halves == 1:
        scale = scale[:, 0]
    bias = {}
    if activation is GPT_OSS_SWIGLU:
        bias = {
            "w13_bias": torch.randn(num_experts, halves * intermediate, generator=random, device="cuda"),
            "w2_bias": torch.randn(num_experts, hidden, generator=random, device="cuda"),
        }
    return ExpertWeights(hb.quantize(gate_up.flatten(1, 2), format, scale), hb.quantize(w2, format), activation, **bias)


def make_tokens(num_tokens: int, hidden: int, num_experts: int, top_k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(num_tokens, hidden, generator=random, device="cuda").bfloat16()
    ids = torch.rand(num_tokens, num_experts, generator=random, device="cuda").argsort(dim=1)[:, :top_k].int()
    return x, ids, torch.rand(num_tokens, top_k, generator=random, device="cuda") + 0.1


def natural(x: torch.Tensor, order: tuple[int, ...], columns: int) -> torch.Tensor:
    """Columns in fragment order to columns in natural order, fp32, without padding."""
    position_of_column = torch.tensor(order).argsort().tolist()
    return x.float().unflatten(1, (-1, 64))[:, :, position_of_column].flatten(1)[:, :columns]


def rows_at_the_edges(sizes: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """ids [T, 1]: for every size of a tile an expert with as many rows, one with one fewer and one with one more."""
    rows = torch.tensor([sum(size) + more for size in sizes for more in (-1, 0, 1)], device="cuda")
    return torch.arange(len(rows), dtype=torch.int32, device="cuda").repeat_interleave(rows).unsqueeze(1)


def check_graph(w: ExpertWeights, num_tokens: int, activations: str = "bf16", seen: ExpertWeights | None = None, **limits: float) -> None:
    """A captured graph follows the tokens and routing it finds, with the same bits every time. `seen`: the weights as the kernels round them."""
    prepared = hb.prepare(w, activations=activations)
    x, ids, weights = make_tokens(num_tokens, 512, 32, 4)
    hb.fused_moe(x, prepared, ids, weights, activations=activations)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = hb.fused_moe(x, prepared, ids, weights, activations=activations)
    for seed in range(3):
        new = make_tokens(num_tokens, 512, 32, 4, seed=seed)
        if seed == 2:
            new[1].fill_(5)
        for old, fresh in zip((x, ids, weights), new, strict=True):
            old.copy_(fresh)
        out.fill_(torch.nan)
        graph.replay()
        assert_close_rel(out, reference(x, seen or w, ids, weights, activations=activations), **limits)
        first = out.clone()
        for _ in range(350):
            out.fill_(torch.nan)
            graph.replay()
            assert_equal_bits(out, first)
