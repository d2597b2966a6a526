"""The wheel, installed where nothing else of this repository is: what a user gets by `pip install`. Other packages are those of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import halfbyte

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True, cwd=folder, timeout=1800)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, behind which lie the packages of this one (not their .pth files: no editable halfbyte)."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    paths = sysconfig.get_paths("venv", vars={"base": str(folder), "platbase": str(folder)})
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
        check=True,
        timeout=1800,
    )
    Path(paths["purelib"], "packages_of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(program: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True, cwd=program.parent, env=environment, timeout=1800).stdout


def test_what_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        entries = files.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert {"halfbyte/py.typed", "halfbyte/demo_model/tokenizer.json", "halfbyte/demo_model/model-00001-of-00002.safetensors"} <= names
    sources = {file.relative_to(ROOT / "src").as_posix() for file in (ROOT / "src").rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert all(line in entries for line in ("halfbyte = halfbyte.__main__:main", "[vllm.general_plugins]", "[sglang.srt.plugins]"))
    assert wheel.stat().st_size < 20_000_000


@pytest.mark.slow
def test_it_runs(installed: Path) -> None:
    where = "import halfbyte; print(halfbyte.__file__, halfbyte.__version__)"
    file, version = run(installed / "python", "-c", where).split()
    assert Path(file).is_relative_to(installed.parent) and version == halfbyte.__version__
    assert "FP4 MoE runs here" in run(installed / "halfbyte", "doctor").splitlines()[0]
    assert run(installed / "halfbyte", "inspect", "demo").rstrip().endswith("no problems found")
