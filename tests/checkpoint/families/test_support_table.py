"""Each family in three formats: experts as the file means them, the plug-in's model and `MoE` as transformers' own; the table of docs/families.md.

The dense model is transformers', with shared experts of value 0, so that what is left of its MoE block is what `MoE` computes. Its experts are
quantised in the layout in which transformers saves them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_errors
from safetensors.torch import load_file, save_file

import halfbyte as hb
import halfbyte.integrations.transformers
from halfbyte.checkpoint.families import KNOWN_MODEL_TYPES
from halfbyte.errors import HalfbyteError

transformers = pytest.importorskip("transformers")

step3p7 = pytest.importorskip("transformers.models.step3p7.modeling_step3p7")

DOCS = Path(__file__).parents[3] / "docs" / "families.md"
E, H, I = 4, 96, 32  # noqa: E741
COMMON = {"hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}
COMMON |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2}
SIZES = {"intermediate_size": 3 * I, "moe_intermediate_size": I}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
INDEXER = {**MLA, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 4}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
SHARED = {"shared_expert_intermediate_size": I}
DEEPSEEK = {**SIZES, "n_routed_experts": E, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
MAMBA = {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 16}
NEMOTRON = {**DEEPSEEK, **MAMBA, "n_group": 1, "layers_block_type": ["attention", "moe"], "moe_shared_expert_intermediate_size": I}
NEMOTRON.pop("first_k_dense_replace")
MODELS: dict[str, dict[str, object]] = {
    "qwen2_moe": {**SIZES, **SHARED, "num_experts": E},
    "qwen3_moe": {**SIZES, "num_experts": E},
    "qwen3_next": {**SIZES, **SHARED, **DELTA, "num_experts": E},
    "qwen3_5_moe_text": {**SIZES, **SHARED, **DELTA, "num_experts": E},
    "qwen3_vl_moe_text": {**SIZES, "num_experts": E},
    "mixtral": {"intermediate_size": I, "num_local_experts": E},
    "deepseek_v2": {**DEEPSEEK, **MLA, "n_group": 1, "routed_scaling_factor": 1.5},
    "deepseek_v3": {**DEEPSEEK, **MLA},
    "deepseek_v32": {**DEEPSEEK, **INDEXER},
    "deepseek_v4": {**DEEPSEEK, "num_key_value_heads": 1, "mlp_layer_types": ["hash_moe", "moe"]},
    "glm4_moe": DEEPSEEK,
    "glm4_moe_lite": {**DEEPSEEK, **MLA, **SPARSE},
    "glm_moe_dsa": {**DEEPSEEK, **INDEXER, **SPARSE},
    "kimi_linear": {**SIZES, **MLA, "num_experts": E, "num_experts_per_token": 2, **SPARSE, "linear_head_dim": 16, "linear_num_heads": 4},
    "minimax": {"intermediate_size": I, "num_local_experts": E},
    "minimax_m2": {"intermediate_size": I, "num_local_experts": E},
    "minimax_m3_vl_text": {"intermediate_size": I, "num_local_experts": E, "dense_intermediate_size": 96, "shared_intermediate_size": I},
    "gpt_oss": {"intermediate_size": I, "num_local_experts": E},
    "llama4_text": {"intermediate_size": I, "intermediate_size_mlp": 96, "num_local_experts": E, "num_experts_per_tok": 1},
    "olmoe": {"intermediate_size": I, "num_experts": E, "head_dim": H // 4},
    "flex_olmo": {"intermediate_size": I, "num_experts": E},
    "phimoe": {"intermediate_size": I, "num_local_experts": E},
    "jamba": {"intermediate_size": I, "num_experts": E, "attn_layer_offset": 0, "attn_layer_period": 1, "use_mamba_kernels": False},
    "granitemoe": {"intermediate_size": I, "num_local_experts": E},
    "granitemoehybrid": {
        "intermediate_size": I,
        "num_local_experts": E,
        "shared_intermediate_size": I,
        "layer_types": ["full_attention"] * 2,
        "mamba_n_heads": 12,
        "mamba_d_head": 16,
    },
    "nemotron_h": NEMOTRON,
    "hunyuan_v1_moe": {"intermediate_size": I, "num_experts": E, "moe_topk": 2},
    "hy_v3": {**SIZES, "num_experts": E, "num_shared_experts": 1, **SPARSE},
    "ernie4_5_moe": {**SIZES, "moe_num_experts": E, "moe_k": 2, "moe_num_shared_experts": 1},
    "dots1": {**DEEPSEEK, "norm_topk_prob": True},
    "lfm2_moe": {**SIZES, "num_experts": E, "num_dense_layers": 1, "layer_types": ["full_attention"] * 2},
    "afmoe": {**SIZES, "num_experts": E, "num_dense_layers": 1, "num_shared_experts": 1, "route_scale": 1.5},
    "bailing_hybrid": {**SIZES, **MLA, "num_experts": E, "num_expert_group": 2, "topk_group": 1, "num_experts_per_token": 2, **SPARSE},
    "exaone_moe": {**SIZES, "num_experts": E, **SPARSE},
    "cohere2_moe": {"intermediate_size": I, "num_experts": E},
    "solar_open": {**DEEPSEEK, "first_k_dense_replace": 0},
    "mimo_v2_flash": {**DEEPSEEK, **SPARSE},
    "laguna": {**SIZES, **SHARED, "num_experts": E, "moe_routed_scaling_factor": 1.5, **SPARSE},
    "mistral4": {**DEEPSEEK, **MLA, "head_dim": 32, "n_group": 1, "first_k_dense_replace": 0},
    "mistral_large4_text": {**DEEPSEEK, **INDEXER, "n_group": 1, **SPARSE},
    "gemma4_text": {**SIZES, "enable_moe_block": True, "num_experts": E, "top_k_experts": 2, "layer_types": ["full_attention"] * 2}
    | {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16},
    "step3p5": {**SIZES, "n_routed_experts": E, "share_expert_dim": I, "sliding_window": 8, "moe_router_scaling_factor": 1.5, **SPARSE},
    "longcat_flash": {**MLA, "expert_ffn_hidden_size": I, "ffn_hidden_size": 96, "moe_topk": 2, "n_routed_experts": E, "zero_expert_num": 2},
    "dbrx": {"d_model": H, "n_heads": 4, "n_layers": 2},
}
EXPERT = re.compile(r"(\.experts\.\d+\.\w+\.weight|\.experts\.(gate_up_proj|up_proj|down_proj)|block_sparse_moe\.(in|out)put_linear\.weight|"
                    r"\.moe\.(gate|up|down)_proj\.weight|\.experts\.mlp\.\w+)$")  # fmt: skip
COLUMNS = ("ModelOpt NVFP4", "compressed-tensors NVFP4", "MXFP4")


@cache
def model_of(model_type: str) -> torch.nn.Module:
    torch.manual_seed(0)
    fields = {**COMMON, **MODELS[model_type]}
    if model_type == "dbrx":
        fields["ffn_config"] = {"hidden_size": H, "ffn_hidden_size": I, "moe_num_experts": E, "moe_top_k": 2}
        fields["attn_config"] = {"kv_n_heads": 2, "rope_theta": 1e4}
    config = transformers.CONFIG_MAPPING[model_type](**fields)
    if model_type == "step3p5":
        model = step3p7.Step3p7TextModel(config).eval()
    else:
        has_head = type(config) in transformers.AutoModelForCausalLM._model_mapping
        model = (transformers.AutoModelForCausalLM if has_head else transformers.AutoModel).from_config(config, dtype=torch.float32).eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and "rotary" not in name and tensor.ndim:
            tensor.data = torch.zeros_like(tensor) if "shared" in name and "down" in name else (torch.randn_like(tensor) * 0.3).bfloat16().float()
    return model


def block_of(model: torch.nn.Module) -> tuple[int, torch.nn.Module]:
    """The last layer with experts, and its MoE module (Gemma 4: the layer)."""
    name, block = [(name, module) for name, module in model.named_modules() if hasattr(module, "experts")][-1]
    return int(re.search(r"(?:layers|blocks)\.(\d+)", name)[1]), block


def is_transposed(name: str, model_type: str) -> bool:
    """Whether transformers stores [K, N]."""
    return model_type in ("gpt_oss", "llama4_text") or (model_type == "dbrx" and name.endswith("w2"))


def quantised(tensors: dict[str, torch.Tensor], config: dict, column: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """Tensors of the FP4 checkpoint, the dense values they stand for (under the names of the source), and its quantization_config."""
    model_type = config["model_type"]
    own_mxfp4 = column == "MXFP4" and model_type == "gpt_oss"
    packed, dense = {}, {}
    for name, tensor in tensors.items():
        if not EXPERT.search(name):
            packed[name] = dense[name] = tensor
            continue
        if (number := re.search(r"\.experts\.(\d+)\.", name)) and int(number[1]) >= E:
            dense[name] = tensor  # one of LongCat's zero experts, which published files do not have
            continue
        stem = name.removesuffix(".weight")
        dot = "." if stem != name else "_"
        matrices = tensor.unflatten(0, (E, I)) if model_type == "dbrx" else tensor
        transposed = is_transposed(name, model_type)
        q = hb.quantize((matrices.mT if transposed else matrices).contiguous(), hb.MXFP4 if column == "MXFP4" else hb.NVFP4)
        dense[name] = (q.dequantize().mT if transposed else q.dequantize()).reshape(tensor.shape)
        codes, scales = q.codes, q.scales
        if transposed and model_type != "gpt_oss":  # which is published with packed rows
            codes, scales = codes.mT, scales.mT
        if model_type == "dbrx":
            codes, scales = codes.flatten(0, 1), scales.flatten(0, 1)
        if own_mxfp4:
            packed |= {f"{stem}_blocks": codes.unflatten(-1, (-1, 16)), f"{stem}_scales": scales}
        elif column == "ModelOpt NVFP4":
            packed |= {name: codes, f"{stem}{dot}weight_scale": scales, f"{stem}{dot}weight_scale_2": q.global_scale}
        else:
            prefix = "weight_" if dot == "." else ""
            packed |= {f"{stem}{dot}{prefix}packed": codes, f"{stem}{dot}{prefix}scale": scales}
            if q.global_scale is not None:
                packed[f"{stem}{dot}{prefix}global_scale"] = 1 / q.global_scale.reshape(-1, 1)
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 32 if column == "MXFP4" else 16}}
    if own_mxfp4:
        return packed, dense, {"quant_method": "mxfp4"}
    if column == "ModelOpt NVFP4":
        return packed, dense, {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": ["lm_head"]}
    format = "mxfp4-pack-quantized" if column == "MXFP4" else "nvfp4-pack-quantized"
    return packed, dense, {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def cell(function: Callable[..., None], *arguments: object) -> str:
    """What a cell says: "yes", or the reason of a refusal. Anything else is an error."""
    try:
        function(*arguments)
    except HalfbyteError as error:
        return re.sub(r" \(given.*$", "", str(error), flags=re.DOTALL).rpartition(": ")[2]
    return "yes"


def examine(model_type: str, folder: Path) -> Iterator[tuple[str, str, str]]:
    """(library, plug-in, `MoE`) of every format."""
    model = model_of(model_type)
    model.save_pretrained(folder / "source")
    source, config = load_file(folder / "source" / "model.safetensors"), json.loads((folder / "source" / "config.json").read_text())
    references: dict[str, torch.nn.Module] = {}
    for column in COLUMNS:
        packed, dense, quantization = quantised(source, config, column)
        path = write(folder / column, packed, {**config, "quantization_config": quantization})
        format = column.split()[-1]
        if format not in references:  # the same values in both forms of NVFP4
            plain = write(folder / f"dense {format}", dense, config)
            reference, info = type(model).from_pretrained(plain, dtype=torch.float32, experts_implementation="eager", output_loading_info=True)
            assert not info["missing_keys"]
            references[format] = reference.eval()
        layer, block = block_of(reference := references[format])
        library, moe = cell(check_experts, path, layer, block.experts, model_type), cell(check_moe, path, layer, block)
        yield library, cell(check_plugin, path, reference), moe


def check_experts(path: Path, layer: int, experts: Any, model_type: str) -> None:
    if model_type == "dbrx":
        w13, w2 = torch.cat([getattr(experts.mlp, name).view(E, I, H) for name in ("w1", "v1")], dim=1), experts.mlp.w2.view(E, I, H).mT
    else:
        w13, w2 = getattr(experts, "gate_up_proj", getattr(experts, "up_proj", None)), experts.down_proj
    if model_type in ("gpt_oss", "llama4_text"):
        w13, w2 = w13.mT, w2.mT
    if model_type == "gpt_oss":
        w13 = torch.cat([w13[:, ::2], w13[:, 1::2]], dim=1)
    weights = hb.load_experts(path, layer).dequantize()
    for actual, expected in ((weights.w13, w13[:E]), (weights.w2, w2)):  # LongCat's zero experts have rows of w13
        assert relative_errors(actual.flatten(0, 1), expected.flatten(0, 1))[1] < 1e-6


@torch.no_grad()
def check_moe(path: Path, layer: int, block: torch.nn.Module) -> None:
    module, hidden = hb.MoE.from_checkpoint(path, layer), torch.randn(20, H)
    expected = block(hidden[None])
    expected = (expected[0] if isinstance(expected, tuple) else expected)[0]
    assert relative_errors(module(hidden), expected)[1] < 1e-4


@torch.no_grad()
def check_plugin(path: Path, reference: torch.nn.Module) -> None:
    """The whole model, as `from_pretrained` makes it of the FP4 files, computes what the dense one does."""
    model = type(reference).from_pretrained(path, dtype=torch.float32).eval()
    assert any(tensor.dtype == torch.uint8 for tensor in model.state_dict().values())
    ids = torch.arange(12)[None] * 5 % 64
    actual, expected = (of(ids, use_cache=False)[0][0] for of in (model, reference))
    assert relative_errors(actual, expected)[1] < 1e-4


def row(model_type: str, cells: list[tuple[str, str, str]]) -> str:
    library, plugin, moe = ([of[i] for of in cells] for i in range(3))
    assert len(set(moe)) == 1, moe  # the router does not depend on the format
    plugin = [text if text == "yes" or index == plugin.index(text) else "the same" for index, text in enumerate(plugin)]
    return f"| {model_type} | {' | '.join((*library, *plugin))} | {moe[0]} |"


@pytest.mark.parametrize("model_type", MODELS)
def test_table(model_type: str, tmp_path: Path) -> None:
    """Set HALFBYTE_WRITE_TABLE to a file to append the row that is found."""
    found = row(model_type, list(examine(model_type, tmp_path)))
    if target := os.environ.get("HALFBYTE_WRITE_TABLE"):
        with Path(target).open("a") as file:
            file.write(found + "\n")
    assert found in DOCS.read_text().splitlines()


def test_the_table_has_nothing_else() -> None:
    table = DOCS.read_text().split("| MoE |")[1].split("\n\n")[0]
    assert re.findall(r"^\| (\w+) \|", table, flags=re.MULTILINE) == list(MODELS)
    assert set(MODELS) <= set(KNOWN_MODEL_TYPES)
