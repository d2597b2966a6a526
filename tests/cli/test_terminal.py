import os

import pytest
import torch

from halfbyte.checkpoint.source import demo_model_dir
from halfbyte.cli.terminal import load_model
from halfbyte.errors import CheckpointError


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("special_tokens_map.json", lambda file: file.symlink_to("gone"), "a link that leads nowhere"),
        ("generation_config.json", lambda file: file.symlink_to("generation_config.json"), "a link that leads nowhere"),
        ("chat_template.jinja", os.mkfifo, "not a regular file"),
        ("tokenizer.model", lambda file: file.mkdir(), "not a regular file"),
    ],
)
def test_what_transformers_would_wait_for_or_pass_over(tmp_path, name, make, said):
    for file in demo_model_dir().iterdir():
        (tmp_path / file.name).symlink_to(file)
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: {said}"):
        load_model(str(tmp_path), torch.device("cpu"))
