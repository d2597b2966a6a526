"""config.json of each family to one MoEConfig; `fixtures/<model_type>.json` says what a published model comes to."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path

import checkpoint_files as cf
import pytest

from halfbyte.checkpoint.families import FAMILIES, KNOWN_MODEL_TYPES, MoEConfig, RoutingRule, describe_moe, find_experts, format_range, tensor_names
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.experts import GEGLU_TANH, GPT_OSS_SWIGLU, RELU2, SWIGLU

FOUND = find_experts(["model.embed_tokens.weight", "model.layers.1.mlp.experts.0.gate_proj.weight"])
FIXTURES = {file.stem: file for file in (Path(__file__).parent / "fixtures").glob("*.json")}


def test_no_model_type_belongs_to_two_families() -> None:
    claimed = [model_type for family in FAMILIES for model_type in family.MODEL_TYPES]
    assert sorted(claimed) == sorted(KNOWN_MODEL_TYPES)


@pytest.mark.parametrize("model_type", FIXTURES)
def test_a_published_model(model_type: str) -> None:
    """Sizes, routing, activation and place; and which of the tensors beside the experts are taken for the router's."""
    fixture = json.loads(FIXTURES[model_type].read_text())
    expected = fixture["expected"]
    assert fixture["config"]["model_type"] == model_type
    moe = describe_moe(fixture["config"], find_experts(fixture["tensors"]))
    assert moe.family == model_type and moe.num_layers == fixture["config"]["num_hidden_layers"]
    assert (format_range(moe.moe_layers), moe.block, moe.interleaved) == (expected["moe_layers"], expected["block"], expected["interleaved"])
    assert [moe.num_experts, moe.hidden, moe.intermediate] == expected["sizes"]
    assert moe.routing is not None and moe.activation is not None and moe.top_k == expected["routing"][1]
    assert [list(astuple(moe.routing)), list(astuple(moe.activation))] == [expected["routing"], expected["activation"]]
    names = tensor_names(model_type)
    router = {*names.router, names.logit_bias, *names.correction_bias, names.token_experts}
    block = moe.block_of(moe.moe_layers[0])
    assert [name for name in sorted(router) if f"{block}.{name}" in fixture["tensors"]] == expected["router"]


def test_which_layers_are_moe() -> None:
    def layers(config: dict, **changes: object) -> tuple[int, ...]:
        return describe_moe({**config, "num_hidden_layers": 6, **changes}, FOUND).moe_layers

    assert layers(cf.QWEN, mlp_only_layers=[]) == layers(cf.QWEN, mlp_only_layers=None, decoder_sparse_step=None) == (0, 1, 2, 3, 4, 5)
    assert layers(cf.QWEN, mlp_only_layers=[3], decoder_sparse_step=2) == (1, 5)
    assert layers(cf.QWEN, mlp_only_layers=list(range(6))) == ()
    assert layers(cf.DEEPSEEK_V3, first_k_dense_replace=3) == (3, 4, 5)
    assert layers(cf.DEEPSEEK_V3, first_k_dense_replace=0, moe_layer_freq=2) == (0, 2, 4)
    assert layers(cf.MIXTRAL) == layers(cf.GPT_OSS) == layers(cf.DEEPSEEK_V4) == (0, 1, 2, 3, 4, 5)
    with pytest.raises(CheckpointError, match=r"mlp_layer_types does not fit .*needed one entry for each of 6 layers"):
        layers(cf.DEEPSEEK_V4, mlp_layer_types=["moe", "moe"])
    assert layers(cf.DEEPSEEK_V4, mlp_layer_types=["dense"] + 6 * ["moe"]) == (1, 2, 3, 4, 5)  # the last is a head's
    assert layers(cf.DEEPSEEK_V4, mlp_layer_types=["dense", "hash_moe", "moe", "dense", "moe", "moe"]) == (1, 2, 4, 5)


def test_a_language_model_inside_another() -> None:
    wrapped = describe_moe(
        {"model_type": "a_vision_model", "text_config": cf.QWEN}, find_experts(["model.language_model.layers.1.mlp.experts.0.up_proj.weight"])
    )
    assert wrapped.family == "qwen3_moe" and wrapped.block_of(1) == "model.language_model.layers.1.mlp"


