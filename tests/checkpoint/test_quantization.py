"""What config files say of quantisation: patterns, kinds, and refusals that list what is read."""

from __future__ import annotations

import pytest
from checkpoint_files import MODELOPT

from halfbyte.checkpoint.patterns import matches
from halfbyte.checkpoint.quantization import describe_quantization
from halfbyte.errors import CheckpointError, UnsupportedError
from halfbyte.formats import MXFP4, NVFP4

GATE = "model.layers.1.mlp.experts.0.gate_proj"


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "language_model.lm_head", True),
        ("language_model.lm_head", "lm_head", True),
        ("model.layers.1", "model.layers.1.mlp.gate_proj", True),
        ("model.layers.1", "model.layers.10.mlp.gate_proj", False),
        ("model.layers.1*", "model.layers.10.mlp.gate_proj", True),
        ("model.layers.*.mlp.gate", "model.layers.3.mlp.gate", True),
        ("model.layers.*.mlp.gate", "model.layers.3.mlp.gate_proj", False),
        ("model.language_model.layers.2.self_attn*", "language_model.model.layers.2.self_attn.q_proj", True),
        ("mlp.gate", "model.layers.3.mlp.gate", True),
        ("*router*", "model.layers.3.mlp.router", True),
        ("*.shared_expert.*", "model.layers.3.mlp.shared_expert.up_proj", True),
        ("gate", "model.layers.3.mlp.gate_proj", False),
        ("re:.*mlp.gate$", "model.layers.3.mlp.gate", True),
        ("re:.*mlp.gate$", "model.layers.3.mlp.gate_proj", False),
        ("re:visual.*", "model.visual.blocks", False),
        ("a.b.c", "b.c", False),
    ],
)
def test_patterns(pattern: str, module: str, expected: bool) -> None:
    assert matches(pattern, module) is expected


def test_fused_modules_are_stored_as_their_parts() -> None:
    attention = "model.layers.0.self_attn"
    excluded = [f"{attention}.{part}_proj" for part in "qkv"]
    quantization = describe_quantization({}, {"quantization": {"quant_algo": "NVFP4", "exclude_modules": excluded}})
    assert quantization.excluded(f"{attention}.qkv_proj") and not quantization.excluded("model.layers.1.self_attn.qkv_proj")
    assert not quantization.excluded("model.layers.0.mlp.gate_up_proj")
    latent = describe_quantization(
        {}, {"quantization": {"quant_algo": "NVFP4", "exclude_modules": [f"{attention}.q_a_proj", f"{attention}.kv_a_proj_with_mqa"]}}
    )
    assert latent.excluded(f"{attention}.fused_qkv_a_proj_with_mqa")
    partly = describe_quantization({}, {"quantization": {"quant_algo": "NVFP4", "exclude_modules": excluded[:1]}})
    with pytest.raises(CheckpointError, match="qkv_proj are not stored alike"):
        partly.excluded(f"{attention}.qkv_proj")


@pytest.mark.parametrize("algorithm", ["NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "nvfp4"])
@pytest.mark.parametrize("key", ["exclude_modules", "ignore", "modules_to_not_convert"])
def test_modelopt(algorithm: str, key: str) -> None:
    said = {"quant_algo": algorithm, key: ["lm_head"]}
    for quantization in (describe_quantization({}, {"quantization": said}), describe_quantization({"quantization_config": said})):
        assert (quantization.kind, quantization.format) == ("modelopt", NVFP4)
        assert quantization.dialect_of(GATE).format is NVFP4 and quantization.excluded("lm_head")


def test_mixed_precision_is_per_layer() -> None:
    layers = {GATE: {"quant_algo": "NVFP4", "group_size": 16}, "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"}}
    quantization = describe_quantization({}, {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}})
    assert quantization.dialect_of(GATE).format is NVFP4 and quantization.format is NVFP4
    assert quantization.excluded("model.layers.1.mlp.experts.1.gate_proj")
    with pytest.raises(UnsupportedError, match=r"q_proj is quantised in a way .*given FP8; needed NVFP4"):
        quantization.dialect_of("model.layers.0.self_attn.q_proj")


def test_compressed_tensors() -> None:
    groups = {
        "a": {"targets": ["re:.*experts.*"], "format": "nvfp4-pack-quantized", "weights": {"group_size": 16}},
        "b": {"targets": ["Linear"], "format": "float-quantized", "weights": {}},
    }
    said = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups, "ignore": ["lm_head", "re:.*mlp.gate$"]}
    quantization = describe_quantization({"quantization_config": said})
    assert quantization.dialect_of(GATE).format is NVFP4 and quantization.excluded("model.layers.1.mlp.gate") and quantization.excluded("lm_head")
    with pytest.raises(UnsupportedError, match="float-quantized"):
        quantization.dialect_of("model.layers.1.self_attn.q_proj")


