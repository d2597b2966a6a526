"""Random weights of published sizes: the same for every engine, and again for the check."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from halfbyte.bench.serve_checks import EngineLayer, check_layers
from halfbyte.bench.serve_weights import GEOMETRIES, Filled, Geometry
from halfbyte.bench.shapes import MoEShape
from halfbyte.errors import UnsupportedError
from halfbyte.experts import GPT_OSS_SWIGLU
from halfbyte.formats import MXFP4

CPU = torch.device("cpu")
PLAIN = Geometry("plain", MoEShape("plain", 64, 32, 4, 2), {})
GPT_OSS = Geometry("gpt-oss", MoEShape("gpt-oss", 64, 32, 4, 2, GPT_OSS_SWIGLU, has_bias=True, published=MXFP4), {}, alternating=True)
PREFIX = "model.layers.0.mlp.experts"


def parameters(geometry: Geometry, padding: int = 0) -> dict[str, torch.Tensor]:
    """Parameters as engines make them, NaN or 255 where nothing was written."""
    is_nvfp4, made = geometry.shape.published.has_global_scale, {}
    for side, rows, columns in (("w13", 64, 64), ("w2", 64, 32)):
        rows, columns = rows + padding, columns + padding
        made[f"{PREFIX}.{side}_weight"] = torch.full((4, rows, columns // 2), 255, dtype=torch.uint8)
        scales = torch.full((4, rows, columns // geometry.shape.published.block), 255, dtype=torch.uint8)
        made[f"{PREFIX}.{side}_weight_scale"] = scales.view(torch.float8_e4m3fn) if is_nvfp4 else scales
        if is_nvfp4:
            made[f"{PREFIX}.{side}_weight_scale_2"] = torch.full((4, 2) if side == "w13" else (4,), torch.nan, dtype=torch.float32)
        else:
            made[f"{PREFIX}.{side}_bias"] = torch.full((4, rows), torch.nan, dtype=torch.bfloat16)
    return made


@pytest.mark.parametrize("geometry", [PLAIN, GPT_OSS], ids=lambda geometry: geometry.name)
def test_the_check_sees_what_was_filled(geometry: Geometry) -> None:
    filled, made = Filled(geometry, seed=0), parameters(geometry)
    for name, parameter in made.items():
        filled.fill(name, parameter)
    experts = filled.experts(PREFIX, CPU)
    w13 = made[f"{PREFIX}.w13_weight"]
    assert torch.equal(experts.w13.codes, torch.cat((w13[:, 0::2], w13[:, 1::2]), dim=1) if geometry.alternating else w13)
    assert torch.equal(experts.w2.scales.view(torch.uint8), made[f"{PREFIX}.w2_weight_scale"].view(torch.uint8))
    if geometry.alternating:
        bias = made[f"{PREFIX}.w13_bias"].float()
        assert torch.equal(experts.w13_bias, torch.cat((bias[:, 0::2], bias[:, 1::2]), dim=1))
        assert torch.equal(experts.w2_bias, made[f"{PREFIX}.w2_bias"].float())
    else:
        outer = made[f"{PREFIX}.w13_weight_scale_2"]
        assert torch.equal(outer[:, 0], outer[:, 1]) and torch.equal(experts.w13.global_scale, outer)
    for matrix, rms in ((experts.w13, 0.02), (experts.w2, 0.04)):
        assert 0.6 * rms < matrix.dequantize(torch.float32).std() < 2 * rms


def test_padding_is_zero_and_changes_no_value() -> None:
    plain, padded = parameters(GPT_OSS), parameters(GPT_OSS, padding=32)
    for made in (plain, padded):
        filled = Filled(GPT_OSS, seed=0)
        for name, parameter in made.items():
            filled.fill(name, parameter)
    for name, values in plain.items():
        region = tuple(map(slice, values.shape))
        assert torch.equal(padded[name][region], values) and values.float().abs().sum() > 0
        assert padded[name].float().abs().sum() == values.float().abs().sum()  # nothing beyond


def test_values_differ_by_name_and_seed() -> None:
    def fill(name: str, seed: int) -> torch.Tensor:
        parameter = torch.empty(4, 64, 32, dtype=torch.uint8)
        Filled(PLAIN, seed).fill(name, parameter)
        return parameter

    first = fill(f"{PREFIX}.w13_weight", 0)
    assert torch.equal(first, fill(f"{PREFIX}.w13_weight", 0))
    assert not torch.equal(first, fill(f"{PREFIX}.w13_weight", 1)) and not torch.equal(first, fill("model.layers.1.mlp.experts.w13_weight", 0))


def test_what_an_engine_derives_is_left_to_it() -> None:
    swizzled = torch.full((4, 128, 4), 255, dtype=torch.uint8)
    Filled(PLAIN, 0).fill(f"{PREFIX}.w13_blockscale_swizzled", swizzled)  # SGLang 0.5.17 has it from the start
    assert (swizzled == 255).all()


def test_parameters_of_other_names_are_an_error() -> None:
    with pytest.raises(UnsupportedError, match=r"names the experts' Parameters otherwise \(given no w13_weight, "):
        Filled(PLAIN, 0).experts(PREFIX, CPU)


def test_a_layer_that_cannot_be_called_is_told_and_not_hidden() -> None:
    def apply(*_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("forward context is not set")

    layer = EngineLayer(PREFIX, 64, 4, 2, apply)
    told = check_layers([layer], lambda *_: None, CPU)
    assert told == {"checked": "not, AssertionError: forward context is not set"}
    assert "no MoE layers" in check_layers([], lambda *_: None, CPU)["checked"]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_configurations_are_those_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(tmp_path))
    geometry = GEOMETRIES[name]
    config = AutoConfig.from_pretrained(geometry.directory())
    assert config.architectures == list(json.loads((geometry.directory() / "config.json").read_text())["architectures"])
    assert len(getattr(config, "layer_types", None) or [()] * config.num_hidden_layers) == config.num_hidden_layers
    experts = getattr(config, "n_routed_experts", None) or getattr(config, "num_local_experts", None) or config.num_experts
    intermediate = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    shape = geometry.shape
    assert (config.hidden_size, intermediate, experts, config.num_experts_per_tok) == (
        shape.hidden,
        shape.intermediate,
        shape.num_experts,
        shape.top_k,
    )
