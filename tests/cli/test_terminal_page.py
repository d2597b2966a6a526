"""docs/terminal.md shows what the commands print."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from halfbyte.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "terminal.md").read_text()
SECTIONS = re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
SHOWN = {heading: re.search(r"```text\n(.*?)```", section, flags=re.DOTALL)[1] for heading, section in SECTIONS}
DOCTOR = ("FP4 MoE runs here: ", "\nsoftware\n", "\nhardware\n", "\nkernels\n", "\nNext: ")


def test_the_page_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", "demo", "nvfp4"]) == 0
    assert main(["inspect", "nvfp4", "--layer", "0"]) == 0
    assert capsys.readouterr().out == SHOWN["Quantise, and look"]
    os.truncate("nvfp4/model-00001-of-00001.safetensors", 9_000)
    assert main(["inspect", "nvfp4"]) == 1
    assert capsys.readouterr().err == SHOWN["A broken file"]
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for said in (printed, SHOWN["Is this machine good for it?"]):
        assert all(words in said for words in DOCTOR)
