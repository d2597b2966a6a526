"""How fast a cached start is beside a plain read of the same files: a checkpoint of random experts is written, prepared and loaded again.

    python benchmarks/cached_start.py --name qwen3-235b --layers 4 --dir /tmp/cached-start --device cuda [--cold]

Needs twice the size of the layers on disk. Random ModelOpt NVFP4; the directory is left there, and used again if it has the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from halfbyte.bench.shapes import NAMED_SHAPES, MoEShape
from halfbyte.checkpoint.source import Checkpoint
from halfbyte.loading.prepared import Wanted, load_prepared, prepare_on_disk
from halfbyte.loading.tensor_files import memory_of

BLOCK_BYTES = 16 << 20
LAYOUT = "hopper"


def write_checkpoint(shape: MoEShape, num_layers: int, directory: Path) -> None:
    """One file per layer, as ModelOpt names its tensors in a Qwen3-MoE model."""
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


@dataclass(frozen=True)
class CachedStart:
    """Seconds for all layers, medians of the repeats.

    Attributes:
        nbytes: of the cached files.
        open_s: opening the checkpoint and taking its fingerprint, once per start; part of neither time below.
        plain_s: one thread reads the files from first byte to last, 16 MiB at a time, and copies each block to new memory on the device.
        cached_s: `load_prepared`, every byte verified, into new memory on the device.
        streamed_s: `load_prepared` without the cache.
    """

    nbytes: int
    open_s: float
    plain_s: float
    cached_s: float
    streamed_s: float

    @property
    def plain_gbps(self) -> float:
        return self.nbytes / self.plain_s / 1e9

    @property
    def cached_gbps(self) -> float:
        return self.nbytes / self.cached_s / 1e9

    @property
    def fraction(self) -> float:
        """Cached over plain speed."""
        return self.plain_s / self.cached_s


def measure_cached_start(
    model: str | Path,
    device: torch.device | str,
    *,
    cache_dir: Path,
    cold: bool = False,
    repeats: int = 5,
) -> CachedStart:
    """Prepare what is not cached yet, then time plain reads, cached loads and loads from the checkpoint in turn.

    Args:
        model: directory or Hub name.
        device: where the weights go.
        cache_dir: where the prepared files are kept.
        cold: drop the files from the system's page cache before each read; else they are in it, if they fit.
        repeats: of each.
    """
    device = torch.device(device)
    started = time.perf_counter()
    checkpoint = Checkpoint.open(model)
    checkpoint.fingerprint  # noqa: B018  # cached by the checkpoint
    open_s = time.perf_counter() - started
    layers = checkpoint.moe.moe_layers
    kept = [prepare_on_disk(checkpoint, layer, Wanted(device, LAYOUT, cache_dir=cache_dir), verify=True) for layer in layers]
    files = [layer.file for layer in kept]
    sources = {checkpoint.file_of(name) for name in checkpoint.names}

    def load(cache: str) -> None:
        for layer in layers:
            load_prepared(checkpoint, layer, device=device, layout=LAYOUT, cache=cache, cache_dir=cache_dir)

    def timed(function: Callable[[], None], reads: Sequence[Path]) -> float:
        if cold:
            drop_from_page_cache(reads)
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        return time.perf_counter() - begin

    rounds = [
        (timed(lambda: read_plainly(files, device), files), timed(lambda: load("read"), files), timed(lambda: load("off"), sorted(sources)))
        for _ in range(repeats)
    ]
    plain_s, cached_s, streamed_s = (statistics.median(times) for times in zip(*rounds, strict=True))
    return CachedStart(sum(layer.nbytes for layer in kept), open_s, plain_s, cached_s, streamed_s)


def read_plainly(files: Sequence[Path], device: torch.device) -> None:
    buffer = torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for file in files:
        with file.open("rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            target = torch.empty(size, dtype=torch.uint8, device=device)
            for block in target.split(BLOCK_BYTES):
                place = buffer[: len(block)] if device.type == "cuda" else block
                stream.readinto(memory_of(place))
                if place is not block:
                    block.copy_(place)


def drop_from_page_cache(files: Sequence[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="qwen3-235b", choices=[name for name, shape in NAMED_SHAPES.items() if shape.activation.kind == "swiglu"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cold", action="store_true", help="drop the files from the system's page cache before each read")
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu measures the files alone")
    checkpoint = args.dir / f"{args.name}-{args.layers}"
    if not checkpoint.exists():
        write_checkpoint(NAMED_SHAPES[args.name], args.layers, checkpoint)
    start = measure_cached_start(checkpoint, args.device, cache_dir=args.dir / "cache", cold=args.cold)
    print(
        f"{start.nbytes / 1e9:.2f} GB: plain read {start.plain_gbps:.2f} GB/s, cached start {start.cached_gbps:.2f} GB/s, {start.fraction:.0%} of it"
    )
    print(f"from the checkpoint {start.streamed_s:.2f} s, cached {start.cached_s:.2f} s; opening the checkpoint {start.open_s:.2f} s")


if __name__ == "__main__":
    main()