def test_other_kinds() -> None:
    kinds = {
        "dense": {},
        "gpt-oss": {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}},
        "deepseek-v4": {"quantization_config": {"quant_method": "fp8", "expert_dtype": "fp4"}},
        "fp8-block": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    }
    for kind, config in kinds.items():
        quantization = describe_quantization(config)
        assert quantization.kind == kind
        assert quantization.dialect_of(GATE).format is (MXFP4 if kind in ("gpt-oss", "deepseek-v4") else None)
        assert quantization.excluded("model.layers.1.self_attn.q_proj")
    assert describe_quantization({"text_config": kinds["gpt-oss"]}).kind == "gpt-oss"
    kept = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.0.mlp.experts"]}
    quantization = describe_quantization({"quantization_config": kept})
    assert quantization.excluded("model.layers.0.mlp.experts.0.gate_proj") and not quantization.excluded(GATE)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"quant_method": "gptq"}, ["quant_method 'gptq'", "modelopt, compressed-tensors, mxfp4, quark, fp8"]),
        ({"bits": 4}, ["quant_method None"]),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, ["given FP8", "NVFP4, NVFP4_AWQ, W4A16_NVFP4, MIXED_PRECISION"]),
        ({"quant_method": "modelopt", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "int"}}}}, ["no quant_algo", "int"]),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {}}}, ["given pack-quantized", "mxfp4-pack"]),
        ({"quant_method": "compressed-tensors", "format": "dense"}, ["given dense"]),
        ({"quant_method": "fp8"}, ["weight_block_size None", "[128, 128]"]),
    ],
)
def test_unsupported(said: dict, expected: list[str]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        describe_quantization({"quantization_config": said})
    for text in expected:
        assert text in str(caught.value)


def test_wrong_block_size() -> None:
    modelopt = {"quant_algo": "NVFP4", "group_size": 32}
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {GATE: {"quant_algo": "NVFP4", "group_size": 32}}}
    groups = {"quant_algo": "NVFP4", "config_groups": {"g": {"weights": {"group_size": 32}}}}
    for said in (modelopt, mixed, groups):
        with pytest.raises(CheckpointError, match=r"wrong block size for NVFP4 .given group_size 32; needed 16"):
            describe_quantization({}, {"quantization": said})
    compressed = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "config_groups": {"g": {"weights": {"group_size": 16}}}}
    with pytest.raises(CheckpointError, match=r"wrong block size for MXFP4 .given group_size 16; needed 32"):
        describe_quantization({"quantization_config": compressed})


def test_quark() -> None:
    fp4 = {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}}
    fp8 = {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}}
    config = {"quant_method": "quark", "exclude": ["lm_head", "re:.*gate$"], "layer_quant_config": {"*self_attn*": fp8}, "global_quant_config": fp4}
    q = describe_quantization({"quantization_config": config})
    assert q.kind == "quark" and q.dialect_of("model.layers.1.mlp.experts.0.up_proj").name == "quark"
    assert q.excluded("lm_head") and q.excluded("model.layers.1.mlp.gate")
    with pytest.raises(UnsupportedError, match=r"self_attn\.o_proj .*given fp8_e4m3 per_tensor"):
        q.dialect_of("model.layers.1.self_attn.o_proj")
    for changed, said in (
        (fp8, "fp8_e4m3 per_tensor"),
        ({"weight": {**fp4["weight"], "scale_format": "float"}}, "with float scales"),
        (None, "none"),
    ):
        with pytest.raises(UnsupportedError, match=f"unknown Quark format .*{said}"):
            describe_quantization({"quantization_config": {"quant_method": "quark", "global_quant_config": changed}})
    with pytest.raises(CheckpointError, match="group_size 16"):
        describe_quantization({"quantization_config": {**config, "global_quant_config": {"weight": {**fp4["weight"], "group_size": 16}}}})


def compressed(**values: object) -> dict:
    return {"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", **values}}


