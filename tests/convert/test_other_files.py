"""Which files a conversion copies; that none is passed over without a word is in `test_quantize_model` too."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import checkpoint_files as cf
import pytest

from halfbyte.convert import quantize_model
from halfbyte.convert.other_files import other_files
from halfbyte.errors import CheckpointError


def test_what_is_visible_and_not_about_weights(tmp_path: Path) -> None:
    copied = ("LICENSE", "tokenizer.json", "code/model.py", "evaluator.py")
    others = ("config.json", "README.md", "a.safetensors", "a.safetensors.index.json", "eval_results.json", "eval/x", ".git/x", "code/__pycache__/x")
    for name in (*copied, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "empty").mkdir()
    assert sorted(other_files(tmp_path)) == sorted((tmp_path / name, name) for name in copied)


@pytest.mark.parametrize("unlisted", ["in", "in/code"])
def test_a_directory_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unlisted: str) -> None:
    """Its weights can be read, by the names that the index has."""
    source = cf.dense().write(tmp_path / "in")
    (source / "code").mkdir()
    scandir: Callable[..., object] = os.scandir

    def refusing(path: str) -> object:
        if Path(path) == tmp_path / unlisted:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(CheckpointError, match=rf"{unlisted}: cannot list the directory \(given Permission denied\)\. Make it readable"):
        quantize_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
