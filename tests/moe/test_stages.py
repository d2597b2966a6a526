"""The stages of the layer, and hidden states that arrive quantised: against one token and one expert at a time in float64."""

from __future__ import annotations

from dataclasses import replace

import devices
import pytest
import torch
from helpers import assert_close_rel, assert_equal_bits

import halfbyte as hb
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.experts import ExpertMap, ExpertWeights
from halfbyte.formats.activation_formats import ActivationFormat, round_trip
from halfbyte.kernels.reference.activation import activate
from halfbyte.moe import combine, expert_rows, sort

TOKENS, EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 13, 7, 64, 96, 3
ARRIVALS = ("nvfp4", "nvfp4 by row", "mxfp4", "fp8", "mxfp8")


def make_layer(seed: int = 0) -> ExpertWeights:
    random = torch.Generator().manual_seed(seed)
    w13, w2 = (torch.randn(EXPERTS, *shape, generator=random) / 4 for shape in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)))
    return ExpertWeights(hb.quantize(w13, hb.NVFP4), hb.quantize(w2, hb.NVFP4))


def make_call(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=random).bfloat16()
    ids = torch.randint(-1, EXPERTS + 1, (TOKENS, TOP_K), generator=random, dtype=torch.int32)
    return hidden, ids, torch.rand(TOKENS, TOP_K, generator=random) + 0.1


def arrived(hidden: torch.Tensor, format: str) -> hb.QuantTensor | hb.Fp8Tensor:
    if format == "nvfp4 by row":
        return hb.quantize(hidden, hb.NVFP4, hidden.float().abs().amax(1) / (6 * 448))
    if format in ("fp8", "mxfp8"):
        return hb.quantize_fp8(hidden, "token" if format == "fp8" else "mx")
    return hb.quantize(hidden, hb.NVFP4 if format == "nvfp4" else hb.MXFP4)


def row_of(w: ExpertWeights, x: torch.Tensor, expert: int, activations: ActivationFormat = "bf16") -> torch.Tensor:
    """One token through one expert, float64; h rounded to bf16 and then to `activations`, as the layer does."""
    gate_up = w.w13.dequantize()[expert].double() @ x.double()
    h = round_trip(activate(gate_up, w.activation).bfloat16()[None], activations)[0]
    return w.w2.dequantize()[expert].double() @ h.double()


def naive(w: ExpertWeights, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, activations: ActivationFormat = "bf16") -> torch.Tensor:
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for t, j in ((ids >= 0) & (ids < w.num_experts)).nonzero().tolist():
        out[t] += weights[t, j].double() * row_of(w, hidden[t], int(ids[t, j]), activations)
    return out.float()


def test_the_stages_are_the_layer() -> None:
    w, (hidden, ids, weights) = make_layer(), make_call()
    prepared = hb.prepare(w)
    slots = sort(ids, prepared)
    rows = expert_rows(hidden, slots, prepared)
    assert rows.shape == (TOKENS * TOP_K, HIDDEN)
    place = slots.work.row_of_slot.view(TOKENS, TOP_K)
    assert ((place >= 0) == ((ids >= 0) & (ids < EXPERTS))).all() and len(place[place >= 0].unique()) == int((place >= 0).sum())
    for t, j in (place >= 0).nonzero().tolist():
        assert_close_rel(rows[place[t, j]].float()[None], row_of(w, hidden[t], int(ids[t, j])).float()[None])
    assert_equal_bits(combine(rows, slots, weights), hb.fused_moe(hidden, prepared, ids, weights))
    partial = combine(rows, slots, weights, out=torch.full((TOKENS, HIDDEN), torch.nan))
    assert_close_rel(partial, naive(w, hidden, ids, weights))


def test_no_tokens_and_nothing_held() -> None:
    prepared = hb.prepare(make_layer())
    hidden, ids, weights = make_call()
    for count, routing in ((0, ids[:0]), (TOKENS, torch.full_like(ids, -1))):
        slots = sort(routing, prepared)
        out = combine(expert_rows(hidden[:count], slots, prepared), slots, weights[:count])
        assert out.shape == (count, HIDDEN) and not out.any()
    for format in ARRIVALS:
        assert hb.fused_moe(arrived(hidden[:0], format), prepared, ids[:0], weights[:0]).shape == (0, HIDDEN)


