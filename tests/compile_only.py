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
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from halfbyte.tuning.compiling import without_device

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory of a block in bytes (opt-in), by compute capability: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376, 121: 101376}


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
        """With the encoding of each instruction, in which `stage_order` reads what it waits for."""
        return self._ask("nvdisasm", "-c", "-hex")

    @functools.cached_property
    def _resources(self) -> dict[str, int]:
        report = self._ask("cuobjdump", "-res-usage")
        line = next(line for line in report.splitlines() if "REG:" in line)
        return {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}

    def _ask(self, tool: str, *options: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            return subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def compile_for(kernel: Any, *arguments: Any, capability: int = 90, **constants: Any) -> Compiled:
    """Compile `kernel` for compute capability 90 (sm_90a), 100 (sm_100a), ... with these arguments, constexprs and options (num_warps=...)."""
    with compiling(capability):
        return _compiled(kernel.warmup(*arguments, grid=(1,), **{"enable_fp_fusion": True} | constants).metadata_group)


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

    triton.knobs.runtime.kernel_load_end_hook.add(note)
    try:
        with without_device(capability, SHARED_LIMIT[capability]):
            yield launched
    finally:
        triton.knobs.runtime.kernel_load_end_hook.remove(note)


def _compiled(metadata_group: dict[str, str]) -> Compiled:
    paths = {path.suffix[1:]: path for path in map(Path, metadata_group.values())}
    metadata = json.loads(paths.pop("json").read_text())
    asm = {stage: path.read_bytes() if stage == "cubin" else path.read_text() for stage, path in paths.items()}
    return Compiled(metadata["name"], asm, metadata["num_warps"], metadata["shared"])
