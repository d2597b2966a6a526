"""`MoE` against the layer of the model it was read from."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_close_rel, relative_errors

import halfbyte as hb
from halfbyte.errors import InputError, UnsupportedError

DEMO = Path(hb.__file__).parent / "demo_model"


@pytest.fixture(scope="module")
def layer():
    return hb.MoE.from_checkpoint(DEMO, 2)


def test_equals_the_formula_of_the_model(layer):
    """Softmax, top 4, renormalise, down(silu(gate) * up): written out with the demo model's own tensors."""
    hidden = torch.randn(3, 7, 256, generator=torch.Generator().manual_seed(0))
    w, router = hb.load_experts(DEMO, 2), hb.load_router(DEMO, 2)
    probabilities = (hidden @ router.weight.float().T).softmax(-1)
    values, ids = probabilities.topk(4)
    mask = torch.zeros_like(probabilities).scatter(-1, ids, values / values.sum(-1, keepdim=True))
    gate, up = torch.einsum("eoh,bth->bteo", w.w13.float(), hidden).chunk(2, dim=-1)
    every_expert = torch.einsum("ehi,btei->bteh", w.w2.float(), torch.nn.functional.silu(gate) * up)
    expected = (mask.unsqueeze(-1) * every_expert).sum(dim=2)
    assert_close_rel(layer(hidden), expected, token=1e-5, overall=1e-5)


@pytest.mark.parametrize(("activations", "limit"), [("fp8", 0.06), ("mxfp8", 0.06), ("nvfp4", 0.25)])
def test_quantised_activations_of_a_real_layer(layer, activations, limit):
    hidden = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    other = hb.MoE(layer.router, layer.experts, activations=activations)
    error = relative_errors(other(hidden), layer(hidden))[1]
    assert limit / 10 < error < limit


def test_biases_of_the_router(layer):
    bias = torch.zeros(16)
    bias[11] = 100.0
    favoured = hb.MoE(replace(layer.router, logit_bias=bias), layer.experts)
    assert (favoured.route(torch.randn(9, 256)).ids[:, 0] == 11).all()
    rule = replace(layer.router.rule, method="deepseek_v3", scale=2.0)
    favoured = hb.MoE(replace(layer.router, rule=rule, correction_bias=bias), layer.experts)
    routing = favoured.route(torch.randn(9, 256))
    assert (routing.ids[:, 0] == 11).all() and torch.allclose(routing.weights.sum(1), torch.tensor(2.0))


def test_moves_between_devices_but_keeps_its_bits(layer):
    moved = hb.MoE(layer.router, layer.experts).to(torch.float16)
    assert moved.experts is layer.experts and not list(moved.parameters())
    # Only "meta" is there to move to on every machine; `Target` refuses it, which shows that the move was made.
    with pytest.raises(InputError, match="given meta"):
        moved.to("meta")


def test_layer_without_a_router_of_its_own(layer):
    with pytest.raises(UnsupportedError, match=r"chosen by token id.*token_experts and call halfbyte.fused_moe"):
        hb.MoE(replace(layer.router, token_experts=torch.zeros(10, 4, dtype=torch.int64)), layer.experts)


def test_describes_itself(layer):
    assert repr(layer) == "MoE(16 experts dense, hidden 256, intermediate 128, renormalize top-4, activations bf16)"


def test_its_state_is_its_tensors(layer, tmp_path):
    """Saved and loaded as any module, into the same addresses; another layer's state, or half of one, is an error."""
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = copy.deepcopy(layer)
    addresses = {name: tensor.data_ptr() for name, tensor in other.state_dict().items()}
    for tensor in other.state_dict().values():
        tensor.zero_()
    hidden = torch.randn(3, 256)
    assert not torch.equal(other(hidden), layer(hidden))
    state = torch.load(tmp_path / "layer.pt")
    assert set(state) == {"router.weight", "experts.canonical.w13", "experts.canonical.w2"}
    torch.nn.Sequential(other).load_state_dict({f"0.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(other(hidden), layer(hidden))
    assert {name: tensor.data_ptr() for name, tensor in other.state_dict().items()} == addresses
    for wrong, message in (
        ({"experts.canonical.w2": state["experts.canonical.w2"][1:]}, "needed"),
        ({"more": hidden}, "Unexpected key"),
        ({"router.weight": None}, "Missing key"),
    ):
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict({name: tensor for name, tensor in (state | wrong).items() if tensor is not None})


def test_the_state_of_another_layout_is_refused(layer):
    """Tensors of "hopper" and "hopper_fp8" have the same names and shapes, and other bytes."""
    w13, w2 = (hb.quantize(torch.randn(16, *shape), hb.NVFP4) for shape in ((256, 256), (256, 128)))
    hopper, hopper_fp8 = (hb.MoE(layer.router, hb.prepare(hb.ExpertWeights(w13, w2), layout)) for layout in ("hopper", "hopper_fp8"))
    shapes = [[tensor.shape for tensor in layer.state_dict().values()] for layer in (hopper, hopper_fp8)]
    assert shapes[0] == shapes[1]
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.hopper_fp8\.w13\.words[^U]*Unexpected key.*experts\.hopper\.w13\.words"):
        hopper_fp8.load_state_dict(hopper.state_dict())


def test_hidden_states_of_another_width(layer):
    with pytest.raises(InputError, match=r"MoE: hidden does not fit \(given \(2, 10\); needed \[..., 256\]\)"):
        layer(torch.randn(2, 10))
