"""Tiny models of six families and the demo model, loaded from FP4 files, against the stock model with the dequantised weights."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from devices import on_hopper
from helpers import assert_close_rel, assert_equal_bits, relative_errors
from safetensors.torch import load_file, save_file
from tiny_models import build, write
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils import is_compressed_tensors_available

import halfbyte
import halfbyte.integrations.transformers as hbt
from halfbyte.errors import CheckpointError, InputError, UnsupportedError
from halfbyte.experts import DEEPSEEK_V4_SWIGLU, GEGLU, GEGLU_TANH, GPT_OSS_SWIGLU, RELU2, SWIGLU
from halfbyte.integrations import packing
from halfbyte.integrations.transformers import undecorated
from halfbyte.integrations.transformers.conversion import for_current_stream
from halfbyte.integrations.transformers.modules import QuantLinear, find_activation

DEMO = Path(halfbyte.__file__).parent / "demo_model"
IDS = torch.arange(22).view(2, 11) * 7 % 128
# fp32 against fp32: only the order of sums differs.
EXACT = {"token": 1e-5, "overall": 1e-5}

transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Operators on tiny tensors spend their time waking threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """(FP4 directory, dense directory) of a family and output, written once."""
    written = {}

    def get(family: str, output: str, **options: object) -> tuple[Path, Path]:
        key = (family, output, *options.items())
        if key not in written:
            written[key] = write(build(family), output, tmp_path_factory.mktemp(family), **options)
        return written[key]

    return get


@pytest.fixture
def damaged(checkpoint: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint with its tensors and quantization_config edited."""

    def get(
        output: str, edit_tensors: Callable = lambda tensors: None, edit_config: Callable = lambda config: None, family: str = "qwen3_moe"
    ) -> Path:
        source = checkpoint(family, output, all_linear=family != "gpt_oss")[0]
        tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
        edit_tensors(tensors)
        edit_config(config["quantization_config"])
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return get


def load(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float().flatten(0, 1)


def packed_experts(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if hasattr(module, "halfbyte")]


@pytest.mark.parametrize(
    ("family", "output"),
    [
        ("qwen3_moe", "modelopt"),
        ("qwen3_moe", "nvfp4-pack-quantized"),
        ("qwen3_moe", "mxfp4-pack-quantized"),
        ("mixtral", "modelopt"),
        ("mixtral", "nvfp4-pack-quantized"),
        ("deepseek_v3", "modelopt"),
        ("glm4_moe", "nvfp4-pack-quantized"),
        ("qwen3_next", "modelopt"),
        ("qwen3_next", "mxfp4-pack-quantized"),
        ("gpt_oss", "gpt-oss"),
    ],
)
def test_logits_equal_those_of_the_dequantised_model(checkpoint, family: str, output: str) -> None:
    fp4, dense = checkpoint(family, output, all_linear=family != "gpt_oss")
    model, expected = load(fp4), load(dense)
    assert_close_rel(logits(model), logits(expected), **EXACT)
    experts = packed_experts(model)
    assert len(experts) == (1 if family in ("deepseek_v3", "glm4_moe") else 2)  # the first layer of those two is dense
    assert any(isinstance(module, QuantLinear) for module in model.modules()) == (family != "gpt_oss")
    for module in experts:
        weights = {name: parameter for name, parameter in module.named_parameters() if not name.endswith("_bias")}
        assert {parameter.dtype for parameter in weights.values()} <= {torch.uint8, torch.float8_e4m3fn, torch.float32}
        elements = 3 * module.num_experts * module.down_proj.shape[1] * module.down_proj.shape[2] * 2
        scalars = sum(parameter.numel() for parameter in weights.values() if parameter.dtype == torch.float32)
        assert scalars <= 6 * module.num_experts
        assert sum(parameter.nbytes for parameter in weights.values()) == elements * module.halfbyte.format.bits_per_weight / 8 + 4 * scalars
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("family", "output"), [("qwen3_moe", "modelopt"), ("mixtral", "nvfp4-pack-quantized"), ("gpt_oss", "gpt-oss")])
def test_bf16_is_as_near_to_fp32_as_the_stock_model(checkpoint, family: str, output: str) -> None:
    fp4, dense = checkpoint(family, output, all_linear=family != "gpt_oss")
    exact = logits(load(dense))
    model = load(fp4, torch.bfloat16)
    assert {parameter.dtype for name, parameter in model.named_parameters() if "norm" in name or "gate.weight" in name} == {torch.bfloat16}
    ours, stock = (relative_errors(logits(other), exact)[1] for other in (model, load(dense, torch.bfloat16)))
    assert 0 < ours <= 1.25 * stock, f"{ours:.2e} against {stock:.2e}"


