"""Tiny checkpoints of every family and format, written by hand, with the dense weights they mean computed element by element."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

ELEMENTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E, H, I = 3, 64, 32  # noqa: E741
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
W_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}
QWEN = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "hidden_size": H,
    "intermediate_size": 4 * I,
    "moe_intermediate_size": I,
    "num_experts": E,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "hidden_act": "silu",
}
MIXTRAL = {
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "hidden_size": H,
    "intermediate_size": I,
    "num_local_experts": E,
    "num_experts_per_tok": 2,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "hidden_size": H,
    "intermediate_size": 4 * I,
    "moe_intermediate_size": I,
    "n_routed_experts": E,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "num_hidden_layers": 2,
    "hidden_size": H,
    "intermediate_size": I,
    "num_local_experts": E,
    "num_experts_per_tok": 2,
    "swiglu_limit": 7.0,
    "hidden_act": "silu",
}
DEEPSEEK_V4 = {
    "model_type": "deepseek_v4",
    "vocab_size": 10,
    "num_hidden_layers": 2,
    "hidden_size": H,
    "moe_intermediate_size": I,
    "n_routed_experts": E,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "expert_dtype": "fp4",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*.gate"]}}


@dataclass
class Files:
    """Tensors of a layer-1 MoE and the dense weights they mean: dense[projection][expert] is [N, K] fp32."""

    config: dict
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    dense: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {"gate": [], "up": [], "down": []})
    hf_quant_config: dict | None = None

    def write(self, path: Path, shards: int = 1) -> Path:
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(self.config))
        if self.hf_quant_config:
            (path / "hf_quant_config.json").write_text(json.dumps(self.hf_quant_config))
        if shards == 1:
            save_file(self.tensors, path / "model.safetensors")
            return path
        file_of = {name: f"model-{1 + index % shards:05}-of-{shards:05}.safetensors" for index, name in enumerate(sorted(self.tensors))}
        for file in set(file_of.values()):
            save_file({name: tensor for name, tensor in self.tensors.items() if file_of[name] == file}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
        return path

    @property
    def w13(self) -> torch.Tensor:
        return torch.stack([torch.cat(pair) for pair in zip(self.dense["gate"], self.dense["up"], strict=True)])

    @property
    def w2(self) -> torch.Tensor:
        return torch.stack(self.dense["down"])


def rows_columns(projection: str) -> tuple[int, int]:
    return (H, I) if projection == "down" else (I, H)


def decode(codes: torch.Tensor, scales: list[list[float]], block: int, factor: float = 1.0) -> torch.Tensor:
    """Element by element: nibble c % 2 of byte c // 2, times the scale of block c // block (and the factor), each product rounded to fp32."""
    rows, half = codes.shape
    packed = codes.view(torch.uint8).tolist()
    elements = torch.tensor([[ELEMENTS[(packed[r][c // 2] >> (4 * (c % 2))) & 15] for c in range(2 * half)] for r in range(rows)])
    scale = torch.tensor([[scales[r][c // block] for c in range(2 * half)] for r in range(rows)])
    return elements * scale * torch.tensor(factor)


def e8m0_values(scales: torch.Tensor) -> list[list[float]]:
    return [[2.0 ** (byte - 127) for byte in row] for row in scales.tolist()]


def random_codes(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)


def random_e8m0(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(110, 130, (rows, columns // 32), dtype=torch.uint8)


def nvfp4(kind: str, block: str = "model.layers.1.mlp", names: dict[str, str] = NAMES, config: dict = QWEN) -> Files:
    """ModelOpt ("modelopt", described by hf_quant_config.json) or compressed-tensors NVFP4. Gate and up have different global scales."""
    modelopt = kind == "modelopt"
    files = Files(dict(config), hf_quant_config=json.loads(json.dumps(MODELOPT)) if modelopt else None)
    if not modelopt:
        files.config["quantization_config"] = compressed_tensors("nvfp4-pack-quantized", 16)
    for expert in range(E):
        for number, (projection, leaf) in enumerate(names.items()):
            rows, columns = rows_columns(projection)
            prefix = f"{block}.experts.{expert}.{leaf}"
            codes = random_codes(rows, columns)
            scales = (torch.rand(rows, columns // 16) * 400).to(torch.float8_e4m3fn)
            factor = torch.tensor(2.0 ** (-expert - number))  # a power of two: exact as encode and as decode multiplier
            input_scale = torch.tensor(2.0 ** (-8 - expert - number))
            files.tensors |= (
                {
                    f"{prefix}.weight": codes,
                    f"{prefix}.weight_scale": scales,
                    f"{prefix}.weight_scale_2": factor,
                    f"{prefix}.input_scale": input_scale,
                }
                if modelopt
                else {
                    f"{prefix}.weight_packed": codes,
                    f"{prefix}.weight_scale": scales,
                    f"{prefix}.weight_global_scale": (1 / factor).reshape(1),
                    f"{prefix}.input_global_scale": (1 / input_scale).reshape(1),
                }
            )
            files.dense[projection].append(decode(codes, scales.float().tolist(), 16, factor.item()))
    return add_router(files, block)


def compressed_tensors(format: str, group_size: int) -> dict:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": group_size}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*mlp.gate$"]}


def compressed_tensors_mxfp4() -> Files:
    files = Files({**QWEN, "quantization_config": compressed_tensors("mxfp4-pack-quantized", 32)})
    for expert in range(E):
        for projection, leaf in NAMES.items():
            codes, scales = random_codes(*rows_columns(projection)), random_e8m0(*rows_columns(projection))
            prefix = f"model.layers.1.mlp.experts.{expert}.{leaf}"
            files.tensors |= {f"{prefix}.weight_packed": codes, f"{prefix}.weight_scale": scales}
            files.dense[projection].append(decode(codes, e8m0_values(scales), 32))
    return add_router(files, "model.layers.1.mlp")


def quark() -> Files:
    """AMD Quark MXFP4: plain names, e8m0 scales as bytes."""
    files = compressed_tensors_mxfp4()
    weight = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    exclude = ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"]
    files.config["quantization_config"] = {"quant_method": "quark", "exclude": exclude, "global_quant_config": {"weight": weight}}
    files.tensors = {name.replace("weight_packed", "weight"): tensor for name, tensor in files.tensors.items()}
    return files


def stacked(files: Files, experts: str = "model.layers.1.mlp.experts") -> Files:
    """The same experts in one tensor of the layer for gate and up, and one for down; scalars are [E, 2] and [E]."""
    compressed = any(name.endswith("weight_packed") for name in files.tensors)
    parts: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name in [name for name in files.tensors if name.startswith(f"{experts}.")]:
        expert, leaf, suffix = name.removeprefix(f"{experts}.").split(".")
        short = "" if suffix == "weight" else "_" + (suffix.removeprefix("weight_") if compressed else suffix)
        parts.setdefault(leaf, {}).setdefault(short, {})[int(expert)] = files.tensors.pop(name)
    stacks = {leaf: {short: torch.stack([of[e] for e in range(E)]) for short, of in by.items()} for leaf, by in parts.items()}
    for short, gate in stacks["gate_proj"].items():
        up = stacks["up_proj"][short]
        scalar = gate.numel() == E
        files.tensors[f"{experts}.gate_up_proj{short}"] = torch.stack([gate.flatten(), up.flatten()], 1) if scalar else torch.cat([gate, up], 1)
        files.tensors[f"{experts}.down_proj{short}"] = stacks["down_proj"][short]
    return files


def deepseek_v4(scale_dtype: torch.dtype = torch.uint8, scale_name: str = "scale") -> Files:
    files = Files(dict(DEEPSEEK_V4))
    for expert in range(E):
        for projection, leaf in W_NAMES.items():
            codes, scales = random_codes(*rows_columns(projection)), random_e8m0(*rows_columns(projection))
            stored = torch.tensor(e8m0_values(scales)) if scale_dtype == torch.float32 else scales.view(scale_dtype)
            prefix = f"layers.1.ffn.experts.{expert}.{leaf}"
            files.tensors |= {f"{prefix}.weight": codes.view(torch.int8), f"{prefix}.{scale_name}": stored}
            files.dense[projection].append(decode(codes, e8m0_values(scales), 32))
    add_router(files, "layers.1.ffn")
    files.tensors["layers.1.ffn.gate.bias"] = torch.randn(E)
    files.tensors["layers.1.ffn.gate.tid2eid"] = torch.randint(0, E, (10, 2))
    return files


def gpt_oss() -> tuple[Files, torch.Tensor, torch.Tensor]:
    """Files, and the biases [E, 2I] in gate-then-up order and [E, H]."""
    files = Files({**GPT_OSS, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]}})
    prefix = "model.layers.1.mlp.experts"
    gate_up, down = [random_codes(E * 2 * I, H), random_e8m0(E * 2 * I, H)], [random_codes(E * H, I), random_e8m0(E * H, I)]
    biases = torch.randn(E, 2 * I, dtype=torch.bfloat16), torch.randn(E, H, dtype=torch.bfloat16)
    for name, (codes, scales), rows, columns, bias in (("gate_up_proj", gate_up, 2 * I, H, biases[0]), ("down_proj", down, H, I, biases[1])):
        files.tensors |= {
            f"{prefix}.{name}_blocks": codes.reshape(E, rows, columns // 32, 16),
            f"{prefix}.{name}_scales": scales.reshape(E, rows, columns // 32),
            f"{prefix}.{name}_bias": bias,
        }
        values = decode(codes, e8m0_values(scales), 32).reshape(E, rows, columns)
        for expert in range(E):
            if name == "down_proj":
                files.dense["down"].append(values[expert])
            else:
                files.dense["gate"].append(torch.stack([values[expert, 2 * i] for i in range(I)]))
                files.dense["up"].append(torch.stack([values[expert, 2 * i + 1] for i in range(I)]))
    add_router(files, "model.layers.1.mlp", "router")
    files.tensors["model.layers.1.mlp.router.bias"] = torch.randn(E)
    order = [2 * i for i in range(I)] + [2 * i + 1 for i in range(I)]
    return files, biases[0][:, order], biases[1]


def dense(
    config: dict = QWEN, dtype: torch.dtype = torch.bfloat16, block: str = "model.layers.1.mlp", names: dict[str, str] = NAMES, stacked: str = ""
) -> Files:
    """`stacked`: "", "rows" ([E, 2I, H]), "columns" ([E, H, 2I]) or "alternating" ([E, H, 2I], gate and up columns in turn)."""
    files = Files(dict(config))
    for expert in range(E):
        for projection, leaf in names.items():
            weight = torch.randn(*rows_columns(projection)).to(dtype)
            files.dense[projection].append(weight.float())
            if not stacked:
                files.tensors[f"{block}.experts.{expert}.{leaf}.weight"] = weight
    if stacked:
        w13, w2 = files.w13.to(dtype), files.w2.to(dtype)
        if stacked == "alternating":
            w13 = torch.stack([w13[:, row] for i in range(I) for row in (i, I + i)], dim=1)
        if stacked != "rows":
            w13, w2 = w13.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()
        files.tensors |= {f"{block}.experts.gate_up_proj": w13, f"{block}.experts.down_proj": w2}
    return add_router(files, block)


def add_router(files: Files, block: str, name: str = "gate") -> Files:
    files.tensors[f"{block}.{name}.weight"] = torch.randn(E, H, dtype=torch.bfloat16)
    if files.config["model_type"] == "deepseek_v3":
        files.tensors[f"{block}.{name}.e_score_correction_bias"] = torch.randn(E)
    return files


def without(files: Files, word: str) -> Files:
    assert any(word in name for name in files.tensors)
    files.tensors = {name: tensor for name, tensor in files.tensors.items() if word not in name}
    return files


def prune(files: Files, expert: int, scale: float, negative_zero: bool = False) -> Files:
    for name in [name for name in files.tensors if f".experts.{expert}." in name]:
        tensor = files.tensors[name]
        if name.endswith((".weight", ".weight_packed")):
            files.tensors[name] = torch.full_like(tensor, 0x88 if negative_zero else 0)
        elif name.endswith((".weight_scale_2", ".weight_global_scale")):
            files.tensors[name] = torch.full_like(tensor, scale)
    for matrices in files.dense.values():
        matrices[expert] = torch.full_like(matrices[expert], -0.0 if negative_zero else 0.0)
    return files
