"""`ExpertParallel` on gloo: any split of the experts and any numbers of tokens against the whole layer on one rank."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close_rel, assert_equal_bits
from ranks import run_ranks

import halfbyte as hb
from halfbyte.distributed import tell_others
from halfbyte.distributed.costs import Costs, Line
from halfbyte.distributed.failures import PeerError
from halfbyte.distributed.placement import balanced, contiguous, round_robin
from halfbyte.errors import InputError, UnsupportedError
from halfbyte.experts import ExpertWeights
from halfbyte.moe.parallel import ExpertParallel

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 7, 64, 32, 3
TOKENS = {2: ([5, 5], [9, 2], [0, 6], [0, 0]), 3: ([4, 4, 4], [0, 11, 1]), 4: ([2, 0, 7, 1],)}


def make_layer(scaled: bool = False) -> ExpertWeights:
    random = torch.Generator().manual_seed(0)
    w13, w2 = (torch.randn(EXPERTS, *shape, generator=random) / 4 for shape in ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)))
    scales = (torch.rand(EXPERTS, 2, generator=random) / 500, torch.rand(EXPERTS, generator=random) / 500) if scaled else (None, None)
    return ExpertWeights(hb.quantize(w13, hb.NVFP4), hb.quantize(w2, hb.NVFP4), w13_input_scale=scales[0], w2_input_scale=scales[1])


def held_by(w: ExpertWeights, held: list[int]) -> hb.PreparedExperts:
    """The experts of one rank; input scales are of the whole layer on every rank."""
    index = torch.tensor(held)
    parts = {
        name: tensor
        if name.endswith("input_scale")
        else tensor.view(torch.uint8)[index].view(tensor.dtype)
        if tensor.itemsize == 1
        else tensor[index]
        for name, tensor in w.tensors.items()
    }
    return hb.prepare(replace(w.with_tensors(parts), first_expert=held[0], num_global_experts=EXPERTS))


def make_tokens(sizes: list[int], dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of every rank, the same on all; some slots name no expert."""
    random = torch.Generator().manual_seed(sum(sizes) + len(sizes))
    return [
        (
            torch.randn(rows, HIDDEN, generator=random).to(dtype),
            torch.rand(rows, EXPERTS, generator=random).argsort(dim=1)[:, :TOP_K].int() - (torch.rand(rows, 1, generator=random) < 0.1).int(),
            torch.rand(rows, TOP_K, generator=random) + 0.1,
        )
        for rows in sizes
    ]


def placements(world: int) -> dict[str, list[list[int]] | None]:
    uneven = [[0], *contiguous(EXPERTS - 1, world - 1)]
    return {
        "contiguous": None,  # 7 experts divide among no number of ranks here
        "uneven": [uneven[0], *[[expert + 1 for expert in held] for held in uneven[1:]]],
        "round-robin": round_robin(EXPERTS, world),
        "redundant": balanced([50, 1, 9, 9, 30, 2, 1], world, {2: 3, 3: 2, 4: 1}[world]),
    }


def check_splits(rank: int, world: int) -> None:
    w = make_layer()
    whole = hb.prepare(w)
    for name, placement in placements(world).items():
        ep = ExpertParallel(None, EXPERTS, placement=placement)
        experts = held_by(w, ep.local_experts)
        for sizes in TOKENS[world]:
            tokens = make_tokens(sizes)
            hidden, ids, weights = tokens[rank]
            expected = hb.fused_moe(hidden, whole, ids, weights)
            out = torch.full_like(hidden, torch.nan)
            for given in (None, sizes):
                result = ep.forward(hidden, experts, ids, weights, sizes=given, out=out)
                assert result is out
                assert_close_rel(result, expected, token=1e-5, overall=1e-5)
            sent = ep.dispatch(hidden, ids, weights)
            assert sent.sizes == tuple(sizes) and sent.payload == "bf16", name
            assert_equal_bits(sent.hidden, torch.cat([h for h, _, _ in tokens]))
            assert_equal_bits(sent.topk_ids, torch.cat([i for _, i, _ in tokens]))
            partial = hb.fused_moe(sent.hidden, experts, sent.topk_ids, sent.topk_weights, expert_map=ep.expert_map)
            assert_equal_bits(ep.combine(partial, sent), result)
            without = ep.combine(torch.zeros_like(partial) if rank == world - 1 else partial, sent)  # one rank's part left out is seen by the rule
            if sizes[rank] > 2:
                with pytest.raises(AssertionError):
                    assert_close_rel(without, expected, token=1e-5, overall=1e-5)


