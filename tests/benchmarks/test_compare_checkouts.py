"""Two checkouts beside one another: what is drawn, in which order it is timed, and what of a difference is found."""

from __future__ import annotations

import doctest
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_scripts import load_script

import halfbyte
from halfbyte.bench.shapes import NAMED_SHAPES
from halfbyte.experts import GPT_OSS_SWIGLU

script = load_script("compare_checkouts")
worker = load_script("checkout_worker")

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[2]
TINY = script.Shape("tiny", 64, 32, 4, 2)
OPTIONS = ["--device", "cpu", "--shapes", "64,32,4,2", "--formats", "nvfp4", "--activations", "bf16", "--rounds", "1"]


def test_examples() -> None:
    assert doctest.testmod(script) == (0, 2)


def test_shapes_are_those_of_the_benchmark() -> None:
    assert script.SHAPES.keys() == NAMED_SHAPES.keys()
    for name, shape in script.SHAPES.items():
        other = NAMED_SHAPES[name]
        assert all(getattr(shape, size) == getattr(other, size) for size in ("hidden", "intermediate", "num_experts", "top_k"))
        assert shape.gpt_oss == other.has_bias == (other.activation == GPT_OSS_SWIGLU) and other.published.name in shape.formats


@pytest.mark.parametrize("gpt_oss", [False, True])
@pytest.mark.parametrize("format", script.FORMATS)
def test_layers_are_the_same_bytes_each_time(format: str, gpt_oss: bool) -> None:
    shape = SimpleNamespace(**asdict(TINY) | {"gpt_oss": gpt_oss})
    first, second = (worker.random_experts(shape, format, CPU) for _ in range(2))
    assert first.format.name == format and (first.activation == GPT_OSS_SWIGLU) == gpt_oss == (first.w13_bias is not None)
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(tensor.view(torch.uint8), second.tensors[name].view(torch.uint8)) for name, tensor in first.tensors.items())
    assert 0.01 < first.w13.dequantize().std() < 0.1 and first.w2.codes.unique().numel() == 256


@pytest.mark.parametrize(("num_tokens", "count"), [(1, 16), (64, 8), (256, 4), (257, 2)])
def test_short_calls_are_many_and_of_different_routings(num_tokens: int, count: int) -> None:
    calls = worker.random_calls(SimpleNamespace(**asdict(script.Shape("wide", 64, 32, 64, 8))), num_tokens, CPU)
    assert len(calls) == count and len({tuple(call.ids.flatten().tolist()) for call in calls}) == count
    for call in calls:
        assert call.hidden.shape == (num_tokens, 64) and call.hidden.dtype == torch.bfloat16 and call.ids.dtype == torch.int32
        assert all(len(set(row)) == 8 for row in call.ids.tolist()) and torch.allclose(call.weights.sum(1), torch.ones(num_tokens))


def test_a_digest_is_of_every_bit_of_sound_results() -> None:
    results = [torch.randn(3, 64).bfloat16() for _ in range(2)]
    changed = [result.clone() for result in results]
    changed[1].view(torch.int16)[2, 63] ^= 1
    assert worker.digest(results) == worker.digest([result.clone() for result in results]) != worker.digest(changed)
    for wrong in (torch.zeros(3, 64), torch.full((3, 64), torch.nan)):
        with pytest.raises(ValueError, match="not finite, or nothing but zeros"):
            worker.digest([results[0], wrong])


class Scripted:
    """A worker whose answers are known; `clock` tells how long a sample takes, `log` who was asked what."""

    def __init__(self, name: str, log: list[tuple[str, str]], clock: Any = None, **answers: dict[str, Any]):
        self.name, self.log, self.clock, self.answers = name, log, clock, answers

    def ask(self, request: str, **arguments: Any) -> None:
        self.log.append((self.name, request))
        self.request, self.repeats = request, arguments.get("repeats")

    def answer(self) -> dict[str, Any]:
        return {"us": self.clock(), "calls": 2} if self.request == "sample" else self.answers.get(self.request, {})


def test_a_drift_of_the_clocks_falls_on_both() -> None:
    log: list[tuple[str, str]] = []
    now = iter(range(100, 200))
    old, new = (Scripted(name, log, lambda: float(next(now))) for name in ("old", "new"))
    samples = script.time_both(old, new, 2)
    assert [name for name, _ in log] == ["old", "new", *["old", "new", "new", "old"] * 2]
    assert samples == ((102, 105, 106, 109), (103, 104, 107, 108))  # the first of each is for the number of repeats
    assert script.Comparison("s", "f", "a", 1, "equal", "", *samples).ratio == 1.0
    assert old.repeats == new.repeats == 20  # 4 ms of 2 calls of 101 us