@pytest.mark.parametrize("output", ["modelopt", "nvfp4-pack-quantized"])
def test_gate_and_up_keep_their_own_global_scales(checkpoint, output: str) -> None:
    fp4, dense = checkpoint("qwen3_moe", output, all_linear=True)
    model, expected = load(fp4), logits(load(dense))
    for module in packed_experts(model):
        gate, up = module.gate_up_proj_scale_2.unbind(-1)
        assert (up / gate > 2).all()
        module.gate_up_proj_scale_2[:, 1] = gate  # what engines that keep one scalar do
    with pytest.raises(AssertionError):
        assert_close_rel(logits(model), expected, token=0.1, overall=0.1)


def test_input_scales_are_decode_multipliers_of_every_expert(checkpoint) -> None:
    for output in ("modelopt", "nvfp4-pack-quantized"):  # the files hold 0.01 and 1 / 0.01
        for module in packed_experts(load(checkpoint("qwen3_moe", output, all_linear=True)[0])):
            torch.testing.assert_close(module.gate_up_proj_input_scale.data, torch.full((8, 2), 0.01))
            torch.testing.assert_close(module.down_proj_input_scale.data, torch.full((8,), 0.01))
    without = load(checkpoint("qwen3_moe", "modelopt", input_scales=False)[0])
    assert not any(name.endswith("input_scale") for name, _ in without.named_parameters())


def test_layers_left_dense_run_beside_packed_ones(checkpoint) -> None:
    fp4, dense = checkpoint("qwen3_moe", "nvfp4-pack-quantized", kept=r"layers\.0\.")
    model = load(fp4)
    assert len(packed_experts(model)) == 1
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.float32
    assert_close_rel(logits(model), logits(load(dense)), **EXACT)


def test_generate(checkpoint) -> None:
    for family, output in (("qwen3_moe", "modelopt"), ("gpt_oss", "gpt-oss")):
        fp4, dense = checkpoint(family, output, all_linear=family != "gpt_oss")
        ours, expected = (load(path).generate(IDS, max_new_tokens=8, do_sample=False, pad_token_id=0) for path in (fp4, dense))
        assert torch.equal(ours, expected)


def test_set_activations(checkpoint) -> None:
    model = load(checkpoint("qwen3_moe", "modelopt", all_linear=True)[0])
    experts = packed_experts(model)[0]
    hidden, ids = torch.randn(16, 64), torch.randint(0, 8, (16, 2))
    plain = experts(hidden, ids, torch.full((16, 2), 0.5))
    for activations, least, most in (("fp8", 0.01, 0.08), ("mxfp8", 0.01, 0.08), ("nvfp4", 0.08, 0.3)):
        hbt.set_activations(model, activations)
        assert least < relative_errors(experts(hidden, ids, torch.full((16, 2), 0.5)), plain)[1] < most, activations
    hbt.set_activations(model, "bf16")
    assert torch.equal(experts(hidden, ids, torch.full((16, 2), 0.5)), plain)
    with pytest.raises(InputError, match="int4"):
        hbt.set_activations(model, "int4")


def test_activations_of_a_dense_model_are_refused() -> None:
    """Nothing would quantise them, and every measurement would be that of bf16."""
    with pytest.raises(InputError, match="no packed experts"):
        hbt.load(DEMO, activations="nvfp4")
    hbt.load(DEMO, activations="bf16")


def test_prepared_experts_follow_their_tensors(checkpoint) -> None:
    fp4, dense = checkpoint("qwen3_moe", "modelopt", all_linear=True)
    model, expected = load(fp4), logits(load(dense))
    logits(model)
    for module in packed_experts(model):
        moved = module.down_proj.data.clone()
        module.down_proj.data.zero_()
        assert relative_errors(logits(model), expected)[1] > 0.01  # the old storage is in use
        module.down_proj.data = moved
    assert_close_rel(logits(model), expected, **EXACT)