def check_payloads(rank: int, world: int) -> None:
    for scaled in (False, True):
        w = make_layer(scaled)
        sizes = TOKENS[world][-1] if world > 2 else [3, 8]
        tokens = make_tokens(sizes, torch.bfloat16)
        hidden, ids, weights = tokens[rank]
        everything = torch.cat([h for h, _, _ in tokens])
        for payload, activations in (("fp4", "bf16"), ("fp4", "nvfp4"), ("fp8", "fp8"), ("fp8", "mxfp8"), ("fp8", "bf16")):
            ep = ExpertParallel(None, EXPERTS, payload=payload)
            experts = held_by(w, ep.local_experts)
            scale = ep.global_scale(experts)
            assert (scale is not None) == (scaled and payload == "fp4")
            sent = ep.dispatch(hidden, ids, weights, activations=activations, global_scale=scale)
            if payload == "fp8":
                after = hb.quantize_fp8(everything, "mx" if activations == "mxfp8" else "token")
            else:
                row_scale = everything.float().abs().amax(dim=1) / (6 * 448)
                after = hb.quantize(everything, hb.NVFP4, w.w13_input_scale.max() if scaled else row_scale)
                assert_equal_bits(sent.hidden.global_scale.reshape(-1), after.global_scale.reshape(-1))
            assert_equal_bits(sent.hidden.codes, after.codes)
            assert_equal_bits(sent.hidden.scales, after.scales)
            result = ep.forward(hidden, experts, ids, weights, activations=activations)
            assert result.dtype == torch.bfloat16
            mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            whole = hb.fused_moe(
                after, hb.prepare(w), torch.cat([i for _, i, _ in tokens]), torch.cat([g for _, _, g in tokens]), activations=activations
            )
            assert_close_rel(result, whole[mine])
            fp8 = ExpertParallel(None, EXPERTS, payload=payload, combine_dtype="fp8").forward(hidden, experts, ids, weights, activations=activations)
            assert_close_rel(fp8, whole[mine], token=6.25e-2, overall=4e-2)  # e4m3: half a step is 1 / 16
            assert sizes[rank] == 0 or not torch.equal(fp8, result)
        check_auto(rank, w, sizes)


def check_auto(rank: int, w: ExpertWeights, sizes: list[int]) -> None:
    """It travels quantised only where the layer would round so anyway, and gives the same bits."""
    free = replace(Costs(), encode={"gloo": Line(0.0, 1e9)})
    auto, plain = ExpertParallel(None, EXPERTS, costs=free), ExpertParallel(None, EXPERTS, payload="bf16")
    experts = held_by(w, plain.local_experts)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        hidden, *routing = make_tokens(sizes, dtype)[rank]
        for activations, payload in (("nvfp4", "fp4"), ("fp8", "fp8"), ("mxfp8", "fp8"), ("bf16", "bf16")):
            sent = auto.dispatch(hidden, *routing, activations=activations)
            assert sent.payload == (payload if dtype == torch.bfloat16 else "bf16")
            assert_equal_bits(*(ep.forward(hidden, experts, *routing, activations=activations) for ep in (auto, plain)))


def check_sums_in_fp8(rank: int, world: int) -> None:
    """Other ranks' rows are what `quantize_fp8` makes of them, bit by bit; a rank's own are not rounded."""
    ep = ExpertParallel(None, EXPERTS, combine_dtype="fp8")
    for sizes in TOKENS[world]:
        sent = ep.dispatch(*make_tokens(sizes, torch.bfloat16)[rank])
        random = torch.Generator().manual_seed(sum(sizes))
        partials = [torch.randn(sum(sizes), HIDDEN, generator=random).bfloat16() for _ in range(world)]
        expected = torch.zeros(sizes[rank], HIDDEN)
        for other, partial in enumerate(partials):
            own = partial[sum(sizes[:rank]) : sum(sizes[: rank + 1])]
            expected += own.float() if other == rank else hb.quantize_fp8(own).dequantize()
        assert_equal_bits(ep.combine(partials[rank], sent), expected.bfloat16())


