"""`Activation` kinds; orders and scales of engine tensors; `ExpertMap`: slices, placements, copies, every slot somebody's once."""

from __future__ import annotations

import copy
import pickle
import random
from dataclasses import replace

import pytest
import torch
from random_experts import make_experts

import halfbyte as hb
from halfbyte.errors import InputError
from halfbyte.experts import Activation, ExpertMap


@pytest.mark.parametrize("kind", ["silu", "tanh", "gelu", "SwiGLU", "", None])
def test_an_activation_of_a_kind_that_there_is(kind: str) -> None:
    with pytest.raises(InputError, match=r"unknown activation .*needed 'swiglu' or 'geglu' or 'geglu_tanh' or 'relu2'"):
        Activation(kind)
    assert [Activation(known).gated for known in ("swiglu", "geglu", "geglu_tanh", "relu2")] == [True, True, True, False]


@pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4])
@pytest.mark.parametrize("layout", ["canonical", "hopper", "hopper_fp8", "trtllm_gen", "cutlass"])
def test_experts_print_compare_and_travel(format: hb.BlockFormat, layout: str) -> None:
    w = make_experts(4, 64, 32, format)
    for value, other in ((w, w[1:]), (hb.prepare(w, layout), hb.prepare(w[1:], layout))):
        assert len(repr(value).splitlines()) <= 10
        assert value != other and value != "w"
        for copied in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
            assert copied == value and copied.format is format
        with pytest.raises(TypeError, match="unhashable"):
            hash(value)
    changed = replace(w, w2=replace(w.w2, codes=w.w2.codes ^ 1))
    assert changed != w and hb.prepare(changed, layout) != hb.prepare(w, layout)


@pytest.mark.parametrize("layout", ["canonical", "hopper", "hopper_fp8", "trtllm_gen", "cutlass"])
def test_parameters_are_quantised_and_prepared(layout: str) -> None:
    def parameter(*shape: int) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))))

    scale = parameter(2, 32).abs().amax(dim=1)
    for made in (
        *(hb.quantize(parameter(2, 64, 32), format) for format in (hb.NVFP4, hb.MXFP4)),
        *(hb.quantize_fp8(parameter(2, 128), scaling) for scaling in ("token", "block", "mx")),
        hb.silu_mul_quantize(parameter(2, 64), hb.NVFP4, 1.0),
        hb.rms_norm_quantize(parameter(2, 32), parameter(32), hb.NVFP4, 1.0),
        hb.quantize_experts(parameter(2, 32), torch.tensor([0, 1, 2], dtype=torch.int32), scale.detach()),
    ):
        tensors = made if isinstance(made, tuple) else (made.codes, made.scales, getattr(made, "global_scale", None))
        assert not any(tensor.requires_grad for tensor in tensors if tensor is not None)
    w = hb.ExpertWeights(hb.quantize(parameter(2, 64, 32), hb.MXFP4), hb.quantize(parameter(2, 32, 32), hb.MXFP4), w2_bias=parameter(2, 32))
    prepared = hb.prepare(w, layout)
    assert copy.deepcopy(prepared) == prepared == pickle.loads(pickle.dumps(prepared))
    prepared.update_(w)
    assert torch.equal(prepared.unprepare().w2_bias, w.w2_bias)


def test_strings_name_formats_and_activations() -> None:
    x = torch.randn(2, 32)
    assert hb.quantize(x, "nvfp4") == hb.quantize(x, hb.NVFP4) != hb.quantize(x, "mxfp4")
    assert hb.ExpertWeights(torch.randn(2, 32, 32), torch.randn(2, 32, 32), "relu2").activation == Activation("relu2")
    with pytest.raises(InputError, match=r"quantize: unknown format \(given 'fp4'; needed 'nvfp4' or 'mxfp4'\)"):
        hb.quantize(x, "fp4")


@pytest.mark.parametrize("index", [0, [0, 1], torch.tensor([0])])
def test_experts_are_taken_in_slices(index: object) -> None:
    with pytest.raises(InputError, match="needed a slice"):
        make_experts(4, 64, 32, hb.NVFP4)[index]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none_are_refused_when_asked(value: float) -> None:
    x = torch.ones(2, 32)
    hb.quantize(x, hb.NVFP4, check=True)
    x[1, 3] = value
    with pytest.raises(InputError, match=r"x has NaN or infinity \(given 1 of 64 elements"):
        hb.quantize(x, hb.NVFP4, check=True)


def test_a_slice_of_a_slice_knows_its_place_in_the_layer() -> None:
    w = make_experts(6, 64, 32, hb.NVFP4)
    inner = w[1:5][2:4]
    assert (inner.first_expert, inner.num_experts, inner.num_global_experts) == (3, 2, 6)
    assert inner == w[3:5] and inner.w2.codes.data_ptr() == w.w2.codes[3].data_ptr()


def test_a_slice_counts_from_its_first_expert() -> None:
    assert ExpertMap(4).is_slice and ExpertMap(4).local(torch.tensor([[3, 4, 6, -1]])).tolist() == [[-1, 0, 2, -5]]