@pytest.mark.parametrize(("family", "output"), [("qwen3_moe", "modelopt"), ("qwen3_moe", "mxfp4-pack-quantized"), ("gpt_oss", "gpt-oss")])
def test_experts_packed_in_place_are_saved_reloaded_and_restored(checkpoint, family: str, output: str) -> None:
    """Packed by hand: no kernel reads the layout on a CPU, so that a call brings the canonical tensors back."""
    fp4, dense = checkpoint(family, output, all_linear=family != "gpt_oss")
    model, expected = load(fp4), logits(load(dense))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def pack_all() -> None:
        for module in packed_experts(model):
            packing.pack_in_place(module, "hopper")
            assert not any(name in dict(module.named_parameters()) for name in ("gate_up_proj", "down_proj", "down_proj_scale"))
            assert module.halfbyte.prepared.layout == "hopper" and module.packed_w2_words.dtype == torch.int32

    def assert_same_state() -> None:
        after = model.state_dict()
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            assert_equal_bits(torch.atleast_1d(after[name]), torch.atleast_1d(tensor))

    pack_all()
    assert_same_state()
    assert_close_rel(logits(model), expected, **EXACT)  # on a CPU, from restored tensors
    assert all(module.down_proj.dtype == torch.uint8 and not module.halfbyte.replaced for module in packed_experts(model))
    assert_same_state()
    pack_all()
    moved = copy.deepcopy(model).to("cpu")
    assert_close_rel(logits(moved), expected, **EXACT)
    zeroed = {
        name: torch.zeros_like(tensor) if "experts.down_proj" in name and tensor.dtype == torch.uint8 else tensor for name, tensor in before.items()
    }
    model.load_state_dict(zeroed)
    assert relative_errors(logits(model), expected)[1] > 0.01
    pack_all()
    model.load_state_dict(before)
    assert_close_rel(logits(model), expected, **EXACT)
    pack_all()
    hbt.set_layout(model, "canonical")
    assert_same_state()
    pack_all()
    for module in packed_experts(model):
        module.half()
    with pytest.raises(UnsupportedError, match="packed experts cannot be cast"):
        logits(model)
    with pytest.raises(InputError, match="hopper"):
        hbt.set_layout(model, "hopper")


