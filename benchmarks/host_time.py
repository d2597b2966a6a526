"""What a call of `fused_moe` costs the host until all is launched: the layers of a model in turn, no token of which chose an expert.

    python benchmarks/host_time.py                                             # Qwen3-30B in NVFP4, with an sm_90 GPU or without one
    python benchmarks/host_time.py --shape dsr1 --format mxfp4 --tokens 1,512 --activations fp8 --layers 4 --profile

Where there is no GPU, kernels are compiled for one, and Triton's own launcher calls a libcuda that does nothing; it takes a C compiler to make it.
Tensors are the CPU's then, and torch allocates large ones more slowly than on a GPU: with many tokens, only times with a workspace mean something.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import os
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import halfbyte as hb
from halfbyte.bench.shapes import NAMED_SHAPES
from halfbyte.tuning.layer import Layer

HOPPER = hb.Target("no GPU", "sm_90", 132, 50 << 20, 4600.0)
WORKSPACE_BYTES = 1 << 28

# What Triton 3.6 to 3.9 link: calls that fill in what they are asked for, and calls that do nothing.
FILLING = {
    "cuCtxGetCurrent(void **out)": "*out = &device",
    "cuDeviceGet(int *out, int i)": "*out = 0",
    "cuDeviceGetAttribute(int *out, int a, int d)": "*out = 232448",
    "cuDevicePrimaryCtxRetain(void **out, int d)": "*out = &device",
    "cuDriverGetVersion(int *out)": "*out = 13000",
    "cuFuncGetAttribute(int *out, int a, void *f)": "*out = 1024",
    "cuGetErrorString(int e, const char **out)": '*out = "no GPU"',
    "cuModuleGetFunction(void **out, void *m, const char *n)": "*out = &device",
    "cuModuleLoadData(void **out, const void *d)": "*out = &device",
    "cuPointerGetAttribute(unsigned long long *out, int a, unsigned long long p)": "*out = p",
    "cuStreamIsCapturing(void *s, int *out)": "*out = 0",
    "cuTensorMapEncodeTiled(char *out)": "memset(out, 0, 128)",
}
EMPTY = (
    "cuCtxGetDevice", "cuCtxGetLimit", "cuCtxSetCurrent", "cuCtxSetLimit", "cuFuncSetAttribute", "cuFuncSetCacheConfig", "cuLaunchKernelEx",
    "cuModuleUnload", "cuOccupancyMaxActiveClusters", "cuTensorMapEncodeIm2col",
)  # fmt: skip


def without_gpu(folder: Path) -> torch.device:
    """Let Triton believe in an sm_90 GPU whose driver does nothing; returns the device of its tensors."""
    functions = [f"int {signature} {{ {body}; return 0; }}" for signature, body in FILLING.items()] + [
        f"int {name}(void) {{ return 0; }}" for name in EMPTY
    ]
    (folder / "cuda.c").write_text("#include <string.h>\nstatic int device;\n" + "\n".join(functions))
    library = folder / "libcuda.so.1"
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, folder / "cuda.c"], check=True)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # what names libcuda.so.1 later is given this one
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    class Driver(CudaDriver):
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device, self.get_current_stream = lambda: 0, lambda device: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    triton.runtime.driver.set_active(Driver())
    hb.Target.of = staticmethod(lambda device: HOPPER)  # type: ignore[method-assign]
    return torch.device("cpu")


def round_of(layers: Sequence[hb.PreparedExperts], num_tokens: int, top_k: int, workspace: hb.Workspace | None) -> Callable[[], None]:
    """A call of every layer."""
    device = layers[0].device
    x = torch.zeros((num_tokens, layers[0].hidden), dtype=torch.bfloat16, device=device)
    ids, weights = torch.full((num_tokens, top_k), -1, dtype=torch.int32, device=device), torch.zeros((num_tokens, top_k), device=device)

    def run() -> None:
        for layer in layers:
            hb.fused_moe(x, layer, ids, weights, workspace=workspace)

    return run


def times_us(run: Callable[[], None], device: torch.device, seconds: float) -> list[float]:
    """Of rounds, none of which waits for the GPU."""
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < 3 or time.perf_counter() - begin < seconds:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        samples.append(1e6 * (time.perf_counter() - start))
    return samples


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=NAMED_SHAPES, default="qwen3-30b")
    parser.add_argument("--format", choices=("nvfp4", "mxfp4"), default="nvfp4")
    parser.add_argument("--activations", default="bf16,fp8", metavar="NAME,...")
    parser.add_argument("--tokens", default="1,16,64,256,2048", metavar="T,...")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    parser.add_argument("--profile", action="store_true", help="cProfile of a hundred rounds instead")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        measure(args, torch.device("cuda", 0) if torch.cuda.is_available() else without_gpu(Path(folder)))


def measure(args: Any, device: torch.device) -> None:
    shape, target = NAMED_SHAPES[args.shape], hb.Target.of(device)
    workspace = hb.Workspace(torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device))
    print(f"{target.name}, torch {torch.__version__}; us per call, shortest and median\n\n| activations | tokens | workspace | shortest | median |")
    print("|---|---:|---|---:|---:|")
    for activations in args.activations.split(","):
        layer = Layer(shape, getattr(hb, args.format.upper()), activations, target)
        made = (layer.empty_storage(str(device)) for _ in range(args.layers))
        layers = [hb.PreparedExperts(storage, str(layer.problem.layout), "packed", target, "host_time.py", layer.activations) for storage in made]
        for num_tokens in map(int, args.tokens.split(",")):
            for given in (workspace, None):
                run = round_of(layers, num_tokens, shape.top_k, given)
                run()  # compiles
                if args.profile:
                    with cProfile.Profile() as profile:
                        for _ in range(100):
                            run()
                    pstats.Stats(profile).sort_stats("tottime").print_stats(30)
                    continue
                samples = [sample / len(layers) for sample in times_us(run, device, args.seconds)]
                words = activations, num_tokens, "yes" if given else "no", f"{min(samples):.1f}", f"{statistics.median(samples):.1f}"
                print(f"| {' | '.join(map(str, words))} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
