"""Models of a family that nobody described: what their tensors decide is used, what they do not decide is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import checkpoint_files as cf
import pytest
import torch
from helpers import assert_equal_bits

import halfbyte as hb
from halfbyte.checkpoint import Checkpoint, MoEConfig
from halfbyte.checkpoint.families import KNOWN_MODEL_TYPES, find_experts
from halfbyte.checkpoint.families.unknown import describe_unknown
from halfbyte.checkpoint.quantization import describe_quantization
from halfbyte.errors import CheckpointError, HalfbyteError, UnsupportedError
from halfbyte.experts import GEGLU_TANH, SWIGLU

PREFIX = "model.layers.1.mlp.experts"
QUANTIZATION_KEYS = ("quantization_config", "expert_dtype")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def novel(files: cf.Files, **config: object) -> cf.Files:
    """The same files with nothing in their configuration but the model_type, hidden_act and quantisation, and `config`."""
    kept = {key: files.config[key] for key in QUANTIZATION_KEYS if key in files.config}
    files.config = {"model_type": "novel_moe", "hidden_act": "silu", **kept, **config}
    return files


@pytest.mark.parametrize(
    ("make", "block"),
    [
        (cf.dense, "model.layers.{layer}.mlp"),
        (lambda: cf.dense(block="model.layers.1.feed_forward", names=cf.W_NAMES), "model.layers.{layer}.feed_forward"),
        (lambda: cf.dense(block="model.language_model.layers.1"), "model.language_model.layers.{layer}"),
        (lambda: cf.dense(stacked="rows"), "model.layers.{layer}.mlp"),
        (lambda: cf.dense(stacked="columns"), "model.layers.{layer}.mlp"),
        (lambda: cf.nvfp4("modelopt"), "model.layers.{layer}.mlp"),
        (lambda: cf.nvfp4("compressed-tensors"), "model.layers.{layer}.mlp"),
        (cf.compressed_tensors_mxfp4, "model.layers.{layer}.mlp"),
        (cf.deepseek_v4, "layers.{layer}.ffn"),
    ],
    ids=["dense", "w names", "on the layer", "stacked", "transposed", "modelopt", "nvfp4-pack", "mxfp4-pack", "deepseek-v4"],
)
def test_experts_are_read(make: Callable[[], cf.Files], block: str, tmp_path: Path) -> None:
    files = novel(make())
    checkpoint = Checkpoint.open(files.write(tmp_path))
    assert checkpoint.moe == MoEConfig("novel_moe", 2, (1,), cf.E, cf.H, cf.I, None, SWIGLU, block)
    weights = hb.load_experts(checkpoint, 1)
    assert weights.activation == SWIGLU
    assert_equal_bits(weights.dequantize().w13, files.w13)
    assert_equal_bits(weights.dequantize().w2, files.w2)


def test_shapes_go_before_the_configuration(tmp_path: Path) -> None:
    """Experts may work at another width than the model."""
    files = novel(cf.dense(), hidden_size=4 * cf.H, num_experts=cf.E, moe_intermediate_size=7, hidden_act="gelu_pytorch_tanh")
    moe = Checkpoint.open(files.write(tmp_path)).moe
    assert (moe.num_experts, moe.hidden, moe.intermediate, moe.activation) == (cf.E, cf.H, cf.I, GEGLU_TANH)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"])
@pytest.mark.parametrize("stacked", ["", "rows"])
def test_a_number_of_experts_that_the_files_do_not_have(key: str, stacked: str, tmp_path: Path) -> None:
    for value, needed in ((cf.E + 1, "3, as the files go as far as "), (cf.E - 1, "3, as the files"), ("3", "an integer")):
        checkpoint = Checkpoint.open(novel(cf.dense(stacked=stacked), **{key: value}).write(tmp_path))
        with pytest.raises(CheckpointError, match=f"{key} does not fit .*{needed}"):
            hb.load_experts(checkpoint, 1)
    assert Checkpoint.open(novel(cf.dense(stacked=stacked), **{key: [9, 9]}).write(tmp_path)).moe.num_experts == cf.E  # of several towers


def test_layers_behind_the_declared_number_are_heads() -> None:
    matrices = {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}
    shapes = {f"model.layers.{layer}.mlp.experts.0.{leaf}.weight": shape for layer in (1, 2, 3) for leaf, shape in matrices.items()}
    shapes |= {"model.layers.0.mlp.up_proj.weight": (64, 16), "mtp.layers.0.mlp.experts.0.up_proj.weight": (3, 3)}

    def layers(**config: object) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        moe = describe_unknown({"model_type": "novel_moe", **config}, find_experts(shapes), shapes, describe_quantization({}))
        return moe.num_layers, moe.moe_layers, moe.predicting_layers

    assert layers() == layers(num_hidden_layers=4) == layers(num_hidden_layers=9) == (4, (1, 2, 3), ())
    assert layers(num_hidden_layers=3) == (3, (1, 2), (3,))
    assert layers(num_hidden_layers=1) == (4, (1, 2, 3), ())  # does not fit these layers, so it counts something else


def test_gpt_oss_like_stacks_are_refused_by_name(tmp_path: Path) -> None:
    """Whether gate and up rows alternate is not in names and shapes: neither in blocks, nor dense with biases."""
    blocks, _, _ = cf.gpt_oss()
    dense = cf.dense(cf.GPT_OSS, stacked="alternating")
    dense.tensors[f"{PREFIX}.gate_up_proj_bias"] = torch.zeros(cf.E, 2 * cf.I)
    for name, files in (("gate_up_proj_blocks", novel(blocks)), ("gate_up_proj_bias", novel(dense))):
        path = files.write(tmp_path / name)
        with pytest.raises(UnsupportedError, match=rf"may alternate, .*: {PREFIX}\.{name} "):
            hb.load_experts(path, 1)


@pytest.mark.parametrize(
    ("config", "said"),
    [({"hidden_act": None}, "novel_moe"), ({"hidden_act": "tanh"}, "hidden_act does not tell"), ({"swiglu_limit": 7.0}, "no swiglu constants")],
)
def test_the_activation_is_not_guessed(config: dict, said: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(novel(cf.dense(), **config).write(tmp_path))
    assert checkpoint.moe.activation is None and checkpoint.moe.hidden == cf.H
    for load in (hb.load_experts, hb.load_prepared):
        with pytest.raises(UnsupportedError, match="activation unknown") as caught:
            load(checkpoint, 1)
        assert said in str(caught.value) and str(tmp_path) in str(caught.value)


def without(*endings: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(endings)]:
            del tensors[name]

    return change


def added(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], type[HalfbyteError], str]] = {
    "no gate": (without("gate_proj.weight"), UnsupportedError, r"lack a matrix: .*\.experts\.0\.gate_proj\.weight"),
    "no experts": (without("_proj.weight"), UnsupportedError, r"no experts that can be found by name .*'novel_moe'.*qwen2_moe"),
    "a hole": (
        without("experts.1.gate_proj.weight", "experts.1.up_proj.weight", "experts.1.down_proj.weight"),
        CheckpointError,
        r"given 0, 2, up to .*experts\.2\.",
    ),
    "a bias": (added(f"{PREFIX}.2.up_proj.bias", cf.I), UnsupportedError, rf"nothing explains .*given {PREFIX}\.2\.up_proj\.bias"),
    "a norm": (added(f"{PREFIX}.norm.weight", cf.H), UnsupportedError, rf"nothing explains .*given {PREFIX}\.norm\.weight"),
    "other shapes": (added(f"{PREFIX}.0.up_proj.weight", cf.I, cf.I), CheckpointError, r"do not belong together .*up_proj\.weight \(32, 32\)"),
    "two places": (
        added("audio.layers.0.mlp.experts.0.up_proj.weight", 1, 1),
        CheckpointError,
        r"audio\.layers\.0\.mlp\.experts\.0\.up_proj\.weight, model\.layers\.1\.mlp",
    ),
    "another layer": (
        lambda tensors: tensors.update(
            {name.replace("layers.1", "layers.0"): tensor.repeat(2, 2) for name, tensor in tensors.items() if ".experts." in name}
        ),
        UnsupportedError,
        r"layer 1 has experts of another number or size than layer 0 .*given .*\(3, 64, 32\), up to .*experts\.2.*; needed \(3, 128, 64\)",
    ),
}


@pytest.mark.parametrize(("change", "error", "said"), BROKEN.values(), ids=BROKEN)
def test_what_names_and_shapes_do_not_decide(change: Callable[[dict], None], error: type[HalfbyteError], said: str, tmp_path: Path) -> None:
    files = novel(cf.dense())
    change(files.tensors)
    checkpoint = Checkpoint.open(files.write(tmp_path))
    with pytest.raises(error, match=said):
        _ = checkpoint.moe


def test_stacked_tensors_that_do_not_belong_together(tmp_path: Path) -> None:
    files = novel(cf.dense(stacked="rows"))
    files.tensors[f"{PREFIX}.down_proj"] = torch.zeros(cf.E, cf.H, cf.H)
    with pytest.raises(CheckpointError, match="stacked experts do not belong together"):
        _ = Checkpoint.open(files.write(tmp_path)).moe


def test_only_the_router_is_refused(tmp_path: Path) -> None:
    """Experts are loaded and run; MoE, which would need the router, names the model_type and those it knows."""
    files = novel(cf.nvfp4("modelopt"))
    path = files.write(tmp_path)
    prepared = hb.load_prepared(path, 1)
    hidden, ids = torch.randn(4, cf.H, dtype=torch.bfloat16), torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]], dtype=torch.int32)
    assert hb.fused_moe(hidden, prepared, ids, torch.full((4, 2), 0.5)).isfinite().all()
    for refused in (hb.MoE.from_checkpoint, hb.load_router, lambda path, _: Checkpoint.open(path).moe.top_k):
        with pytest.raises(UnsupportedError, match="routing unknown") as caught:
            refused(path, 1)
        assert all(text in str(caught.value) for text in ("'novel_moe'", *KNOWN_MODEL_TYPES))
