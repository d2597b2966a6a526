"""The report prints whatever is broken, as a line of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import halfbyte
from halfbyte import doctor
from halfbyte.cli.main import main
from halfbyte.device import Target
from halfbyte.kernels.flashinfer import package


def squeezed(text: str) -> list[str]:
    """Lines without the padding that lines the columns up."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_report_of_a_sound_machine(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(tmp_path / "not" / "yet"))
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    findings = {finding["name"]: finding for finding in document["findings"]}
    assert document["verdict"] == "FP4 MoE runs here: CPU, no GPU found, plain torch, for trying out" and document["next_step"] == "halfbyte demo"
    assert findings["torch"]["value"] == torch.__version__
    assert "can be created" in findings["cache directory"]["value"] and not (tmp_path / "not").exists()
    assert findings["cpu fused_moe NVFP4 canonical"]["value"] == "reference: yes"
    assert main(["doctor"]) == 0
    lines = squeezed(capsys.readouterr().out)
    assert lines[0] == document["verdict"] and lines[-1] == "Next: halfbyte demo"
    assert "cpu fused_moe MXFP4 canonical reference: yes" in lines and not any(line.startswith("!") for line in lines)


def test_prints_everything_else_without_torch(tmp_path):
    """A torch that cannot be loaded (as with a driver library missing) is reported, and so is all that does not need it."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    code = "import sys; from halfbyte.cli.main import main; sys.exit(main(['doctor']))"
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(halfbyte.__file__).parent.parent}", "PATH": "", "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 1 and not result.stderr
    assert result.stdout.startswith("FP4 MoE does not run here: torch, cuda, kernel table broken\n")
    broken = [line for line in result.stdout.splitlines() if line.startswith("! ")]
    assert {line.split()[1] for line in broken} >= {"torch", "cuda", "kernel"}
    assert all("libcudart" in line for line in broken if line.split()[1] in ("torch", "cuda", "kernel"))
    for name in ("halfbyte", "python", "cpu", "HALFBYTE_CACHE_DIR", "cache directory"):
        assert f"\n  {name} " in result.stdout


def test_cache_directory_that_cannot_be_used(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HALFBYTE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert main(["doctor"]) == 1
    lines = squeezed(capsys.readouterr().out)
    assert any(line.startswith("! cache directory broken: PermissionError: cannot write to") for line in lines)


def test_absent_optional_package_is_not_broken(monkeypatch):
    monkeypatch.setitem(doctor.OPTIONAL_PACKAGES, "no_such_package_of_halfbyte", "hf")
    finding = next(finding for finding in doctor.report() if finding.name == "no_such_package_of_halfbyte")
    assert finding.ok and "pip install 'halfbyte[hf]'" in finding.value


def test_gpu_kernels_are_called_a_fallback(monkeypatch):
    hopper = Target("NVIDIA H200", "sm_90", 132, 50 << 20, 4600.0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(Target, "of", staticmethod(lambda device: hopper))
    findings = {finding.name: finding.value for finding in doctor.report() if finding.section == "kernels"}
    assert findings["sm_90 fused_moe NVFP4 canonical"] == "reference: yes, slowly"


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_a_failing_probe_is_one_line(monkeypatch, error):
    def fail():
        raise error("no luck")

    monkeypatch.setattr(doctor, "_gpus", fail)
    broken = [finding for finding in doctor.report() if not finding.ok]
    assert [(finding.name, finding.value) for finding in broken] == [("cuda", f"broken: {error.__name__}: no luck")]


def test_the_kernels_are_asked_about_bf16_activations() -> None:
    lines = [f"{finding.name} {finding.value}" for finding in doctor.report() if finding.section == "kernels"]
    assert "cpu fused_moe NVFP4 hopper hopper: no: needs a CUDA GPU, this is a CPU" in lines
    assert not any("not None" in line for line in lines)


def test_the_verdict_counts_gpus_and_names_the_kernel(monkeypatch) -> None:
    hopper = Target("NVIDIA H200", "sm_90", 132, 50 << 20, 4600.0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(Target, "of", staticmethod(lambda device: hopper))
    assert doctor.verdict([]) == "FP4 MoE runs here: 2 x NVIDIA H200, kernel 'hopper'"


def test_the_next_step_installs_what_the_demo_lacks(monkeypatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.next_step() == "pip install 'halfbyte[demo]', then: halfbyte demo"


@pytest.mark.parametrize("installed", [True, False])
def test_blackwell_runs_flashinfers_kernels_where_they_are(installed: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(Target, "of", staticmethod(lambda device: Target("NVIDIA B200", "sm_100", 148, 126 << 20, 8000.0)))
    monkeypatch.setattr(package, "refusal", lambda: None if installed else "needs the package flashinfer-python, which is not installed")
    findings = {finding.name: finding.value for finding in doctor.report() if finding.section == "kernels"}
    expected = "flashinfer, layout trtllm_gen" if installed else "triton, layout canonical"
    assert findings["sm_100 NVFP4 x nvfp4"] == findings["sm_100 MXFP4 x bf16"] == expected
    assert findings["sm_100 NVFP4 x bf16"] == "triton, layout canonical"
