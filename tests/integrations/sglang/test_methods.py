"""Which layers halfbyte runs in SGLang and how their experts lie, asked of layers that are made up here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integrations.sglang.stand_in import AllToAll, Backend, runner_config, server

from halfbyte.experts import Activation
from halfbyte.formats import MXFP4, NVFP4
from halfbyte.integrations.engines import Options
from halfbyte.integrations.sglang.methods import HOLDINGS, activation_of, canonical_part, kind_of, refusal

MODELOPT = HOLDINGS["ModelOptNvFp4FusedMoEMethod"]


def layer_with(config: Any = None, **given: Any) -> SimpleNamespace:
    usual = {"params_dtype": torch.bfloat16, "hidden_size": 64, "intermediate_size_per_partition": 32}
    return SimpleNamespace(moe_runner_config=config or runner_config(), **usual | given)


def method_named(name: str, **attributes: Any) -> Any:
    return type(name, (), attributes)()


def reason(
    layer: Any = None, method: str = "ModelOptNvFp4FusedMoEMethod", backend: Backend = Backend.MARLIN, all2all: AllToAll = AllToAll.NONE,
    arguments: Any = None, options: Options | None = None, **attributes: Any,
) -> str | None:  # fmt: skip
    method = method_named(method, **attributes)
    return refusal(layer or layer_with(), method, backend, all2all, arguments or server(), options or Options())


def test_a_layer_on_marlin_is_taken_over() -> None:
    assert reason() is None


@pytest.mark.parametrize("name", HOLDINGS)
def test_every_holding_is_taken_over(name: str) -> None:
    config = runner_config(gemm1_alpha=1.702, gemm1_clamp_limit=7.0) if name == "Mxfp4MoEMethod" else None
    assert reason(layer_with(config), name) is None


REFUSED: dict[str, dict[str, Any]] = {
    "option enabled": {"options": Options(enabled=False)},
    "does not know how W4AFp4MoEMethod": {"method": "W4AFp4MoEMethod"},
    "MoE runner is 'triton_kernel'": {"backend": Backend.TRITON_KERNELS},
    "MoE runner is 'auto'": {"method": "Mxfp4MoEMethod", "backend": Backend.AUTO},
    "all-to-all backend 'deepep'": {"all2all": AllToAll.DEEPEP},
    "quantised while they are loaded": {"quant_config": SimpleNamespace(is_checkpoint_nvfp4_serialized=False)},
    "no activation 'situ' with a gate": {"layer": layer_with(runner_config(activation="situ"))},
    "no activation 'silu' without a gate": {"layer": layer_with(runner_config(is_gated=False))},
    "router weights": {"layer": layer_with(runner_config(apply_router_weight_on_input=True))},
    "one by one": {"layer": layer_with(runner_config(no_combine=True))},
    "the model is torch.float16": {"layer": layer_with(params_dtype=torch.float16)},
    "blocks of 16": {"layer": layer_with(intermediate_size_per_partition=24)},
    "--cpu-offload-gb": {"arguments": server(cpu_offload_gb=4)},
    "--kt-weight-path": {"arguments": server(kt_weight_path="/experts")},
    "--enable-paged-experts": {"arguments": server(enable_paged_experts=True)},
    "--dwdp-size": {"arguments": server(dwdp_size=2)},
    "--offload-group-size": {"arguments": server(offload_group_size=3)},
    "weight cache": {"arguments": server(weight_cache_mode="daemon")},
    "--lora-target-modules": {"arguments": server(enable_lora=True)},
    "LoRA may be applied": {"arguments": server(lora_paths=["a"], lora_target_modules={"q_proj", "gate_up_proj"})},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_not_covered_is_refused_with_its_reason(said: str) -> None:
    assert said in str(reason(**REFUSED[said]))


def test_lora_on_the_attention_alone_is_no_reason() -> None:
    assert reason(arguments=server(enable_lora=True, lora_target_modules={"q_proj", "o_proj"})) is None


def test_a_device_that_was_not_given_is_found() -> None:
    assert reason(arguments=server(device=None)) is None


def test_automatic_means_marlin_below_blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.integrations.sglang import methods

    def on(arch: str) -> str | None:
        monkeypatch.setattr(methods.Target, "of", lambda _: SimpleNamespace(arch=arch, is_cpu=False, name="a GPU"))
        return reason(backend=Backend.AUTO, arguments=server(device="cuda"))

    assert on("sm_90") is None
    assert "MoE runner is 'auto'" in str(on("sm_100"))


def test_the_scheme_of_a_layer_holds_its_experts() -> None:
    scheme = method_named("CompressedTensorsW4A16Nvfp4MoE")
    layer = layer_with(scheme=scheme)
    assert kind_of(layer, method_named("CompressedTensorsFusedMoEMethod")) == "CompressedTensorsW4A16Nvfp4MoE"
    assert kind_of(layer_with(scheme=None), method_named("Mxfp4MoEMethod")) == "Mxfp4MoEMethod"
    assert HOLDINGS["CompressedTensorsW4A16Nvfp4MoE"].inverse


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, Activation("swiglu")),
        ({"swiglu_limit": 10.0}, Activation("swiglu", limit=10.0)),
        ({"swiglu_limit": 0.0}, Activation("swiglu")),
        ({"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}, Activation("swiglu", 1.702, 1.0, 7.0)),
        ({"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0, "gemm1_beta": 0.0}, Activation("swiglu", 1.702, 0.0, 7.0)),
        ({"activation": "relu2", "is_gated": False}, Activation("relu2")),
        ({"activation": "gelu"}, None),
    ],
)
def test_activations(given: dict[str, Any], wanted: Activation | None) -> None:
    assert activation_of(runner_config(**given)) == wanted


def test_a_part_is_a_view_of_the_parameter() -> None:
    """E = 1, hidden 32 padded to 64, intermediate 32 padded to 64; every byte of the codes is its own address."""
    holding, layer = HOLDINGS["Mxfp4MoEMethod"], layer_with(hidden_size=32)
    codes = torch.arange(128 * 32).view(1, 128, 32).remainder(251).to(torch.uint8)
    part = canonical_part(layer, holding, "w13.codes", codes)
    assert part.shape == (1, 2, 32, 16)
    assert (part[0, 1, 3] == codes[0, 64 + 3, :16]).all()
    assert part.untyped_storage().data_ptr() == codes.untyped_storage().data_ptr()
    in_turns = layer_with(runner_config(gemm1_alpha=1.7), hidden_size=32)
    assert (canonical_part(in_turns, holding, "w13.codes", codes)[0, 1, 3] == codes[0, 7, :16]).all()
    scales = torch.zeros(1, 64, 2, dtype=torch.uint8)
    assert canonical_part(layer, holding, "w2.scales", scales).shape == (1, 1, 32, 1)
    assert canonical_part(layer, holding, "w2_bias", torch.zeros(1, 64)).shape == (1, 1, 32)


def test_a_share_of_the_intermediate_size_is_rounded_up_to_blocks() -> None:
    """gpt-oss in four: 2880 / 4 = 720 columns, of which SGLang loads 23 blocks of 32."""
    layer = layer_with(runner_config(gemm1_alpha=1.7), hidden_size=64, intermediate_size_per_partition=720)
    codes = torch.zeros(1, 2 * 768, 128, dtype=torch.uint8)
    assert canonical_part(layer, HOLDINGS["Mxfp4MoEMethod"], "w13.codes", codes).shape == (1, 2, 736, 32)
    assert MODELOPT.format == NVFP4 and HOLDINGS["Mxfp4MoEMethod"].format == MXFP4
