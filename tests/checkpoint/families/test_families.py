"""config.json of each family to one MoEConfig."""

from __future__ import annotations

import checkpoint_files as cf
import pytest

from halfbyte.checkpoint.families import RoutingRule, describe_moe, format_range
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.experts import GEGLU_TANH, GPT_OSS_SWIGLU

NAMES = ["model.embed_tokens.weight", "model.layers.1.mlp.experts.0.gate_proj.weight"]


def test_which_layers_are_moe() -> None:
    def layers(config: dict, **changes: object) -> tuple[int, ...]:
        return describe_moe({**config, "num_hidden_layers": 6, **changes}, NAMES).moe_layers

    assert layers(cf.QWEN, mlp_only_layers=[]) == (0, 1, 2, 3, 4, 5)
    assert layers(cf.QWEN, mlp_only_layers=[3], decoder_sparse_step=2) == (1, 5)
    assert layers(cf.DEEPSEEK_V3, first_k_dense_replace=3) == (3, 4, 5)
    assert layers(cf.DEEPSEEK_V3, first_k_dense_replace=0, moe_layer_freq=2) == (0, 2, 4)
    assert layers(cf.MIXTRAL) == layers(cf.GPT_OSS) == layers(cf.DEEPSEEK_V4) == (0, 1, 2, 3, 4, 5)
    assert layers(cf.DEEPSEEK_V4, mlp_layer_types=["dense", "hash_moe", "moe", "dense", "moe", "moe"]) == (1, 2, 4, 5)


def test_geometry_and_names() -> None:
    moe = describe_moe(cf.GPT_OSS, ["model.layers.0.mlp.experts.gate_up_proj_blocks"])
    assert (moe.num_experts, moe.hidden, moe.intermediate, moe.top_k, moe.interleaved) == (cf.E, cf.H, cf.I, 2, True)
    assert moe.activation == GPT_OSS_SWIGLU and moe.block_of(1) == "model.layers.1.mlp"
    wrapped = describe_moe({"model_type": "a_vision_model", "text_config": cf.QWEN}, ["model.language_model.layers.1.mlp.experts.0.up_proj.weight"])
    assert wrapped.family == "qwen3_moe" and wrapped.block_of(1) == "model.language_model.layers.1.mlp" and not wrapped.interleaved
    assert describe_moe({**cf.QWEN, "hidden_act": "gelu_pytorch_tanh"}, NAMES).activation == GEGLU_TANH


def test_routing() -> None:
    def rule(config: dict, **changes: object) -> RoutingRule:
        return describe_moe({**config, **changes}, NAMES).routing

    assert rule(cf.QWEN) == RoutingRule("renormalize", 2)
    assert rule(cf.QWEN, norm_topk_prob=False) == RoutingRule("default", 2)
    assert rule(cf.MIXTRAL) == rule(cf.GPT_OSS) == RoutingRule("renormalize", 2)
    assert rule(cf.DEEPSEEK_V3, n_group=8, topk_group=4) == RoutingRule("deepseek_v3", 2, 8, 4, 2.5)
    assert rule(cf.DEEPSEEK_V4) == RoutingRule("deepseek_v4", 2, scale=1.5)
    for changes in ({"scoring_func": "softmax"}, {"norm_topk_prob": False}):
        with pytest.raises(UnsupportedError, match="unknown router"):
            rule(cf.DEEPSEEK_V3, **changes)


def test_what_cannot_be_described() -> None:
    with pytest.raises(UnsupportedError, match=r"model_type 'llama'; needed qwen2_moe, .*deepseek_v4"):
        describe_moe({"model_type": "llama"}, NAMES)
    with pytest.raises(UnsupportedError, match="hidden_act 'tanh'"):
        describe_moe({**cf.QWEN, "hidden_act": "tanh"}, NAMES)
    with pytest.raises(CheckpointError, match=r"missing value .needed hidden_size"):
        describe_moe({key: value for key, value in cf.QWEN.items() if key != "hidden_size"}, NAMES)
    with pytest.raises(CheckpointError, match=r"no single place of expert tensors .given none"):
        describe_moe(cf.QWEN, ["model.layers.0.mlp.gate_proj.weight", "mtp.layers.0.mlp.experts.0.up_proj.weight"])


def test_format_range() -> None:
    assert [format_range(numbers) for numbers in ([], [4], [0, 1], [1, 3, 4, 5, 9])] == ["(none)", "4", "0..1", "1, 3..5, 9"]