@pytest.mark.parametrize("format", ARRIVALS)
@pytest.mark.parametrize("layout_of_weights", ["packed", "dense"])
def test_hidden_states_that_arrive_quantised_are_taken_as_they_are(format: str, layout_of_weights: str) -> None:
    w, (hidden, ids, weights) = make_layer(), make_call()
    prepared = hb.prepare(w if layout_of_weights == "packed" else w.dequantize())
    x = arrived(hidden, format)
    out = hb.fused_moe(x, prepared, ids, weights)
    assert out.dtype == torch.bfloat16
    expected = naive(w, x.dequantize(torch.float32), ids, weights)
    assert_close_rel(out, expected)
    with pytest.raises(AssertionError):  # and the values that it was made of are told apart
        assert_close_rel(hb.fused_moe(hidden, prepared, ids, weights), expected)
    slots = sort(ids, prepared)
    assert_equal_bits(combine(expert_rows(x, slots, prepared), slots, weights), out)
    invariant = hb.fused_moe(x, prepared, ids, weights, batch_invariant=True)
    assert_close_rel(invariant, expected)


@pytest.mark.parametrize("activations", ["fp8", "mxfp8", "nvfp4"])
def test_hidden_states_that_arrive_quantised_are_not_rounded_again(activations: ActivationFormat) -> None:
    """`activations` says what becomes of h alone."""
    w, (hidden, ids, weights) = make_layer(), make_call()
    prepared = hb.prepare(w)
    for format in ARRIVALS:
        x = arrived(hidden, format)
        expected = naive(w, x.dequantize(torch.float32), ids, weights, activations)
        assert_close_rel(hb.fused_moe(x, prepared, ids, weights, activations=activations), expected)


def test_quantised_before_or_inside_the_layer_is_the_same_first_product() -> None:
    """With one scale per token the layer rounds hidden states as `quantize_fp8` does."""
    prepared, (hidden, ids, weights) = hb.prepare(make_layer()), make_call()
    before = hb.fused_moe(hb.quantize_fp8(hidden), prepared, ids, weights, activations="fp8")
    assert_equal_bits(before, hb.fused_moe(hidden, prepared, ids, weights, activations="fp8"))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_with_any_placement_and_copies_add_up_to_the_layer(num_ranks: int) -> None:
    w, (hidden, ids, weights) = make_layer(), make_call()
    ranks = [list(range(rank, EXPERTS, num_ranks)) for rank in range(num_ranks)]
    ranks[-1] += [0, 0]  # a busy expert has two more copies
    total = torch.zeros(TOKENS, HIDDEN)
    for rank, held in enumerate(ranks):
        index = torch.tensor(held)
        parts = {
            name: tensor.view(torch.uint8)[index].view(tensor.dtype) if tensor.itemsize == 1 else tensor[index] for name, tensor in w.tensors.items()
        }
        prepared = hb.prepare(replace(w.with_tensors(parts), num_global_experts=EXPERTS))
        placed = ExpertMap.placed(ranks, rank, EXPERTS)
        total += hb.fused_moe(hidden, prepared, ids, weights, expert_map=placed, out=torch.full((TOKENS, HIDDEN), torch.nan))
        slots = sort(ids, prepared, expert_map=placed)
        assert_close_rel(
            combine(expert_rows(hidden, slots, prepared), slots, weights, out=torch.empty(TOKENS, HIDDEN)).float(),
            hb.fused_moe(hidden, prepared, ids, weights, expert_map=placed, out=torch.empty(TOKENS, HIDDEN)),
        )
    assert_close_rel(total, naive(w, hidden, ids, weights))


