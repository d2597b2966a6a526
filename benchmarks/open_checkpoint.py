"""How long a checkpoint with DeepSeek-R1's 178,176 expert tensors takes until the first tensor is read, and how much memory: headers alone, no data.

    python benchmarks/open_checkpoint.py --dir /tmp/headers [--layers 61]

`library` opens the directory and describes its experts. `transformers` does what the plug-in does before `from_pretrained` loads: it reads the
headers and plans the load. Each runs in a process of its own; memory is the peak of that process, and what it had before. The files are sparse, and
stay there.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

DENSE_LAYERS = 3
FILES = 163


class Sizes(NamedTuple):
    """Of a DeepSeek-R1; the other sizes are those of transformers' configuration class."""

    num_layers: int = 61
    num_experts: int = 256
    hidden: int = 7168
    intermediate: int = 2048


def write_headers(sizes: Sizes, directory: Path) -> int:
    """Write ModelOpt NVFP4 files without data, as many as the published ones; the number of tensors of experts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "deepseek_v3",
        num_hidden_layers=sizes.num_layers,
        n_routed_experts=sizes.num_experts,
        hidden_size=sizes.hidden,
        moe_intermediate_size=sizes.intermediate,
        first_k_dense_replace=DENSE_LAYERS,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = {name: ("BF16", list(t.shape), t.nbytes) for name, t in model.state_dict().items() if ".experts." not in name}
    others = len(tensors)
    for layer in range(DENSE_LAYERS, sizes.num_layers):
        for expert in range(sizes.num_experts):
            for leaf in ("gate_proj", "up_proj", "down_proj"):
                rows, columns = (sizes.hidden, sizes.intermediate) if leaf == "down_proj" else (sizes.intermediate, sizes.hidden)
                stem = f"model.layers.{layer}.mlp.experts.{expert}.{leaf}"
                tensors[f"{stem}.weight"] = "U8", [rows, columns // 2], rows * columns // 2
                tensors[f"{stem}.weight_scale"] = "F8_E4M3", [rows, columns // 16], rows * columns // 16
                tensors[f"{stem}.weight_scale_2"] = tensors[f"{stem}.input_scale"] = "F32", [], 4
    directory.mkdir(parents=True)
    per_file = -(-len(tensors) // FILES)
    names, file_of = list(tensors), {}
    for index, first in enumerate(range(0, len(names), per_file)):
        header, offset, file = {}, 0, f"model-{index + 1:05}-of-{-(-len(names) // per_file):05}.safetensors"
        for name in names[first : first + per_file]:
            dtype, shape, nbytes = tensors[name]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + nbytes]}
            offset += nbytes
            file_of[name] = file
        raw = json.dumps(header).encode()
        with (directory / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(raw)) + raw)
            stream.truncate(8 + len(raw) + offset)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    config.quantization_config = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "re:.*self_attn.*"]}
    config.save_pretrained(directory)
    return len(tensors) - others


def library(directory: Path) -> Callable[[], object]:
    from halfbyte.checkpoint.source import Checkpoint

    return lambda: [getattr(checkpoint, what) for checkpoint in [Checkpoint.open(directory)] for what in ("moe", "quantization")]


def transformers(directory: Path) -> Callable[[], object]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from halfbyte.integrations.transformers.quantizers import FP4Config, FP4Quantizer

    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    quantizer = FP4Quantizer(FP4Config(**config.quantization_config))
    files = sorted(map(str, directory.glob("*.safetensors")))
    return lambda: quantizer.preprocess_model(model=model, checkpoint_files=files)


SUBJECTS = {"library": library, "transformers": transformers}


def peak_mb() -> float:
    """Of this process on Linux; getrusage would start from the peak of the parent."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) / 1024


def measure(subject: str, directory: Path) -> dict[str, float]:
    """Seconds by the clock and of the processor, and peak MB before and after, of one subject in this process."""
    open_it, before = SUBJECTS[subject](directory), peak_mb()
    started, processor = time.perf_counter(), time.process_time()
    open_it()
    return {"s": time.perf_counter() - started, "processor_s": time.process_time() - processor, "before_mb": before, "peak_mb": peak_mb()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=Sizes().num_layers)
    parser.add_argument("--subject", choices=SUBJECTS, help="measure this one in this process, and print JSON")
    args = parser.parse_args()
    if args.subject:
        print(json.dumps(measure(args.subject, args.dir)))
        return
    if not args.dir.exists():
        print(f"{write_headers(Sizes(num_layers=args.layers), args.dir)} tensors of experts")
    for subject in SUBJECTS:
        command = [sys.executable, __file__, "--dir", str(args.dir), "--subject", subject]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        print(
            f"{subject}: {row['s']:.1f} s ({row['processor_s']:.1f} of the processor), {row['peak_mb']:.0f} MB, {row['before_mb']:.0f} of them before"
        )


if __name__ == "__main__":
    main()