def test_routing_and_activation_that_the_configuration_changes() -> None:
    def rule(config: dict, **changes: object) -> RoutingRule | None:
        return describe_moe({**config, **changes}, FOUND).routing

    assert rule(cf.QWEN) == RoutingRule("renormalize", 2)
    assert rule(cf.QWEN, norm_topk_prob=False) == RoutingRule("default", 2)
    assert rule(cf.MIXTRAL) == rule(cf.GPT_OSS) == RoutingRule("renormalize", 2)
    assert rule(cf.DEEPSEEK_V3, n_group=8, topk_group=4) == RoutingRule("deepseek_v3", 2, 8, 4, 2.5)
    assert rule(cf.DEEPSEEK_V4) == RoutingRule("deepseek_v4", 2, scale=1.5)
    assert describe_moe({**cf.QWEN, "hidden_act": "gelu_pytorch_tanh"}, FOUND).activation == GEGLU_TANH
    for config in (cf.DEEPSEEK_V3, cf.DEEPSEEK_V4):
        for changes, reason in (
            ({"scoring_func": "softmax"}, "its scores are 'softmax'"),
            ({"norm_topk_prob": False}, "norm_topk_prob|renormalised"),
        ):
            moe = describe_moe({**config, **changes}, FOUND)
            assert moe.top_k == 2 and moe.hidden == cf.H  # the experts are read in any case
            with pytest.raises(UnsupportedError, match=reason):
                moe.known_routing()


def test_left_out_values_mean_what_transformers_says() -> None:
    """Every default of the tables, and no default that transformers has and that they lack."""
    transformers = pytest.importorskip("transformers")
    routing = ("num_experts_per_tok", "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor", "decoder_sparse_step")
    of_layers = {"first_k_dense_replace", "moe_layer_end_index"}  # lists of layers in transformers
    for family in FAMILIES:
        for model_type, model in family.MODEL_TYPES.items():
            if model_type not in transformers.CONFIG_MAPPING:
                continue
            config = transformers.CONFIG_MAPPING[model_type]()
            config = getattr(config, model.section) if model.section else config.get_text_config()
            for key, value in model.defaults.items():
                if key in of_layers:
                    kinds = getattr(config, "mlp_layer_types", None)
                    assert kinds is None or key != "first_k_dense_replace" or kinds[:value] == ["dense"] * value != kinds[: value + 1], model_type
                else:
                    assert getattr(config, key) == value, (model_type, key)
            if model.refusal or model_type in ("gpt_oss", "deepseek_v4"):
                continue
            aliases = {"num_experts_per_tok": {"moe_topk", "moe_k", "num_experts_per_token"}, "n_group": {"num_expert_group"}}
            read = {model.scale, "num_experts_per_tok", "n_group", "topk_group"} | (
                {model.renormalised} if isinstance(model.renormalised, str) else set()
            )
            for key in set(routing) & read:
                value = getattr(config, key, None)
                if value not in (None, 1, 1.0) and not model.section:
                    assert key in model.defaults or aliases.get(key, set()) & set(model.defaults), (model_type, key, value)