def test_a_placed_map_is_traced() -> None:
    w, (hidden, ids, weights) = make_layer(), make_call()
    prepared, placed = hb.prepare(w), ExpertMap.placed([list(reversed(range(EXPERTS)))], 0, EXPERTS)
    compiled = torch.compile(lambda *call: hb.fused_moe(call[0], prepared, *call[1:], expert_map=placed), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_equal_bits(compiled(hidden, ids, weights), hb.fused_moe(hidden, prepared, ids, weights, expert_map=placed))
        assert not torch.equal(compiled(hidden, ids, weights), hb.fused_moe(hidden, prepared, ids, weights))


def test_what_does_not_fit_is_one_error() -> None:
    prepared, (hidden, ids, weights) = hb.prepare(make_layer()), make_call()
    with pytest.raises(InputError, match="scales of hidden are in tiles"):
        hb.fused_moe(hb.quantize(hidden, hb.NVFP4, scale_layout="128x4"), prepared, ids, weights)
    with pytest.raises(InputError, match="scale per block of 128"):
        hb.fused_moe(hb.quantize_fp8(torch.zeros(TOKENS, 128), "block"), prepared, ids, weights)
    with pytest.raises(InputError, match=r"hidden does not fit .*QuantTensor of \(13, 16\) codes"):
        hb.fused_moe(hb.quantize(hidden[:, :32], hb.NVFP4), prepared, ids, weights)
    with pytest.raises(InputError, match="two ways to say"):
        hb.fused_moe(hidden, prepared, ids, weights, expert_offset=0, expert_map=ExpertMap())
    with pytest.raises(InputError, match="not prepared"):
        sort(ids, make_layer())
    with pytest.raises(InputError, match="unknown activation format"):
        sort(ids, prepared, activations="int8")
    compiled = torch.compile(lambda x: hb.fused_moe(x, prepared, ids, weights, config="a tile"), backend="eager")
    with torch.no_grad(), pytest.raises(UnsupportedError, match=r"not traced by torch\.compile"):
        compiled(hidden)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=devices.hopper)])
def test_stages_take_any_strides_and_no_token(device: str) -> None:
    prepared, (hidden, ids, weights) = hb.prepare(make_layer(), device=device), (tensor.to(device) for tensor in make_call())
    hidden, weights = hidden.bfloat16(), weights.float()
    expected = combine(expert_rows(hidden, slots := sort(ids, prepared), prepared), slots, weights)
    every_other, odd = hidden.repeat_interleave(2, dim=0)[::2], torch.nn.functional.pad(hidden, (1, 2))[:, 1:-2]
    for view in (every_other, odd):
        rows = expert_rows(view, sort(ids.T.contiguous().T, prepared), prepared).repeat_interleave(2, dim=0)[::2]
        assert_equal_bits(combine(rows, slots, weights.T.contiguous().T), expected)
    one = sort(ids[:1], prepared)
    assert_equal_bits(*(combine(expert_rows(x, one, prepared), one, weights[:1]) for x in (odd[:1], hidden[:1])))
    none = sort(ids[:0], prepared)
    assert combine(expert_rows(hidden[:0], none, prepared), none, weights[:0]).shape == (0, HIDDEN)


def test_stages_that_do_not_fit_one_another_are_one_error() -> None:
    prepared, (hidden, ids, weights) = hb.prepare(make_layer()), make_call()
    slots = sort(ids, prepared)
    rows = expert_rows(hidden, slots, prepared)
    for topk_ids in (ids.float(), ids[0]):
        with pytest.raises(InputError, match=r"^sort: topk_ids does not fit"):
            sort(topk_ids, prepared)
    for other in (hidden[1:], hb.quantize(hidden[1:], hb.NVFP4)):
        with pytest.raises(InputError, match=r"hidden does not fit .*needed .*\[13, "):
            expert_rows(other, slots, prepared)
    with pytest.raises(InputError, match=r"^combine: rows does not fit"):
        combine(rows[1:], slots, weights)
    with pytest.raises(InputError, match=r"^combine: topk_weights does not fit"):
        combine(rows, slots, weights[:, :1])
    with pytest.raises(InputError, match=r"^combine: out does not fit"):
        combine(rows, slots, weights, out=torch.empty(TOKENS, 3))
    with pytest.raises(InputError, match=r"^combine: out is not contiguous"):
        combine(rows, slots, weights, out=torch.empty(rows.shape[1], TOKENS).T)
