"""`--json`: one document and nothing else on stdout, of the fields that docs/json.md lists; an error leaves stdout empty."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from fuzz.sound import SHARDS, join, sound, split, write

from halfbyte.cli import terminal
from halfbyte.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
FIELDS = {word for line in PAGE.splitlines() if line.startswith("| `") for word in re.findall(r"\w+", line.split("|")[1])}
FIELDS |= {word for line in PAGE.splitlines() if line.startswith("| `") for word in re.findall(r"`(\w+)`", line)}


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def document_of(text: str) -> Any:
    return json.loads(text, parse_constant=refuse)


def keys(document: Any, path: str = "") -> set[str]:
    if isinstance(document, dict):
        named = document if path not in ("moe.refused_layers",) else {}
        return {*named}.union(*(keys(value, f"{path}.{key}".strip(".")) for key, value in named.items()))
    return set().union(*(keys(value, path) for value in document)) if isinstance(document, list) else set()


@pytest.mark.parametrize("layout", ["modelopt", "gpt-oss", "dense"])
def test_inspect_prints_the_fields_that_the_page_lists(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = dict(sound(layout))
    arguments = ["inspect", str(write(files, tmp_path / "sound")), "--json", "--tensors", "--fp8-error"]
    assert main(arguments) == 0
    assert keys(document_of(capsys.readouterr().out)) <= FIELDS
    header, data = split(files[SHARDS[0]])
    name = next(name for name in header if "experts" in name)
    header[name.replace("experts", "lost_experts")] = header.pop(name)
    files[SHARDS[0]] = join(header, data)
    files.pop("model.safetensors.index.json")
    code = main(["inspect", str(write(files, tmp_path / "broken")), "--json"])
    out, err = capsys.readouterr()
    assert code == 1 and (out == "") == err.startswith("halfbyte: error: ")
    assert not out or any(problem["severity"] == "error" for problem in document_of(out)["problems"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "nowhere"],
        ["inspect", "demo", "--layer", "99"],
        ["prepare", "nowhere"],
        ["quantize", "nowhere", "out"],
        ["generate", "demo", ""],
        ["eval", "demo", "--text", "nowhere"],
        ["bench", "report", "nowhere"],
        ["tune", "--report", "nowhere"],
    ],
)
def test_an_error_leaves_stdout_empty(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("halfbyte: error: ")


def test_other_commands_print_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write(sound("dense"), tmp_path / "dense")
    Path("text.txt").write_text("A text of some words, " * 20)
    commands = (
        ["quantize", "dense", "out"],
        ["quantize", "dense", "other", "--dry-run"],
        ["prepare", "out", "--cache-dir", "cache"],
        ["generate", "dense", "hello", "--max-new-tokens", "2"],
        ["eval", "dense", "--text", "text.txt", "--windows", "1"],
        ["tune", "--report"],
        ["doctor"],
    )
    for command in commands:
        assert main([*command, "--json"]) == 0
        assert isinstance(document_of(capsys.readouterr().out), dict), command


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (terminal.positive_int, "0 -1 x 1.5 ٣ 99999999999999999999"),
        (terminal.count, "-1 x"),
        (terminal.port, "-1 65536 x"),
        (terminal.temperature, "-1 nan inf x"),
        (terminal.seconds, "-1 nan x"),
    ],
)
def test_numbers_that_are_none_are_said_to_be(kind: Any, wrong: str) -> None:
    for text in wrong.split():
        with pytest.raises(argparse.ArgumentTypeError, match=rf"'{text}' is not an? "):
            kind(text)
    assert kind("7") == 7


def test_a_prompt_is_utf8_in_every_locale() -> None:
    assert terminal.utf8(os.fsdecode("grüße".encode())) == "grüße"
    with pytest.raises(argparse.ArgumentTypeError, match="no UTF-8"):
        terminal.utf8("\udcff")
