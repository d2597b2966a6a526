"""What is asked of the hardware."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbyte import device
from halfbyte.device import free_bytes, model_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("is_fast", "on_cpu"), [(True, "auto"), (False, "float32")])
def test_only_a_cpu_that_is_slow_with_bf16_takes_fp32(is_fast: bool, on_cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_multiplies_bf16", lambda: is_fast)
    assert (model_dtype(CPU), model_dtype(CUDA)) == (on_cpu, "auto")
    assert model_dtype(CPU, "bfloat16") == model_dtype(CUDA, "bfloat16") == "bfloat16"


def test_torch_answers_whether_it_has_the_product() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    assert device._cpu_multiplies_bf16() or "AVX512" not in capability, capability


MACHINE = {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable: 500 kB\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        (MACHINE, 500 * 1024),
        ({**MACHINE, "proc/self/cgroup": "0::/\n", "groups/memory.max": "3000", "groups/memory.current": "1000"}, 2000),
        ({**MACHINE, "proc/self/cgroup": "0::/a/b", "groups/a/b/memory.max": "max", "groups/a/b/memory.current": "9"}, 500 * 1024),
        ({**MACHINE, "proc/self/cgroup": "0::/a/b", "groups/a/memory.max": "9", "groups/a/memory.current": "10"}, 0),
        ({**MACHINE, "proc/self/cgroup": "0::/of/the/host", "groups/memory.max": "9", "groups/memory.current": "3"}, 6),
        (
            {
                **MACHINE,
                "proc/self/cgroup": "2:cpu:/c\n1:hugetlb,memory:/a\n0::/",
                "groups/memory/a/memory.limit_in_bytes": "3000",
                "groups/memory/a/memory.usage_in_bytes": "2000",
                "groups/memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
                "groups/memory/memory.limit_in_bytes": "9223372036854771712",
                "groups/memory/memory.usage_in_bytes": "2000",
            },
            1500,
        ),
    ],
    ids=["unknown", "machine", "container", "no limit", "around it", "path of the host", "version 1"],
)
def test_a_container_may_have_less_than_the_machine(files: dict[str, str], free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(device, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(device, "_CGROUPS", tmp_path / "groups")
    assert free_bytes(CPU) == free
