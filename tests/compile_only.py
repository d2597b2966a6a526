"""Compile Triton and Gluon kernels for a GPU that is not there: registers, spills, shared memory, PTX and SASS, on a CPU machine.

    compiled = compile_for(kernel, torch.bfloat16, torch.float32, 7, BLOCK=64, num_warps=4, capability=90)     # one kernel, arguments by hand
    with compiling(90) as launched:                                                                            # whatever a launcher launches
        launcher(torch.empty(...))
    assert launched[0].spill_bytes == 0 and "wgmma" in launched[0].ptx

Arguments may be CPU or meta tensors, or dtypes (as aligned pointers). A launch under `compiling` compiles, checks shared memory, and runs nothing:
outputs keep what they held. Works in-process with Triton 3.6 to 3.9, GPU or not; the active driver is put back at the end.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory of a block in bytes (opt-in), by compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376, 121: 101376}
_serial = itertools.count()


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel. `asm` has the text of every stage ("ttir", "ttgir", "llir", "ptx") and the bytes of "cubin"."""

    name: str
    asm: dict[str, Any]
    num_warps: int
    shared_bytes: int

    @property
    def ptx(self) -> str:
        return self.asm["ptx"]

    @property
    def registers(self) -> int:
        """Registers of a thread. Kernels that move registers between warps (setmaxnreg) show what they start with."""
        return self._resources["REG"]

    @property
    def spill_bytes(self) -> int:
        """Stack of a thread in bytes. Triton puts nothing there itself: what is there, ptxas spilled."""
        return self._resources["STACK"] + self._resources["LOCAL"]

    @functools.cached_property
    def sass(self) -> str:
        return self._ask("nvdisasm", "-c")

    @functools.cached_property
    def _resources(self) -> dict[str, int]:
        report = self._ask("cuobjdump", "-res-usage")
        line = next(line for line in report.splitlines() if "REG:" in line)
        return {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}

    def _ask(self, tool: str, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def compile_for(kernel: Any, *arguments: Any, capability: int = 90, **constants: Any) -> Compiled:
    """Compile `kernel` for compute capability 90 (sm_90a), 100 (sm_100a), ... with these arguments, constexprs and options (num_warps=...)."""
    with compiling(capability):
        return _compiled(kernel.warmup(*arguments, grid=(1,), **constants).metadata_group)


@contextmanager
def compiling(capability: int = 90) -> Iterator[list[Compiled]]:
    """Within, Triton believes in a GPU of this capability: launches compile and do nothing. Yields the list of kernels, filled as they are launched.

    Each specialisation is listed once. Raises what Triton raises, `OutOfResources` for too much shared memory among it.
    """
    launched: list[Compiled] = []
    seen: set[str] = set()

    def note(module: Any, function: Any, name: str, metadata_group: dict[str, str], hash: str) -> None:
        if hash not in seen:  # without a module, Triton loads a kernel anew at every launch
            launched.append(_compiled(metadata_group))
        seen.add(hash)

    config = triton.runtime.driver
    before = config._active  # not `.active`, which looks for a GPU and fails without one
    config.set_active(_NoGPU(capability))
    triton.knobs.runtime.kernel_load_end_hook.add(note)
    try:
        yield launched
    finally:
        triton.knobs.runtime.kernel_load_end_hook.remove(note)
        config._active = before


def _compiled(metadata_group: dict[str, str]) -> Compiled:
    paths = {path.suffix[1:]: path for path in map(Path, metadata_group.values())}
    metadata = json.loads(paths.pop("json").read_text())
    asm = {stage: path.read_bytes() if stage == "cubin" else path.read_text() for stage, path in paths.items()}
    return Compiled(metadata["name"], asm, metadata["num_warps"], metadata["shared"])


class _NoGPU:
    """The part of Triton's driver interface that compiling and launching go through."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = self  # Triton keeps two of the methods below in an object of their own
        # Triton keeps compiled kernels by device: a new name each time, so that none is taken from, or left to, a real device.
        self.device = f"compile-only {next(_serial)}"

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[self.capability]}

    def load_binary(self, name: str, cubin: bytes, shared_bytes: int, device: str) -> tuple[None, None, int, int, int]:
        """Module, function, registers, spills, threads a block. No module: nothing to unload once the real driver is back."""
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None
