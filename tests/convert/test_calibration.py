"""Input scales: measured on the real demo model, checked against a computation of their own."""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

import plain_reader
import pytest
import torch
import torch.nn.functional as F

import halfbyte as hb
from halfbyte.checkpoint import load_experts
from halfbyte.convert import QuantizeOptions, quantize_model
from halfbyte.convert import quantize_model as package_function
from halfbyte.convert.calibration import read_texts
from halfbyte.errors import CheckpointError, UnsupportedError

pytest.importorskip("transformers")
DEMO = Path(hb.__file__).parent / "demo_model"
TEXT = "Eric has 129 marbles. He loses 66."
ONE_LAYER = "model.layers.[12345].*"


@pytest.fixture(scope="module")
def expected() -> dict[str, float]:
    """amax of the inputs of layer 0's experts, from what transformers' own implementation is given and the weights of the file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype="auto", experts_implementation="eager")
    given: list[torch.Tensor] = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, inputs: given.extend(inputs))
    with torch.no_grad():
        model(torch.tensor([AutoTokenizer.from_pretrained(DEMO)(TEXT)["input_ids"]]))
    hidden, ids, _ = given
    weights, amax = plain_reader.read_all(DEMO), {}
    for expert in range(16):
        module = f"model.layers.0.mlp.experts.{expert}"
        x = hidden[(ids == expert).any(dim=1)]
        if len(x):
            inner = F.silu(x @ weights[f"{module}.gate_proj.weight"].T) * (x @ weights[f"{module}.up_proj.weight"].T)
            amax |= {f"{module}.gate_proj": x.abs().max().item(), f"{module}.down_proj": inner.abs().max().item()}
    return amax


@pytest.mark.parametrize("output", ["modelopt", "compressed-tensors"])
def test_input_scales_of_the_demo_model(tmp_path: Path, caplog: pytest.LogCaptureFixture, output: str, expected: dict[str, float]) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    options = QuantizeOptions(output=output, calibrate=tmp_path / "text.txt", skip=(ONE_LAYER,))
    report = quantize_model(DEMO, tmp_path / "out", options)
    tensors = plain_reader.read_all(tmp_path / "out")

    def input_scale(module: str) -> float:
        stored = tensors[f"{module}.input_scale" if output == "modelopt" else f"{module}.input_global_scale"]
        assert stored.dtype == torch.float32 and tuple(stored.shape) == (() if output == "modelopt" else (1,))
        return stored.item() if output == "modelopt" else 1 / stored.item()

    layer = "model.layers.0.mlp.experts"
    routed = {expert for expert in range(16) if f"{layer}.{expert}.gate_proj" in expected}
    assert 4 <= len(routed) < 16  # both cases occur
    largest = {leaf: max(value for name, value in expected.items() if name.endswith(leaf)) for leaf in ("gate_proj", "down_proj")}
    for expert in range(16):
        for leaf in ("gate_proj", "down_proj"):
            wanted = expected[f"{layer}.{expert}.{leaf}"] if expert in routed else largest[leaf]
            assert input_scale(f"{layer}.{expert}.{leaf}") == pytest.approx(wanted / (6 * 448), rel=1e-2), (expert, leaf)  # bf16 steps in `inner`
        assert input_scale(f"{layer}.{expert}.up_proj") == input_scale(f"{layer}.{expert}.gate_proj")
    assert report.never_routed == {layer: sorted(set(range(16)) - routed)}
    assert report.calibration_tokens and "never routed to" in str(report)
    assert "calibration: 16 of 16 experts have had fewer than 1000 tokens, the fewest 0" in caplog.text
    weights = load_experts(tmp_path / "out", 0)
    assert weights.w13_input_scale is not None and weights.w13_input_scale.shape == (16, 2)
    algorithm = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert algorithm.get("quant_algo", "NVFP4") == "NVFP4" and algorithm["config_groups"]["group_0"]["input_activations"]


def test_linear_layers_and_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v read one input; a resumed run takes the scales from the journal instead of running the model again."""
    (tmp_path / "text.jsonl").write_text(json.dumps({"question": TEXT, "answer": 63}))
    options = QuantizeOptions(calibrate=tmp_path / "text.jsonl", all_linear=True, skip=(ONE_LAYER,), max_shard_bytes=500_000)

    def stop(done: int, total: int) -> None:
        if list((tmp_path / "out").glob("model-00001-*")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(DEMO, tmp_path / "out", options, progress=stop)
    module = sys.modules[package_function.__module__]
    monkeypatch.setattr(module, "calibrate", lambda *_, **__: pytest.fail("the model ran again"))
    assert quantize_model(DEMO, tmp_path / "out", options).resumed_shards == 1
    tensors = plain_reader.read_all(tmp_path / "out")
    scales = {leaf: tensors[f"model.layers.0.self_attn.{leaf}_proj.input_scale"].item() for leaf in "qkvo"}
    assert scales["q"] == scales["k"] == scales["v"] != scales["o"]
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert "halfbyte_calibration" not in ALL_EXPERTS_FUNCTIONS  # nothing global is left behind


def test_read_texts(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    records = [{"text": "one", "id": 3}, {"prompt": "a", "completion": "b"}, {"messages": [{"role": "user", "content": "hel\u2028lo"}]}]
    file.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n")
    assert read_texts(file) == ["one", "a\nb", "hel\u2028lo"]
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(file.read_bytes()))
    assert read_texts(tmp_path / "a.jsonl.xz") == read_texts(file)
    for content, message in (
        ("", "has no text"),
        ('{"text": "a"}\n{', r"a.jsonl:2: not a JSON line"),
        ('{"id": 1}', r"a.jsonl:1: no text in this line"),
    ):
        file.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            read_texts(file)
    with pytest.raises(CheckpointError, match="cannot read the calibration file"):
        read_texts(tmp_path / "absent.txt")


def test_what_transformers_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfbyte.convert.calibration import calibrate
    from halfbyte.convert.plan import Matrix, Source

    (tmp_path / "text.txt").write_text(TEXT)
    module = "mtp.layers.0.mlp.experts.0.gate_proj"
    extra = Matrix(module, Source(f"{module}.weight", 1, 1), module, "gate", "mtp.layers.0.mlp.experts", 0, "gate")
    with pytest.raises(UnsupportedError, match=r"mtp.layers.0.mlp.experts.0.gate_proj: .*--skip 'mtp.layers.0.mlp.experts.\*'"):
        calibrate(DEMO, [extra], tmp_path / "text.txt")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError, match="calibration needs transformers") as caught:
        calibrate(DEMO, [], tmp_path / "text.txt")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("tokenizer", "message"), [(None, "tokenizer makes no tokens"), ("[]", "transformers cannot run the model: ")])
def test_a_model_that_transformers_cannot_run_is_one_error(tmp_path: Path, tokenizer: str | None, message: str) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    model.mkdir()
    for file in (*DEMO.glob("model*"), DEMO / "config.json"):
        (model / file.name).symlink_to(file)
    if tokenizer is not None:
        (model / "tokenizer.json").write_text(tokenizer)
    text.write_text(TEXT)
    with pytest.raises(CheckpointError, match=f"{message}.*leave --calibrate out"):
        quantize_model(model, tmp_path / "out", QuantizeOptions(calibrate=text))


def test_progress_is_told_in_tokens(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    told: list[tuple[int, int]] = []
    options = QuantizeOptions(calibrate=tmp_path / "text.txt", skip=(ONE_LAYER,))
    report = quantize_model(DEMO, tmp_path / "out", options, calibrating=lambda done, total: told.append((done, total)))
    assert told == [(report.calibration_tokens, report.calibration_tokens)]