def check_capacity(rank: int, world: int) -> None:
    """Rows beyond num_tokens hold no token: whatever is in them, the others are as without them."""
    w, rows = make_layer(), 6
    ep = ExpertParallel(None, EXPERTS, payload="bf16")
    experts = held_by(w, ep.local_experts)
    hidden, ids, weights = make_tokens([rows] * world)[rank]
    for count in ((rank + 2) % rows, 0, rows):
        full = ep.forward(hidden, experts, ids, weights, sizes=[rows] * world, num_tokens=torch.tensor([count], dtype=torch.int32))
        exact = ep.forward(hidden[:count], experts, ids[:count], weights[:count])
        assert_equal_bits(full[:count], exact)
        assert not full[count:].any()


def check_arrivals(rank: int, world: int) -> None:
    """Hidden states that a fused norm has quantised travel as they are."""
    w = make_layer()
    hidden, ids, weights = make_tokens([4] * world, torch.bfloat16)[rank]
    ep = ExpertParallel(None, EXPERTS)
    experts = held_by(w, ep.local_experts)
    own, of_pairs, of_rows = 0.001 * (rank + 1), torch.tensor([0.001, 0.01]), torch.linspace(0.001, 0.01, 4)
    scales = (0.001, own, torch.tensor([own]), of_pairs, of_rows)  # also such that only this rank quantises by
    for x in (*(hb.quantize(hidden, hb.NVFP4, scale) for scale in scales), hb.quantize_fp8(hidden), hb.quantize_fp8(hidden, "mx")):
        assert_close_rel(ep.forward(x, experts, ids, weights), hb.fused_moe(x, hb.prepare(w), ids, weights))
    with pytest.raises(InputError, match="does not travel"):
        ep.dispatch(hb.quantize(hidden, hb.MXFP4), ids, weights)