def test_experts_are_packed_for_the_activations_they_see(checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:

    model = load(checkpoint("qwen3_moe", "modelopt", all_linear=True)[0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(packing, "_wanted_layout", lambda device, format, activations: "hopper_fp8" if activations == "fp8" else "hopper")
    for activations, layout in (("bf16", "hopper"), ("fp8", "hopper_fp8"), ("nvfp4", "hopper")):
        hbt.set_activations(model, activations)
        for module in packed_experts(model):
            assert packing.prepared_experts(module).layout == layout
            assert packing.prepared_experts(module) is module.halfbyte.prepared
        for name, tensor in model.state_dict().items():
            assert_equal_bits(torch.atleast_1d(tensor), torch.atleast_1d(before[name]))


@on_hopper
@pytest.mark.parametrize(("family", "output"), [("qwen3_moe", "modelopt"), ("qwen3_moe", "mxfp4-pack-quantized"), ("gpt_oss", "gpt-oss")])
def test_models_on_hopper_run_its_layout(checkpoint, family: str, output: str) -> None:
    fp4, dense = checkpoint(family, output, all_linear=family != "gpt_oss")
    model, expected = load(fp4, torch.bfloat16), logits(load(dense))
    limit = 2 * relative_errors(logits(model), expected)[1]  # bf16 alone moves the logits of tiny gpt-oss by 7 %: it routes some tokens otherwise
    assert limit < 0.2
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def on_gpu() -> torch.Tensor:
        with torch.no_grad():
            return model(IDS.cuda()).logits.float().flatten(0, 1).cpu()

    model.cuda()
    packed = on_gpu()
    assert all(module.halfbyte.prepared.layout == "hopper" for module in packed_experts(model))
    assert torch.equal(on_gpu(), packed)
    for name, tensor in model.state_dict().items():
        assert_equal_bits(torch.atleast_1d(tensor.cpu()), torch.atleast_1d(before[name]))
    hbt.set_layout(model, "canonical")
    canonical = on_gpu()
    assert all(module.halfbyte.prepared.layout == "canonical" for module in packed_experts(model))
    assert relative_errors(packed, canonical)[1] < limit and relative_errors(packed, expected)[1] < limit
    hbt.set_layout(model, "auto")
    assert torch.equal(on_gpu(), packed)
    model.cpu()
    assert relative_errors(logits(model), expected)[1] < limit
    assert all(module.halfbyte.prepared.layout == "canonical" for module in packed_experts(model))


@on_hopper
def test_loading_while_another_stream_is_current(checkpoint) -> None:
    fp4, dense = checkpoint("qwen3_moe", "modelopt", all_linear=True)
    for path in (fp4, dense):
        expected = load(path).state_dict()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(10**8)
            found = hbt.load(path, dtype=torch.float32, device="cuda")[0].state_dict()
            for name, tensor in found.items():
                assert_equal_bits(torch.atleast_1d(tensor.cpu()), torch.atleast_1d(expected[name]))


@on_hopper
def test_memory_of_a_loader_thread_is_not_given_away_too_early() -> None:
    def made_in_a_thread(value: int) -> torch.Tensor:
        return thread.submit(torch.full, (1 << 20,), value, dtype=torch.uint8, device="cuda").result()

    with ThreadPoolExecutor(1) as thread, torch.cuda.stream(torch.cuda.Stream()):
        arrived = for_current_stream(made_in_a_thread(7))
        torch.cuda._sleep(10**8)
        used = arrived.clone()
        del arrived
        made_in_a_thread(9)
        assert (used == 7).all()


def test_a_gradient_is_refused(checkpoint) -> None:
    model = load(checkpoint("qwen3_moe", "modelopt", all_linear=True)[0])
    model(IDS)
    model.model.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(UnsupportedError, match="no backward"):
        model(IDS)


@pytest.mark.parametrize(
    ("output", "name"),
    [
        ("modelopt", "model.layers.1.mlp.experts.3.up_proj.weight_scale_2"),
        ("modelopt", "model.layers.1.mlp.experts.3.down_proj.weight_scale"),
        ("modelopt", "model.layers.0.self_attn.q_proj.weight_scale_2"),
        ("nvfp4-pack-quantized", "model.layers.1.mlp.experts.0.gate_proj.weight_global_scale"),
        ("mxfp4-pack-quantized", "model.layers.1.mlp.experts.0.gate_proj.weight_scale"),
        ("gpt-oss", "model.layers.0.mlp.experts.gate_up_proj_scales"),
    ],
)
def test_a_missing_scale_is_an_error(damaged, output: str, name: str) -> None:
    directory = damaged(output, lambda tensors: tensors.pop(name), family="gpt_oss" if output == "gpt-oss" else "qwen3_moe")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load(directory)


def test_missing_experts_and_bad_values_are_errors(damaged) -> None:
    stem = "model.layers.1.mlp.experts.3.up_proj."
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.gate_up_proj.*15 packed tensors"):
        load(damaged("modelopt", lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(stem)]))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.3\.up_proj\.weight_scale_2.*not a positive finite"):
        load(damaged("modelopt", lambda tensors: tensors[f"{stem}weight_scale_2"].fill_(float("nan"))))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_scale.*float32"):
        load(damaged("modelopt", lambda tensors: tensors.update({f"{stem}weight_scale": tensors[f"{stem}weight_scale"].float()})))


def test_layers_in_another_format_are_refused(damaged) -> None:
    def make_fp8(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 64, dtype=torch.float8_e4m3fn)

    with pytest.raises(UnsupportedError, match=r"q_proj\.weight_scale.*another format"):
        load(damaged("modelopt", make_fp8))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"quant_algo": "W4A8_AWQ"}, UnsupportedError, "W4A8_AWQ"),
        ({"group_size": 32}, CheckpointError, "block size"),
    ],
)
def test_a_bad_config_is_a_clear_error(damaged, change: dict, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        load(damaged("modelopt", edit_config=lambda config: config.update(change)))


def test_both_modelopt_config_forms(damaged) -> None:
    def group_form(config: dict) -> None:
        del config["quant_algo"], config["group_size"]
        config["config_groups"] = {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}}

    def nested_form(config: dict) -> None:
        config["quantization"] = {"quant_algo": config.pop("quant_algo"), "group_size": 16, "exclude_modules": config.pop("ignore")}

    for form in (group_form, nested_form):
        assert len(packed_experts(load(damaged("modelopt", edit_config=form)))) == 2


