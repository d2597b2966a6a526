"""README and docs keep to their form, their Python examples and those of examples/ run as they stand, and links lead somewhere."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from devices import hopper
from torch.distributed.run import main as torchrun

import halfbyte
from halfbyte import env
from halfbyte.cli import main as command_line

ROOT = Path(__file__).parent.parent
LAB_NOTES = ROOT / "docs" / "lab-notes"
PAGES = sorted({ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")} | {*(ROOT / "docs").rglob("*.md")})
BLOCK = re.compile(r"^```(\S*)([^\n]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
KINDS = {"python", "console", "text", "json", "mermaid"}
EXAMPLES = [
    pytest.param(page, code, id=f"{page.relative_to(ROOT)}-{number}", marks=hopper if "gpu" in options.split() else [])
    for page in PAGES
    for number, (kind, options, code) in enumerate(BLOCK.findall(page.read_text()), 1)
    if kind == "python"
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader is who has run examples/quantise_model.py, or the first command of README's "Try it"."""
    folder = tmp_path_factory.mktemp("reader")
    example("quantise_model")("demo", str(folder / "demo-NVFP4"))
    return folder


def example(name: str) -> Callable[..., None]:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]


@pytest.mark.parametrize("name", ["accuracy", "engine_step", "rl_refit"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=hopper)])
def test_programs_run(name: str, device: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    example(name)()


@pytest.mark.slow
def test_the_notebook_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    cells = [cell for cell in json.loads((ROOT / "examples" / "demo.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells)
    exec(compile("\n".join("".join(cell["source"]) for cell in cells), "demo.ipynb", "exec"), {})


@pytest.mark.slow
def test_two_ranks_run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torchrun(["--nproc-per-node", "2", str(ROOT / "examples" / "expert_parallel.py")])  # raises what a rank raises
    assert capfd.readouterr().out.count("from the whole layer") == 2


@pytest.mark.parametrize(("page", "code"), EXAMPLES)
def test_examples_run(page: Path, code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(code, page.name, "exec"), {"__name__": "__main__"})


def command_lines(text: str) -> list[str]:
    """What stands behind `halfbyte` in console blocks and indented lines; arguments that span lines without a backslash are left out."""
    text = re.sub(r" \\\n\s*", " ", text)
    code = [code for kind, _, code in BLOCK.findall(text) if kind == "console"] + re.findall("^ {4}(.*)$", text, flags=re.MULTILINE)
    return re.findall(r"^halfbyte ([a-z](?:[^'\n]|'[^'\n]*')*)$", "\n".join(code), flags=re.MULTILINE)


COMMAND_LINES = [line for page in PAGES if not page.is_relative_to(LAB_NOTES) for line in command_lines(page.read_text())]


@pytest.mark.parametrize("line", COMMAND_LINES, ids=lambda line: line[:60])
def test_commands_have_these_options(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(line, comments=True)
    name = "_".join(arguments[:2]) if arguments[0] == "bench" else arguments[0]
    monkeypatch.setattr(importlib.import_module(f"halfbyte.cli.{name}"), "run", lambda args: 0)
    assert command_line.main(arguments) == 0


def test_every_block_says_what_it_is() -> None:
    found = {kind for page in PAGES for kind, _, _ in BLOCK.findall(page.read_text())}
    assert "python" in found
    assert found <= KINDS, "a block of another kind would not be run"


def test_lines_have_at_most_150_columns() -> None:
    too_long = [f"{page.relative_to(ROOT)}:{i}" for page in PAGES for i, line in enumerate(page.read_text().splitlines(), 1) if len(line) > 150]
    assert not too_long, too_long


def test_pages_can_be_read_in_one_sitting() -> None:
    lists = LAB_NOTES, ROOT / "docs" / "reference"  # nobody reads these from end to end
    pages = [page for page in PAGES if page.is_relative_to(ROOT / "docs") and not any(page.is_relative_to(folder) for folder in lists)]
    assert pages
    assert not [page.name for page in pages if len(page.read_text().splitlines()) > 150]


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", BLOCK.sub("", page.read_text())):
            if "://" in target:
                continue
            file = (page.parent / target).resolve() if target else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{page.relative_to(ROOT)}: {target}#{anchor}")
    assert not broken, broken


def test_variables_and_exit_codes_are_listed() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert all(f"| `{variable.name}` |" in page for variable in env.VARIABLES)
    codes = (0, 1, 2, 3, command_line.INTERRUPTED, command_line.BROKEN_PIPE)
    assert all(f"| {code} |" in page for code in codes)


def test_the_reference_has_every_public_name() -> None:
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference" / "python.md").read_text(), flags=re.MULTILINE)
    missing = {*halfbyte.__all__} - {name.rpartition(".")[2] for name in named} - {"MXFP4", "NVFP4", "__version__", "distributed", "moe"}
    assert not missing, missing


def anchors(page: Path) -> set[str]:
    """The names under which GitHub and mkdocs reach the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