def described(model_type: str, **values: object) -> MoEConfig:
    sizes = {"num_hidden_layers": 6, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    return describe_moe({"model_type": model_type, **sizes, **values}, FOUND)


def test_what_sets_families_apart() -> None:
    # A leftover norm_topk_prob does not count where the family always renormalises.
    assert described("qwen3_5_moe", norm_topk_prob=False).routing == RoutingRule("renormalize", 2)
    assert described("qwen3_next").routing == RoutingRule("renormalize", 2) and described("qwen3_moe").routing == RoutingRule("default", 2)
    assert described("deepseek_v3").routing == RoutingRule("deepseek_v3", 2, 8, 4, 2.5)
    assert described("deepseek_v3").moe_layers == described("deepseek_v3", routed_scaling_factor=None).moe_layers == (3, 4, 5)
    assert described("bailing_moe", norm_topk_prob=True).routing == RoutingRule("renormalize", 2)
    ling = described("bailing_moe", norm_topk_prob=True, score_function="sigmoid", n_group=4, topk_group=2, routed_scaling_factor=2.5)
    assert ling.routing == RoutingRule("deepseek_v3", 2, 4, 2, 2.5)
    assert described("cohere2_moe", norm_topk_prob=False).routing == RoutingRule("renormalize", 2)  # softmax over the k, whatever it says
    assert described("cohere2_moe", expert_selection_fn="sigmoid").routing == RoutingRule("sigmoid_renorm", 2)
    assert described("cohere2_moe", expert_selection_fn="sigmoid", norm_topk_prob=False).routing == RoutingRule("topk_sigmoid", 2)
    assert described("hunyuan_v1_moe", num_experts_per_tok=None, moe_topk=[2] * 6).top_k == 2
    with pytest.raises(UnsupportedError, match="layers differ"):
        described("hunyuan_v1_moe", num_experts_per_tok=None, moe_topk=[2, 1])
    assert described("mimo_v2_flash", moe_layer_freq=[0, 0, 1, 1, 0, 1]).moe_layers == (2, 3, 5)
    assert described("llama4", interleave_moe_layer_step=2).moe_layers == (1, 3, 5) == described("llama4", moe_layers=[1, 3, 5]).moe_layers
    assert described("jamba").moe_layers == (1, 3, 5) and described("ernie4_5_moe", moe_layer_end_index=3).moe_layers == (1, 2, 3)
    assert described("step3p5", moe_layers_enum="4,5").moe_layers == (4, 5)
    nemotron = described("nemotron_h", hybrid_override_pattern="M*EEM*", moe_latent_size=48)
    assert nemotron.moe_layers == (2, 3) and nemotron.hidden == 48 and nemotron.activation == RELU2


def test_why_a_router_is_refused() -> None:
    """By `MoE` alone: what the experts compute is known all the same, and how many of them a token has."""
    sizes = {"num_hidden_layers": 6, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    for model_type, values, reason in (
        ("deepseek_v2", {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}, "2 of 4 groups"),
        ("mistral4", {"n_group": 4, "topk_group": 2}, "2 of 4 groups"),
        ("dots1", {}, "not renormalised"),
        ("laguna", {"moe_router_logit_softcapping": 30.0}, "caps its logits"),
        ("laguna", {"moe_apply_router_weight_on_input": True}, "input of the experts"),
        ("llama4", {}, "input of the experts"),
        ("nemotron_h", {"moe_latent_size": 48, "layers_block_type": ["moe"] * 6}, "latent projections"),
        ("longcat_flash", {}, "zero experts"),
    ):
        moe = describe_moe({"model_type": model_type, **sizes, **values}, FOUND)
        assert moe.top_k == 2 and moe.activation is not None
        with pytest.raises(UnsupportedError, match=reason) as caught:
            moe.known_routing()
        assert model_type in str(caught.value)


def test_layers_whose_experts_are_refused() -> None:
    config = {"model_type": "step3p5", "num_hidden_layers": 4, "hidden_size": 64, "moe_intermediate_size": 32, "moe_num_experts": 8}
    moe = describe_moe({**config, "moe_layers_enum": "2,3", "swiglu_limits": [0.0, None, 0.0, 7.0]}, FOUND)
    moe.check_layer(2)
    with pytest.raises(UnsupportedError, match=r"experts of layer 3 .*clamped at 7"):
        moe.check_layer(3)


def test_what_cannot_be_described() -> None:
    with pytest.raises(UnsupportedError, match=r"model_type 'llama'; needed qwen2_moe, .*deepseek_v4"):
        describe_moe({"model_type": "llama"}, FOUND)
    with pytest.raises(UnsupportedError, match="hidden_act 'tanh'"):
        describe_moe({**cf.QWEN, "hidden_act": "tanh"}, FOUND)
    with pytest.raises(CheckpointError, match=r"missing value .needed hidden_size"):
        describe_moe({key: value for key, value in cf.QWEN.items() if key != "hidden_size"}, FOUND)
    with pytest.raises(CheckpointError, match=r"no single place of expert tensors .given none"):
        describe_moe(cf.QWEN, find_experts(["model.layers.0.mlp.gate_proj.weight", "mtp.layers.0.mlp.experts.0.up_proj.weight"]))
    with pytest.raises(CheckpointError, match=r"given a\.layers\.0\.mlp\.experts\.0\.w1\.weight, b\.layers\.0\.ffn"):
        describe_moe(cf.QWEN, find_experts(["b.layers.0.ffn.experts.0.w1.weight", "a.layers.0.mlp.experts.0.w1.weight"]))


STRANGE = ["4", "four", 4.5, [4], {}, True, -1, 0, 10**30, float("nan")]


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "num_experts_per_tok", "hidden_size", "moe_intermediate_size"])
@pytest.mark.parametrize("value", STRANGE, ids=map(repr, STRANGE))
def test_sizes_are_positive_integers(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {key} does not fit .*an integer from 1 to"):
        describe_moe({**cf.QWEN, key: value}, FOUND)


@pytest.mark.parametrize(
    ("config", "key", "values"),
    [
        (cf.QWEN, "num_hidden_layers", [10**9, 2**31 - 1]),
        (cf.QWEN, "text_config", [[1], "x", 3, True]),
        (cf.QWEN, "hidden_act", [["silu"], 3, True]),
        (cf.QWEN, "mlp_layer_types", [7, "moe", ["moe"], [1, 2]]),
        (cf.QWEN, "mlp_only_layers", [3, "0", ["0"], [0.5], [-1]]),
        (cf.QWEN, "decoder_sparse_step", ["1", 0, 1.5, [1], True]),
        (cf.QWEN, "norm_topk_prob", ["false", 0, 1, [True]]),
        (cf.DEEPSEEK_V3, "first_k_dense_replace", ["1", -1, 0.5, True]),
        (cf.DEEPSEEK_V3, "moe_layer_freq", ["1", 0, [1]]),
        (cf.DEEPSEEK_V3, "n_group", ["1", -1, 0]),
        (cf.DEEPSEEK_V3, "routed_scaling_factor", ["x", [1], float("nan"), float("inf"), True, -1.0]),
        (cf.DEEPSEEK_V4, "routed_scaling_factor", ["x", [1], {}]),
        (cf.DEEPSEEK_V4, "swiglu_limit", ["x", -1.0, float("nan"), [10.0]]),
        (cf.GPT_OSS, "swiglu_alpha", ["x", float("inf")]),
    ],
)
def test_other_values_have_types_and_ranges(config: dict, key: str, values: list) -> None:
    for value in values:
        with pytest.raises(CheckpointError, match=f"{key} does not fit"):
            describe_moe({**config, key: value}, FOUND)


def test_null_means_absent() -> None:
    nulls = dict.fromkeys(("text_config", "mlp_layer_types", "mlp_only_layers", "decoder_sparse_step", "hidden_act", "n_group", "swiglu_limit"))
    for config in (cf.QWEN, cf.DEEPSEEK_V3, cf.DEEPSEEK_V4):
        without = {key: value for key, value in config.items() if key not in nulls}
        assert describe_moe({**config, **nulls}, FOUND) == describe_moe(without, FOUND)


def test_experts_that_are_what_they_are_whatever_hidden_act_says() -> None:
    assert described("lfm2_moe", hidden_act="gelu").activation == SWIGLU
    assert describe_moe({**cf.GPT_OSS, "hidden_act": "gelu"}, FOUND).activation == GPT_OSS_SWIGLU


def test_null_is_no_where_it_says_whether_weights_are_renormalised() -> None:
    """transformers and engines test the value: None, in Python, is no."""
    dbrx = {"model_type": "dbrx", "n_layers": 2, "d_model": 64, "ffn_config": {"moe_num_experts": 8, "ffn_hidden_size": 32, "moe_top_k": 2}}
    silent = {**dbrx, "ffn_config": {**dbrx["ffn_config"], "moe_normalize_expert_weights": None}}
    assert [describe_moe(config, FOUND).known_routing().method for config in (dbrx, silent)] == ["renormalize", "default"]
    assert describe_moe({**cf.QWEN, "norm_topk_prob": None}, FOUND).known_routing().method == "default"
    with pytest.raises(UnsupportedError, match="not renormalised"):
        describe_moe({**cf.DEEPSEEK_V3, "norm_topk_prob": None}, FOUND).known_routing()


def test_no_more_experts_per_token_than_there_are() -> None:
    assert describe_moe({**cf.QWEN, "num_experts_per_tok": cf.E}, FOUND).top_k == cf.E
    with pytest.raises(CheckpointError, match=f"num_experts_per_tok {cf.E + 1}; needed 1 to {cf.E}"):
        describe_moe({**cf.QWEN, "num_experts_per_tok": cf.E + 1}, FOUND)


def test_find_experts() -> None:
    """Whatever lies between layer and experts, nothing included; shared experts are none."""
    places = {
        "model.layers.{layer}.mlp": "model.layers.12.mlp.experts.0.gate_proj.weight_packed",
        "layers.{layer}.feed_forward": "layers.0.feed_forward.experts.gate_up_proj",
        "layers.{layer}.moe.inner": "layers.0.moe.inner.experts.3.w2.scale",
        "model.layers.{layer}": "model.layers.7.experts.down_proj_blocks",
    }
    assert [list(find_experts([name])) for name in places.values()] == [[place] for place in places]
    assert find_experts(["model.layers.0.mlp.shared_experts.up_proj.weight", "experts.0.w1.weight", "mtp.layers.0.mlp.experts.0.w1"]) == {}


def test_format_range() -> None:
    assert [format_range(numbers) for numbers in ([], [4], [0, 1], [1, 3, 4, 5, 9])] == ["(none)", "4", "0..1", "1, 3..5, 9"]
