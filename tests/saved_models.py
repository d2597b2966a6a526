"""What a saved checkpoint has to share with the one it was loaded from, file beside file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from helpers import assert_equal_bits
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


def read_tensors(directory: Path) -> Tensors:
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_checkpoint(saved: Path, source: Path, *, absent: frozenset[str] = frozenset()) -> None:
    """The same names, dtypes, shapes and bytes, without `absent`; the same words on quantisation, but for what
    is null or false. Encode multipliers mean the same in fp32."""
    expected, given = read_tensors(source), read_tensors(saved)
    assert given.keys() == expected.keys() - absent
    for name, tensor in given.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        if name.endswith("global_scale"):
            assert torch.equal(1 / tensor, 1 / expected[name]), name
        else:
            assert_equal_bits(torch.atleast_1d(tensor), torch.atleast_1d(expected[name]))
    for file, key in (("config.json", "quantization_config"), ("hf_quant_config.json", "quantization")):
        documents = [json.loads((path / file).read_text()).get(key) if (path / file).exists() else None for path in (saved, source)]
        said, meant = ({name: value for name, value in (document or {}).items() if value not in (None, False)} for document in documents)
        assert said == meant, file


def assert_same_state(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Bit-equal Parameters and buffers."""
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal_bits(torch.atleast_1d(state[name]), torch.atleast_1d(tensor))