def check_errors(rank: int, world: int) -> None:
    hidden, ids, weights = make_tokens([2] * world)[rank]
    ep = ExpertParallel(None, EXPERTS)
    with pytest.raises(InputError, match="disagree about the sizes"):
        ep.dispatch(hidden, ids, weights, sizes=[2] * (world - 1) + [3 if rank == 0 else 2])
    with pytest.raises(InputError, match="rank 1 has 1 rows, not 2"):
        ep.dispatch(*(t[: 2 - (rank == 1)] for t in (hidden, ids, weights)), sizes=[2] * world)
    with pytest.raises(InputError, match=r"different global scales.*rank 0: 1; rank 1: 2"):
        ExpertParallel(None, EXPERTS, payload="fp4").dispatch(hidden, ids, weights, global_scale=torch.tensor(float(rank + 1)))
    with pytest.raises(InputError, match="disagree about the bytes per row"):
        ep.dispatch(hidden.bfloat16() if rank else hidden, ids, weights, sizes=[2] * world)
    for options, message in (
        ({"payload": "fp6"}, "unknown payload"), ({"combine_dtype": "fp4"}, "combine_dtype"), ({"transport": "nccl"}, "unknown transport"),
        ({"placement": [[0]]}, "placement does not fit"), ({"placement": [[0]] * world}, "no rank holds"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            ExpertParallel(None, EXPERTS, **options)
    for options in ({"num_experts": 0}, {"num_experts": None}, {"placement": 3}, {"placement": [["a"]] * world}, {"costs": 3}, {"capacity": 3}):
        with pytest.raises(InputError, match=next(iter(options))):
            ExpertParallel(None, **{"num_experts": EXPERTS, **options})
    for options in (
        {"sizes": 3},
        {"sizes": [2.0] * world},
        {"num_tokens": 2},
        {"global_scale": 1.0},
        {"hidden": None},
        {"hidden": torch.tensor(1.0)},
    ):
        with pytest.raises(InputError, match=next(iter(options))):
            ep.dispatch(**{"hidden": hidden, "topk_ids": ids, "topk_weights": weights, **options})
    with pytest.raises(InputError, match="sent is no Dispatched"):
        ep.combine(hidden, None)
    with pytest.raises(InputError, match="not prepared"):
        ep.forward(hidden, None, ids, weights)
    for tokens, message in (
        ((hidden, ids[:1], weights), "topk_ids does not fit"), ((hidden, ids.float(), weights), "topk_ids"), ((hidden.int(), ids, weights), "hidden"),
        ((hidden, ids, weights[:, :1]), "topk_weights"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            ep.dispatch(*tokens)
    sent = ep.dispatch(hidden, ids, weights)
    with pytest.raises(InputError, match="partial does not fit"):
        ep.combine(hidden[:1], sent)
    with pytest.raises(InputError, match="out does not fit"):
        ep.combine(sent.hidden, sent, out=hidden[:1])


def check_module(rank: int, world: int) -> None:
    """A layer of the embedded model whose ranks read their own experts only."""
    model = Path(hb.__file__).parent / "demo_model"
    whole = hb.MoE.from_checkpoint(model, 0)
    ep = ExpertParallel(None, whole.experts.num_experts)
    layer = hb.MoE.from_checkpoint(model, 0, parallel=ep)
    assert layer.experts.num_experts == len(ep.local_experts) < whole.experts.num_experts
    hidden = torch.randn(rank, 3, whole.experts.hidden, generator=torch.Generator().manual_seed(rank))  # none on the first
    result = layer(hidden)
    assert result.shape == hidden.shape
    assert_close_rel(result.flatten(0, 1), whole(hidden).flatten(0, 1), token=1e-5, overall=1e-5)
    with pytest.raises(UnsupportedError, match="batch invariance"):
        hb.MoE.from_checkpoint(model, 0, parallel=ep, batch_invariant=True)
    with pytest.raises(UnsupportedError, match="not neighbours"):
        _ = ExpertParallel(None, 2 * world, placement=round_robin(2 * world, world)).local_range


def check_layer(rank: int, world: int) -> None:
    check_splits(rank, world)
    check_payloads(rank, world)
    check_sums_in_fp8(rank, world)
    check_capacity(rank, world)
    check_arrivals(rank, world)
    check_errors(rank, world)
    check_module(rank, world)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_layer_on_several_ranks_is_the_layer_on_one(world: int) -> None:
    run_ranks(check_layer, world)


def check_a_rank_that_fails(rank: int, world: int) -> None:
    group = dist.new_group(timeout=timedelta(seconds=20))
    ep = ExpertParallel(group, EXPERTS)
    hidden, ids, weights = make_tokens([2] * world)[rank]
    experts = held_by(make_layer(), ep.local_experts)
    ep.forward(hidden, experts, ids, weights)
    if rank == 1:
        with tell_others(group):
            ep.dispatch(hidden, ids, weights)
            raise ValueError("the experts of this rank are on fire")
    with pytest.raises(PeerError, match="rank 1 failed with ValueError: the experts of this rank are on fire"):
        ep.forward(hidden, experts, ids, weights)
    raise PeerError("ended as the others should")


def test_a_rank_that_fails_ends_the_others_with_its_message() -> None:
    outcomes = run_ranks(check_a_rank_that_fails, 3, ends_alone=False)
    for rank, outcome in enumerate(outcomes):
        assert outcome is not None and ("on fire" if rank == 1 else "ended as the others should") in outcome.splitlines()[-1]


def check_a_rank_with_other_experts(rank: int, world: int) -> None:
    group = dist.new_group(timeout=timedelta(seconds=8))
    ep = ExpertParallel(group, EXPERTS)
    hidden, ids, weights = make_tokens([2] * world)[rank]
    experts = held_by(make_layer(), [0] if rank == 0 else ep.local_experts)
    with pytest.raises(InputError if rank == 0 else PeerError, match=r"experts do not fit the placement.*1 experts.*4 on rank 0"):
        ep.forward(hidden, experts, ids, weights)


def test_what_fused_moe_refuses_on_one_rank_is_told_to_all() -> None:
    outcomes = run_ranks(check_a_rank_with_other_experts, 2, ends_alone=False)
    assert all(outcome is None or "barrier" in outcome for outcome in outcomes), outcomes


def test_without_a_group() -> None:
    with pytest.raises(InputError, match=r"not initialised.*torchrun"):
        ExpertParallel(None, EXPERTS)
