"""Built-in peers compute the layer; a peer file is found, or the reason told."""

import pytest
import torch

from halfbyte import MXFP4, NVFP4
from halfbyte.bench.gate import PEER_LIMIT, PEER_SPREAD, Allowance, expected_output, judge
from halfbyte.bench.inputs import random_call, random_experts
from halfbyte.bench.peers import BUILT_IN, find_peer
from halfbyte.bench.shapes import MoEShape
from halfbyte.errors import InputError
from halfbyte.experts import GPT_OSS_SWIGLU, SWIGLU

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(("format", "activation", "has_bias"), [(NVFP4, SWIGLU, False), (MXFP4, GPT_OSS_SWIGLU, True)])
@pytest.mark.parametrize("num_tokens", [1, 9])
def test_built_in_peers_are_right(name, format, activation, has_bias, num_tokens):
    shape = MoEShape("small", 128, 64, 6, 3, activation, has_bias)
    experts = random_experts(shape, format, CPU, seed=1)
    call = random_call(shape, num_tokens, "one-expert", CPU, seed=2)
    layer = find_peer(name).load()(experts, shape)
    verdict = judge(layer(*call), expected_output(experts, call, "bf16"), *Allowance(PEER_LIMIT, PEER_SPREAD).limits(num_tokens))
    assert verdict.passed, verdict


def test_a_peer_file_is_loaded_once(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("calls = []\ndef build(weights, shape): return calls\ndef other(weights, shape): return 'other'\n")
    peer = find_peer(str(file))
    assert peer.name == "mine" and peer.load()(None, None) is peer.load()(None, None)
    named = find_peer(f"{file}:other")
    assert named.name == "other" and named.load()(None, None) == "other"


def test_unknown_peers(tmp_path):
    with pytest.raises(InputError, match=r"unknown peer \(given 'vllm'; needed torch or reference or FILE.py:FUNCTION"):
        find_peer("vllm")
    with pytest.raises(InputError, match="no such peer file"):
        find_peer(f"{tmp_path}/absent.py:build")
