"""What is asked of the hardware."""

from __future__ import annotations

import pytest
import torch

from halfbyte import device
from halfbyte.device import model_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("is_fast", "on_cpu"), [(True, "auto"), (False, "float32")])
def test_only_a_cpu_that_is_slow_with_bf16_takes_fp32(is_fast: bool, on_cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_cpu_multiplies_bf16", lambda: is_fast)
    assert (model_dtype(CPU), model_dtype(CUDA)) == (on_cpu, "auto")
    assert model_dtype(CPU, "bfloat16") == model_dtype(CUDA, "bfloat16") == "bfloat16"


def test_torch_answers_whether_it_has_the_product() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    assert device._cpu_multiplies_bf16() or "AVX512" not in capability, capability