@pytest.mark.parametrize("seed", range(20))
def test_every_slot_is_run_by_exactly_one_copy_in_turn(seed: int) -> None:
    rng = random.Random(seed)
    num_global, num_ranks = rng.randrange(1, 40), rng.randrange(1, 6)
    held = [[rank for rank in range(num_ranks) if rng.random() < 0.4] or [rng.randrange(num_ranks)] for _ in range(num_global)]
    ranks = [[expert for expert in range(num_global) for other in held[expert] if other == rank] for rank in range(num_ranks)]
    for experts in ranks:
        rng.shuffle(experts)
    num_tokens = rng.randrange(0, 50)
    ids = torch.tensor([[rng.randrange(-1, num_global + 1) for _ in range(3)] for _ in range(num_tokens)], dtype=torch.int32).view(-1, 3)
    served: dict[tuple[int, int], list[int]] = {}
    for rank in range(num_ranks):
        local = ExpertMap.placed(ranks, rank, num_global).local(ids)
        assert local.shape == ids.shape
        for t, j in (local >= 0).nonzero().tolist():
            assert ranks[rank][local[t, j]] == ids[t, j]
            served.setdefault((t, j), []).append(rank)
    for t in range(num_tokens):
        for j in range(3):
            expert = int(ids[t, j])
            is_expert = 0 <= expert < num_global
            assert served.get((t, j), []) == ([held[expert][t % len(held[expert])]] if is_expert else [])


def test_two_copies_on_one_rank_share_its_tokens() -> None:
    both = ExpertMap.placed([[7, 3, 3], [0, 1, 2, 4, 5, 6]], 0, 8)
    assert both.local(torch.full((4, 1), 3)).flatten().tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("ranks", "rank", "message"),
    [
        ([[0, 1], [2]], 2, "no such rank .*given 2; needed 0 .. 1"),
        ([[0, 3], [1, 2]], 0, "no such expert .*3 on rank 0; needed 0 .. 2"),
        ([[0], [1]], 0, r"experts that no rank holds .*given \[2\]"),
    ],
)
def test_bad_placements(ranks: list[list[int]], rank: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ExpertMap.placed(ranks, rank, 3)


class EngineParameter(torch.nn.Parameter):
    """Engines keep their tensors in Parameters of classes of their own."""


def engine_tensors(w: hb.ExpertWeights) -> dict[str, torch.Tensor]:
    return {name: EngineParameter(tensor.clone(), requires_grad=False) for name, tensor in w.tensors.items()}


FORMATS = pytest.mark.parametrize("format", [hb.NVFP4, hb.MXFP4], ids=repr)


@FORMATS
def test_engine_tensors_are_shared_and_plain(format: hb.BlockFormat) -> None:
    w = make_experts(4, 64, 32, format)
    tensors = engine_tensors(w)
    result = hb.ExpertWeights.from_engine_tensors(tensors, format, first_expert=4, num_global_experts=16)
    assert (result.first_expert, result.num_global_experts) == (4, 16) and result.tensors.keys() == w.tensors.keys()
    for name, tensor in result.tensors.items():
        assert (
            type(tensor) is torch.Tensor and tensor.data_ptr() == tensors[name].data_ptr() and torch.equal(tensor, w.tensors[name].view(tensor.dtype))
        )


@FORMATS
@pytest.mark.parametrize("order", ["up_gate", "interleaved"])
def test_rows_in_another_order_are_moved_where_they_lie(format: hb.BlockFormat, order: str) -> None:
    w = make_experts(3, 64, 32, format)
    tensors = engine_tensors(w)
    for name in ("w13.codes", "w13.scales", "w13_bias"):
        gate, up = tensors[name].data.view(torch.uint8 if tensors[name].element_size() == 1 else tensors[name].dtype).chunk(2, dim=1)
        moved = torch.cat((up, gate), 1) if order == "up_gate" else torch.stack((gate, up), 2).flatten(1, 2)
        tensors[name] = EngineParameter(moved.view(tensors[name].dtype), requires_grad=False)
    if format is hb.NVFP4 and order == "up_gate":
        tensors["w13.global_scale"] = tensors["w13.global_scale"].flip(1)
    assert not torch.equal(tensors["w13.codes"], w.w13.codes)
    result = hb.ExpertWeights.from_engine_tensors(tensors, format, w13_order=order)
    assert result.w13.codes.data_ptr() == tensors["w13.codes"].data_ptr()
    for name, tensor in w.tensors.items():
        assert torch.equal(result.tensors[name].view(tensor.dtype), tensor), name


def test_global_scales_of_engines() -> None:
    w = make_experts(4, 64, 32, hb.NVFP4)
    tensors = {**engine_tensors(w), "w2.global_scale": w.w2.global_scale.unsqueeze(1)}
    one = {**tensors, "w13.global_scale": w.w13.global_scale[:, 0].contiguous()}
    assert torch.equal(hb.ExpertWeights.from_engine_tensors(one, hb.NVFP4).w13.global_scale, w.w13.global_scale[:, :1].expand(4, 2))
    inverse = {name: 1 / tensor if name.endswith("global_scale") else tensor for name, tensor in tensors.items()}
    result = hb.ExpertWeights.from_engine_tensors(inverse, hb.NVFP4, inverse_global_scales=True)
    torch.testing.assert_close(result.w13.global_scale, w.w13.global_scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.w2.global_scale, w.w2.global_scale, rtol=1e-6, atol=0)


def test_missing_and_unknown_engine_tensors() -> None:
    tensors = engine_tensors(make_experts(4, 64, 32, hb.NVFP4))
    with pytest.raises(InputError, match=r"missing.*w2.scales"):
        hb.ExpertWeights.from_engine_tensors({**tensors, "w2.scales": None}, hb.NVFP4)
    with pytest.raises(InputError, match=r"unknown.*w13_weight"):
        hb.ExpertWeights.from_engine_tensors({**tensors, "w13_weight": torch.zeros(1)}, hb.NVFP4)
    with pytest.raises(InputError, match=r"unknown.*global_scale"):  # which MXFP4 has not
        hb.ExpertWeights.from_engine_tensors(tensors, hb.MXFP4)
