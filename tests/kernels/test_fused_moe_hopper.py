"""The Hopper layer against the reference, on a GPU: every kernel x format x activation x tail, odd routings, graphs, repeats."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import hopper
from helpers import assert_close_rel, assert_equal_bits

import halfbyte as hb
from halfbyte.errors import UnsupportedError
from halfbyte.experts import DEEPSEEK_V4_SWIGLU, GEGLU, GEGLU_TANH, GPT_OSS_SWIGLU, RELU2, SWIGLU, Activation, ExpertWeights
from halfbyte.kernels.reference.fused_moe import fused_moe as reference

pytestmark = hopper
ACTIVATIONS = {"swiglu": SWIGLU, "gpt-oss": GPT_OSS_SWIGLU, "deepseek-v4": DEEPSEEK_V4_SWIGLU, "geglu": GEGLU, "tanh": GEGLU_TANH, "relu2": RELU2}


def configs() -> dict[str, object]:
    from halfbyte.kernels.gluon_sm90.fused_moe import HUGE, LARGE, MEDIUM, SMALL, TINY, DecodeConfig

    return {
        "direct": DecodeConfig(direct=True),
        "decode": DecodeConfig(direct=False),
        "tiny": TINY,
        "small": SMALL,
        "medium": MEDIUM,
        "large": LARGE,
        "huge": HUGE,
    }


def make_experts(num_experts: int, hidden: int, intermediate: int, format: hb.BlockFormat, activation: Activation = SWIGLU) -> ExpertWeights:
    """Random experts on the GPU; gate and up have different global scales, biases with the gpt-oss activation."""
    random = torch.Generator("cuda").manual_seed(hidden + intermediate)
    halves = 2 if activation.gated else 1
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
    """Columns in slot order to columns in natural order, fp32, without padding."""
    slot_of_column = torch.tensor(order).argsort().tolist()
    return x.float().unflatten(1, (-1, 64))[:, :, slot_of_column].flatten(1)[:, :columns]


def check(w: ExpertWeights, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, config: object = None, offset: int = 0) -> torch.Tensor:
    """Compare with the reference; the output starts as NaN."""
    from halfbyte.kernels.gluon_sm90.fused_moe import fused_moe

    out = torch.full_like(x, torch.nan)
    prepared = hb.prepare(w)
    assert prepared.layout == "hopper"
    fused_moe(x, prepared.experts, ids, weights, out=out, config=config, expert_offset=offset)
    assert_close_rel(out, reference(x, w, ids, weights, expert_offset=offset))
    return out


@pytest.mark.parametrize("name", ["decode", "tiny", "small", "medium", "large", "huge"])
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
@pytest.mark.parametrize(("hidden", "intermediate"), [(256, 128), (2880, 96), (768, 1408), (320, 2688), (1536, 736)])
def test_every_kernel_on_every_tail(name: str, format: hb.BlockFormat, hidden: int, intermediate: int) -> None:
    w = make_experts(5, hidden, intermediate, format)
    check(w, *make_tokens(201, hidden, 5, 3), config=configs()[name])


@pytest.mark.parametrize("name", ["direct", "decode", "large"])
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(name: str, format: hb.BlockFormat, activation: str) -> None:
    w = make_experts(6, 320, 320, format, ACTIVATIONS[activation])
    for num_tokens in (1, 7) if name == "direct" else (90,):
        check(w, *make_tokens(num_tokens, 320, 6, 2), config=configs()[name])


@pytest.mark.parametrize("activation", ["swiglu", "gpt-oss"])  # without and with biases
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
@pytest.mark.parametrize("intermediate", [2880, 3072, 3392])  # a tail, four equal parts, unequal ones with a tail
def test_direct_kernel_with_the_columns_of_w2_in_parts(intermediate: int, format: hb.BlockFormat, activation: str) -> None:
    from halfbyte.kernels.gluon_sm90.fused_moe import MIN_COLUMNS_OF_PARTS

    assert intermediate >= MIN_COLUMNS_OF_PARTS
    w = make_experts(4, 320, intermediate, format, ACTIVATIONS[activation])
    for num_tokens in (1, 8):
        x, ids, weights = make_tokens(num_tokens, 320, 4, 2)
        ids[0] = ids[0, 0]  # the same expert twice
        check(w, x, ids, weights, config=configs()["direct"])


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 16, 33, 64, 127, 128, 129, 500, 2000])
@pytest.mark.parametrize("num_experts", [1, 7, 60])
def test_chosen_kernels_at_every_size(num_tokens: int, num_experts: int) -> None:
    w = make_experts(num_experts, 512, 256, hb.NVFP4)
    check(w, *make_tokens(num_tokens, 512, num_experts, min(4, num_experts)))


def rows_at_the_edges(sizes: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """ids [T, 1]: for every size of a tile an expert with as many rows, one with one fewer and one with one more."""
    rows = torch.tensor([sum(size) + more for size in sizes for more in (-1, 0, 1)], device="cuda")
    return torch.arange(len(rows), dtype=torch.int32, device="cuda").repeat_interleave(rows).unsqueeze(1)


@pytest.mark.parametrize("name", ["tiny", "small", "medium", "large", "huge"])
def test_every_size_of_tile(name: str) -> None:
    config = configs()[name]
    ids = rows_at_the_edges(config.sizes)
    x, _, weights = make_tokens(len(ids), 256, 1, 1)
    check(make_experts(3 * len(config.sizes), 256, 128, hb.NVFP4), x, ids, weights, config)


@pytest.mark.parametrize("name", ["direct", "decode", "small", "large"])
def test_odd_routings(name: str) -> None:
    w = make_experts(9, 256, 128, hb.NVFP4)
    config = None if name == "direct" else configs()[name]
    num_tokens = 6 if name == "direct" else 150
    x, ids, weights = make_tokens(num_tokens, 256, 9, 4)
    check(w, x, torch.full_like(ids, 8), weights, config)  # everything to one expert, four times over
    check(w, x, torch.full_like(ids, -1), weights, config)  # nothing is held here: zeros
    some = ids.clone()
    some[::2, 1], some[1] = -1, 77
    check(w, x, some.long(), weights.bfloat16(), config)
    check(w, x, ids + 100, weights, config, offset=100)
    parts = [
        replace(w, **{n: replace(q, codes=q.codes[s], scales=q.scales[s], global_scale=q.global_scale[s]) for n, q in (("w13", w.w13), ("w2", w.w2))})
        for s in (slice(0, 4), slice(4, 9))
    ]
    first, second = (
        check(replace(part, num_global_experts=None), x, ids, weights, config, offset) for part, offset in zip(parts, (0, 4), strict=True)
    )
    assert_close_rel(first.float() + second.float(), reference(x, w, ids, weights))


@pytest.mark.parametrize("activations", ["bf16", "fp8"])
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
def test_batch_invariant_results_do_not_depend_on_other_tokens(format: hb.BlockFormat, activations: str) -> None:
    prepared = hb.prepare(make_experts(12, 768, 352, format, GPT_OSS_SWIGLU))
    x, ids, weights = make_tokens(2000, 768, 12, 3)
    options = {"activations": activations, "batch_invariant": True}
    together = hb.fused_moe(x, prepared, ids, weights, **options)
    for part in (slice(0, 1), slice(1, 4), slice(40, 80), slice(100, 500), slice(700, 1900)):
        assert_equal_bits(hb.fused_moe(x[part], prepared, ids[part], weights[part], **options), together[part])
    alone = hb.fused_moe(x[:1], prepared, ids[:1], weights[:1], activations=activations)
    assert_close_rel(alone, together[:1].float(), token=5e-2, overall=5e-2)


def test_no_tokens() -> None:
    w = make_experts(4, 128, 64, hb.NVFP4)
    x, ids, weights = make_tokens(0, 128, 4, 2)
    assert hb.fused_moe(x, hb.prepare(w), ids, weights).shape == (0, 128)


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


@pytest.mark.parametrize("num_tokens", [1, 8, 32, 400, 3000])
def test_a_graph_follows_its_routing_and_repeats_bit_for_bit(num_tokens: int) -> None:
    check_graph(make_experts(32, 512, 256, hb.NVFP4), num_tokens)


def test_other_dtypes_and_gradients_are_refused() -> None:
    prepared = hb.prepare(make_experts(4, 128, 64, hb.NVFP4))
    x, ids, weights = make_tokens(3, 128, 4, 2)
    with pytest.raises(UnsupportedError, match="bf16"):
        hb.fused_moe(x.half(), prepared, ids, weights)
    with pytest.raises(UnsupportedError, match="no backward pass"):
        hb.fused_moe(x.requires_grad_(), prepared, ids, weights)
