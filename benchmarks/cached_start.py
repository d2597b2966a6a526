"""How fast a cached start is beside a plain read of the same files: a checkpoint of random experts is written, prepared and loaded again.

    python benchmarks/cached_start.py --name qwen3-235b --layers 4 --dir /tmp/cached-start --device cuda [--cold]

Needs twice the size of the layers on disk. Random ModelOpt NVFP4; the directory is left there, and used again if it has the checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from halfbyte.bench.prepare_cache import measure_cached_start
from halfbyte.bench.shapes import NAMED_SHAPES, MoEShape


def write_checkpoint(shape: MoEShape, num_layers: int, directory: Path) -> None:
    """One file a layer, as ModelOpt names its tensors in a Qwen3-MoE model."""
    directory.mkdir(parents=True)
    sizes = {"hidden_size": shape.hidden, "moe_intermediate_size": shape.intermediate, "num_experts": shape.num_experts}
    rest = {
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": num_layers,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
    }
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "norm_topk_prob": True, **sizes, **rest}))
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*.gate"]}
    (directory / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": quantization}))
    file_of = {}
    for layer in range(num_layers):
        tensors = {f"model.layers.{layer}.mlp.gate.weight": torch.randn(shape.num_experts, shape.hidden).bfloat16()}
        for expert in range(shape.num_experts):
            for name in ("gate_proj", "up_proj", "down_proj"):
                rows, columns = (shape.hidden, shape.intermediate) if name == "down_proj" else (shape.intermediate, shape.hidden)
                prefix = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{prefix}.weight"] = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
                tensors[f"{prefix}.weight_scale"] = torch.randint(48, 64, (rows, columns // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
                tensors[f"{prefix}.weight_scale_2"] = torch.tensor(0.005)
                tensors[f"{prefix}.input_scale"] = torch.tensor(0.01)
        file = f"model-{layer + 1:05}-of-{num_layers:05}.safetensors"
        save_file(tensors, directory / file)
        file_of |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="qwen3-235b", choices=[name for name, shape in NAMED_SHAPES.items() if shape.activation.kind == "swiglu"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cold", action="store_true", help="drop the files from the system's page cache before each read")
    args = parser.parse_args()
    checkpoint = args.dir / f"{args.name}-{args.layers}"
    if not checkpoint.exists():
        write_checkpoint(NAMED_SHAPES[args.name], args.layers, checkpoint)
    start = measure_cached_start(checkpoint, args.device, layout="hopper", cache_dir=args.dir / "cache", cold=args.cold)
    print(
        f"{start.nbytes / 1e9:.2f} GB: plain read {start.plain_gbps:.2f} GB/s, cached start {start.cached_gbps:.2f} GB/s, {start.fraction:.0%} of it"
    )
    print(f"from the checkpoint {start.streamed_s:.2f} s, cached {start.cached_s:.2f} s; opening the checkpoint {start.open_s:.2f} s")