@pytest.mark.parametrize("ignored", [None, ["lm_head", "re:.*self_attn.*"]])
@pytest.mark.parametrize("groups", [None, {}])
def test_a_format_without_groups_is_that_of_every_linear(ignored: list | None, groups: dict | None) -> None:
    quantization = describe_quantization(compressed(ignore=ignored, config_groups=groups))
    assert quantization.dialect_of(GATE).format is NVFP4 and quantization.format is NVFP4
    assert quantization.excluded("model.layers.0.self_attn.q_proj") == quantization.excluded("lm_head") == bool(ignored)


@pytest.mark.parametrize("value", ["lm_head", 3, [3], [{}], {"a": 1}, [None]])
@pytest.mark.parametrize("key", ["ignore", "exclude_modules", "modules_to_not_convert"])
def test_lists_of_modules_are_lists_of_strings(key: str, value: object) -> None:
    said = {"quant_algo": "NVFP4", key: value}
    with pytest.raises(CheckpointError, match=rf"m/hf_quant_config\.json: quantization\.{key} does not fit"):
        describe_quantization({}, {"quantization": said}, where="m")
    with pytest.raises(CheckpointError, match=rf"config\.json: quantization_config\.{key} does not fit"):
        describe_quantization({"quantization_config": said})


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"quantization_config": [1]}, "quantization_config"),
        ({"quantization_config": "nvfp4"}, "quantization_config"),
        ({"text_config": [1]}, "text_config"),
        ({"text_config": {"quantization_config": [1]}}, "text_config.quantization_config"),
        ({"quantization_config": {"quant_method": 3}}, "quant_method"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": "128"}}, "weight_block_size"),
        (compressed(ignore="lm_head"), "ignore"),
        (compressed(config_groups=[1]), "config_groups"),
        (compressed(config_groups={"g": None}), "config_groups.g"),
        (compressed(config_groups={"g": "x"}), "config_groups.g"),
        (compressed(config_groups={"g": {"weights": "x"}}), "config_groups.g.weights"),
        (compressed(config_groups={"g": {"weights": {"group_size": "16"}}}), "config_groups.g.weights.group_size"),
        (compressed(config_groups={"g": {"targets": 3}}), "config_groups.g.targets"),
        (compressed(config_groups={"g": {"targets": [3]}}), "config_groups.g.targets"),
        ({"quantization_config": {"quant_algo": "MIXED_PRECISION", "quantized_layers": [1]}}, "quantized_layers"),
        ({"quantization_config": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": "NVFP4"}}}, "quantized_layers.a"),
        ({"quantization_config": {"quant_algo": "NVFP4", "group_size": True}}, "group_size"),
    ],
)
def test_errors_name_the_key(config: dict, key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: [\w.]*{key} does not fit"):
        describe_quantization(config)


@pytest.mark.parametrize("value", [[1], "x", None])
def test_hf_quant_config_is_objects(value: object) -> None:
    if value is None:
        with pytest.raises(UnsupportedError, match="unknown ModelOpt algorithm"):
            describe_quantization({}, {"quantization": value})
        return
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: quantization does not fit"):
        describe_quantization({}, {"quantization": value})


@pytest.mark.parametrize("method", ["compressed-tensors", "mxfp4", "quark"])
def test_two_files_name_one_method(method: str) -> None:
    said = {"quantization_config": {"quant_method": method, "format": "nvfp4-pack-quantized"}}
    with pytest.raises(
        CheckpointError, match=rf"^m: config\.json and hf_quant_config\.json name two .*{method}.* ModelOpt.*Remove what does not belong"
    ):
        describe_quantization(said, MODELOPT, where="m")


def test_what_modelopt_leaves_of_its_source_is_no_second_method() -> None:
    for said in ({}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, {"quant_method": "fp8", "expert_dtype": "fp4"}):
        assert describe_quantization({"quantization_config": said}, MODELOPT).kind == "modelopt"


def test_null_is_nothing() -> None:
    assert describe_quantization({"text_config": None, "quantization_config": None, "expert_dtype": None}).kind == "dense"


@pytest.mark.parametrize("pattern", ["re:(", "re:*["])
def test_a_pattern_that_is_none_is_refused_at_once(pattern: str) -> None:
    for config in (compressed(ignore=[pattern]), compressed(config_groups={"g": {"targets": [pattern]}})):
        with pytest.raises(CheckpointError, match=r"config\.json: a pattern cannot be matched"):
            describe_quantization(config)


def test_a_pattern_of_exponential_time_is_looked_up_at_once() -> None:
    quantization = describe_quantization(compressed(ignore=["re:(.+)+#", r"re:(\w+\.?)+!", "re:.*mlp.gate$"]))
    assert not quantization.excluded(GATE) and quantization.excluded("model.layers.1.mlp.gate")
