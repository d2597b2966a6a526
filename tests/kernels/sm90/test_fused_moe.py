"""The Hopper layer against the reference, on a GPU: every kernel x format x activation x tail, odd routings, graphs, repeats."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from devices import hopper
from helpers import assert_close_rel, assert_equal_bits
from hopper_layers import ACTIVATIONS, activation_of, check_graph, configs, in_turns, make_experts, make_tokens, rows_at_the_edges

import halfbyte as hb
from halfbyte.errors import UnsupportedError
from halfbyte.experts import GPT_OSS_SWIGLU, ExpertWeights
from halfbyte.kernels.reference.fused_moe import run as reference

pytestmark = hopper


def check(w: ExpertWeights, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, config: object = None, offset: int = 0) -> torch.Tensor:
    """Compare with the reference; the output starts as NaN."""
    from halfbyte.kernels.sm90.fused_moe import run as fused_moe

    out = torch.full_like(x, torch.nan)
    prepared = hb.prepare(w)
    assert prepared.layout == "hopper"
    fused_moe(x, prepared.storage, ids, weights, out=out, config=config, expert_offset=offset)
    assert_close_rel(out, reference(x, w, ids, weights, expert_offset=offset))
    return out


@pytest.mark.parametrize(
    ("name", "format", "hidden", "intermediate"),
    in_turns(["decode", "micro", "tiny", "small", "medium", "large", "huge"], [(256, 128), (2880, 96), (768, 1408), (320, 2688), (1536, 736)]),
    ids=str,
)
def test_every_kernel_on_every_tail(name: str, format: hb.BlockFormat, hidden: int, intermediate: int) -> None:
    w = make_experts(5, hidden, intermediate, format, activation_of(hidden))
    check(w, *make_tokens(201, hidden, 5, 3), config=configs()[name])


@pytest.mark.parametrize("name", ["direct", "decode", "large"])
@pytest.mark.parametrize(("activation", "format"), list(zip(ACTIVATIONS, [hb.NVFP4, hb.MXFP4] * 3, strict=True)), ids=str)
def test_every_activation(name: str, format: hb.BlockFormat, activation: str) -> None:
    w = make_experts(6, 320, 160, format, ACTIVATIONS[activation])
    for num_tokens in (1, 7) if name == "direct" else (90,):
        check(w, *make_tokens(num_tokens, 320, 6, 2), config=configs()[name])


@pytest.mark.parametrize("activation", ["swiglu", "gpt-oss"])  # without and with biases
@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
@pytest.mark.parametrize("intermediate", [2880, 3072, 3392])  # a tail, four equal parts, unequal ones with a tail
def test_direct_kernel_with_the_columns_of_w2_in_parts(intermediate: int, format: hb.BlockFormat, activation: str) -> None:
    from halfbyte.kernels.sm90.expert_rows import MIN_COLUMNS_OF_PARTS

    assert intermediate >= MIN_COLUMNS_OF_PARTS
    w = make_experts(4, 320, intermediate, format, ACTIVATIONS[activation])
    for num_tokens in (1, 8):
        x, ids, weights = make_tokens(num_tokens, 320, 4, 2)
        ids[0] = ids[0, 0]  # the same expert twice
        check(w, x, ids, weights, config=configs()["direct"])


@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)
@pytest.mark.parametrize(("hidden", "intermediate"), [(2880, 736), (320, 2688), (1536, 1408), (1088, 1152), (2048, 1024)])
def test_direct_kernel_with_the_columns_in_slices(hidden: int, intermediate: int, format: hb.BlockFormat) -> None:
    """One token: few programs, so one or two slices, equal and unequal, with and without a tail."""
    w = make_experts(8, hidden, intermediate, format, GPT_OSS_SWIGLU)
    for num_tokens, top_k in ((1, 1), (1, 4), (3, 2)):
        x, ids, weights = make_tokens(num_tokens, hidden, 8, top_k)
        out = hb.fused_moe(x, hb.prepare(w), ids, weights)
        assert_close_rel(out, reference(x, w, ids, weights))


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 16, 33, 64, 127, 128, 129, 500, 2000])
@pytest.mark.parametrize("num_experts", [1, 7, 60])
def test_chosen_kernels_at_every_size(num_tokens: int, num_experts: int) -> None:
    w = make_experts(num_experts, 512, 256, hb.NVFP4)
    check(w, *make_tokens(num_tokens, 512, num_experts, min(4, num_experts)))


@pytest.mark.parametrize("name", ["micro", "tiny", "small", "medium", "large", "huge"])
def test_every_size_of_tile(name: str) -> None:
    config = configs()[name]
    ids = rows_at_the_edges(config.sizes)
    x, _, weights = make_tokens(len(ids), 256, 1, 1)
    check(make_experts(3 * len(config.sizes), 256, 128, hb.NVFP4), x, ids, weights, config)


@pytest.mark.parametrize("name", ["direct", "decode", "micro", "small", "large"])
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