def test_experts_that_transformers_does_not_dispatch_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless halfbyte knows their class."""
    monkeypatch.setattr(undecorated, "_FORWARDS", {})
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "intermediate_size_mlp": 32,
        "num_hidden_layers": 1,
        "num_local_experts": 2,
        "vocab_size": 64,
    }
    config = AutoConfig.for_model("llama4_text", **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config.quantization_config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    config.save_pretrained(tmp_path)
    stem = "model.layers.0.feed_forward.experts.0.gate_proj."
    q = halfbyte.quantize(torch.randn(32, 64), halfbyte.NVFP4)
    save_file({f"{stem}weight": q.codes, f"{stem}weight_scale": q.scales, f"{stem}weight_scale_2": q.global_scale}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"experts\.0\.gate_proj.*Llama4.*no place"):
        load(tmp_path)


def test_other_formats_stay_with_transformers(checkpoint) -> None:
    from_dict = AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"].from_dict
    other = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
    if is_compressed_tensors_available():
        assert type(from_dict(other)).__name__ == "CompressedTensorsConfig" and type(from_dict(other)).__module__.startswith("transformers.")
    else:
        with pytest.raises(ImportError, match="compressed-tensors"):
            from_dict(other)
    fp4, _ = checkpoint("gpt_oss", "gpt-oss", all_linear=False)
    dense = AutoModelForCausalLM.from_pretrained(fp4, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True))
    assert not packed_experts(dense) and dense.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    # transformers' own dequantiser is an independent reading of the same file.
    ours = load(fp4, torch.bfloat16)
    assert relative_errors(logits(ours), logits(dense))[1] < 0.03


def test_without_transformers_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "halfbyte.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'halfbyte\[hf\]'"):
        importlib.import_module("halfbyte.integrations.transformers")


def test_registering_again_changes_nothing() -> None:
    before = dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
    hbt.register()
    assert before == (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)


def experts_like(act: Callable, gate: Callable | None = None, **attributes: object) -> SimpleNamespace:
    """What `find_activation` looks at of an Experts module."""

    def apply_gate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return gate(first, second) if gate else act(first) * second

    return SimpleNamespace(**{"has_gate": True, "is_concatenated": True, "act_fn": act, "_apply_gate": apply_gate} | attributes)


@pytest.mark.parametrize(
    ("module", "activation"),
    [
        (experts_like(F.silu), SWIGLU),
        (experts_like(F.gelu), GEGLU),
        (experts_like(lambda x: F.gelu(x, approximate="tanh")), GEGLU_TANH),
        (experts_like(lambda x: x.relu().square(), has_gate=False), RELU2),
        (experts_like(F.silu, lambda g, u: F.silu(g.clamp(max=10)) * u.clamp(-10, 10), limit=10), DEEPSEEK_V4_SWIGLU),
        (
            experts_like(
                F.silu,
                lambda g, u: (u.clamp(-7, 7) + 1) * g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7)),
                swiglu_limit=7.0,
                swiglu_alpha=1.702,
            ),
            GPT_OSS_SWIGLU,
        ),
        (experts_like(F.silu, lambda g, u: F.silu(g).clamp(max=7) * u.clamp(-7, 7), limit=7), None),  # clamps after the function
        (experts_like(F.relu), None),
    ],
)
def test_activation_is_found_by_its_values(module: SimpleNamespace, activation: object) -> None:
    if activation is None:
        with pytest.raises(UnsupportedError, match="activation"):
            find_activation(module, "here")
    else:
        assert find_activation(module, "here") == activation


def test_demo_model_from_hf_quant_config_only(tmp_path: Path) -> None:
    dense_model, tokenizer = hbt.load(DEMO, dtype=torch.float32)
    fp4, dense = write(dense_model, "modelopt", tmp_path)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, fp4)
    config = json.loads((fp4 / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (fp4 / "config.json").write_text(json.dumps(config))
    (fp4 / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "exclude_modules": quantization["ignore"]}}))
    model, tokenizer = hbt.load(fp4, dtype=torch.float32)
    ids = tokenizer("Tom has 3 apples and buys 4 more. How many apples does he have?", return_tensors="pt").input_ids
    with torch.no_grad():
        ours, expected, unquantised = (other(ids).logits[0] for other in (model, load(dense), dense_model))
    assert_close_rel(ours, expected, **EXACT)
    assert 0.01 < relative_errors(ours, unquantised)[1] < 0.3  # NVFP4 is not the original, but near


def test_arguments_that_are_something_else_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    right: dict[Callable[..., object], dict[str, object]] = {
        hbt.load: {"model": DEMO, "dtype": "auto", "device": "cpu", "activations": "bf16"},
        hbt.set_activations: {"model": module, "activations": "bf16"},
        hbt.set_layout: {"model": module, "layout": "auto"},
        hbt.set_parallel: {"model": module, "parallel": None},
    }
    taken = []
    for function, arguments in right.items():
        for name in arguments:
            for value in (None, -1, 1.5, "nonsense", [], {}, torch.int8, torch.zeros(2), torch.device("meta"), object()):
                try:
                    function(**(arguments | {name: value}))
                except halfbyte.HalfbyteError as error:
                    assert len(str(error).splitlines()) == 1
                else:
                    taken.append(f"{name} of {function.__name__}: {value!r}")
    assert not taken
    with pytest.raises(CheckpointError, match=r"config\.json: missing file"):
        hbt.load(tmp_path)