@pytest.mark.parametrize(
    ("old", "new", "bits", "code"),
    [
        ({"draw": {"digests": ["a", "a"]}}, {"draw": {"digests": ["a", "a"]}}, "equal", 0),
        ({"draw": {"digests": ["a", "a"]}}, {"draw": {"digests": ["b", "b"]}}, "differ", 1),
        ({"draw": {"digests": ["a", "a"]}}, {"draw": {"digests": ["a", "b"]}}, "new varies", 1),
        ({"draw": {"digests": ["a", "a"]}}, {"draw": {"obstacle": "no kernel"}}, "only old", 1),
        ({"build": {"obstacle": "no layout"}}, {}, "only new", 1),
        ({"build": {"obstacle": "no layout"}}, {"build": {"obstacle": "no layout"}}, "neither", 3),
    ],
)
def test_what_becomes_of_the_answers(old: dict[str, Any], new: dict[str, Any], bits: str, code: int) -> None:
    workers = [Scripted(name, [], lambda: 100.0, **answers) for name, answers in (("old", old), ("new", new))]
    rows = list(script.compare(*workers, (TINY, "nvfp4", "fp8"), [1, 16], 1))
    assert [(row.num_tokens, row.bits) for row in rows] == [(1, bits), (16, bits)] and script.exit_code(rows) == code
    was_timed = bits in ("equal", "differ", "new varies")
    assert str(rows[1]) == f"| tiny | nvfp4 | fp8 | 16 | {'100.0 | 100.0 | 1.000' if was_timed else '- | - | -'} | {bits} |"
    lines = script.summary(rows).splitlines()
    assert len(lines) == 2 and lines[-1] == f"{2 * was_timed * (bits != 'equal')} of {2 * was_timed} rows with different bits"
    assert was_timed or lines[0] == f"tiny nvfp4 fp8: {bits} can run it: no {'kernel' if bits == 'only old' else 'layout'}"


def test_the_worst_row_is_named() -> None:
    rows = [script.Comparison("s", "nvfp4", "bf16", tokens, "equal", "", (10.0,), (us,)) for tokens, us in ((1, 9.0), (16, 12.0), (64, 10.0))]
    assert script.summary(rows) == "median ratio 1.000, worst 1.200 (s nvfp4 bf16, T = 16)\n0 of 3 rows with different bits"


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another checkout, for a test to change."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(REPOSITORY / "src/halfbyte", tmp_path / "copy/src/halfbyte", ignore=shutil.ignore_patterns("demo_model", "__pycache__"))
    return tmp_path / "copy"


@pytest.mark.slow
def test_a_slower_and_a_changed_checkout_are_found(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The change is of MXFP4 alone, the delay of both formats."""
    with (copy / "src/halfbyte/__init__.py").open("a") as stream:
        stream.write(
            "\n\ndef fused_moe(*args, **kwargs):\n    import time\n\n    import halfbyte.moe\n\n    time.sleep(0.05)\n"
            "    return halfbyte.moe.fused_moe(*args, **kwargs)\n"
        )
    file = copy / "src/halfbyte/formats/e8m0.py"
    decoded = "bits = exponent << "
    assert decoded in file.read_text()
    file.write_text(file.read_text().replace(decoded, "bits = (exponent + 1) << "))
    out = tmp_path / "rows.jsonl"
    assert script.main([str(REPOSITORY), str(copy), *OPTIONS, "--formats", "nvfp4,mxfp4", "--tokens", "257,300", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "| 64,32,4,2 | nvfp4 | bf16 | 300 | " in printed and printed.endswith("2 of 4 rows with different bits\n")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["row"]["format"], line["row"]["bits"]) for line in lines] == [("nvfp4", "equal")] * 2 + [("mxfp4", "differ")] * 2
    assert all(min(line["row"]["new_samples_us"]) >= 50_000 > min(line["row"]["old_samples_us"]) for line in lines)
    assert all(len(line["row"][f"{side}_samples_us"]) == 2 for line in lines for side in ("old", "new"))
    described = lines[0]["environment"]
    assert described["new"] == f"{halfbyte.__version__} (commit unknown)" and described["torch"] == torch.__version__
    assert described["command"].startswith("python benchmarks/compare_checkouts.py OLD NEW --device cpu --shapes 64,32,4,2 ")


def test_a_checkout_that_cannot_be_imported_ends_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "broken/src/halfbyte"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('half of a checkout')\n")
    (package.parent / "torch.py").write_text("")  # comes before halfbyte, and would take seconds
    with pytest.raises(SystemExit, match=r"the process of .*broken ended, with its error above \(exit code 1\)"):
        script.main([str(tmp_path / "broken"), str(tmp_path / "broken"), *OPTIONS])
    assert "half of a checkout" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", str(REPOSITORY)], "nowhere is no checkout of halfbyte"),
        ([str(REPOSITORY)], "required: NEW"),
        ([str(REPOSITORY), str(REPOSITORY), "--shapes", "qwen9"], "unknown shape 'qwen9'"),
        ([str(REPOSITORY), str(REPOSITORY), "--formats", "int4"], "unknown 'int4'"),
        ([str(REPOSITORY), str(REPOSITORY), "--tokens", "0"], "0 is below 1"),
        ([str(REPOSITORY), str(REPOSITORY), "--rounds", "0"], "0 is below 1"),
    ],
)
def test_wrong_usage_exits_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        script.main(arguments)
    assert message in capsys.readouterr().err
