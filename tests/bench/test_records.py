"""Results survive the file; tables and plots show what they hold."""

from dataclasses import replace

import pytest
import torch

from halfbyte.bench.ceilings import Ceilings
from halfbyte.bench.plot import plot_fractions
from halfbyte.bench.records import Record, Row, append, environment, latest, read, render, tables
from halfbyte.errors import InputError

CEILINGS = Ceilings(4600.0, 4000.0, 787.0, 1425.0)
ROW = Row(
    shape="dsr1",
    format="nvfp4",
    activations="bf16",
    routing="uniform",
    num_tokens=16,
    system="halfbyte",
    status="ok",
    experts_touched=100.5,
    floor_us=540.0,
    bound="memory",
    global_limit=5e-3,
    calls=8,
    weight_sets=1,
    kernel="hopper",
    median_us=600.0,
    spread=0.01,
    samples=40,
    timer="cuda graph",
    fraction=0.9,
    token_error=4e-3,
    global_error=3e-3,
    peak_extra_bytes=3 << 20,
)
REFUSED = replace(ROW, system="wrong", status="refused", reason="the result is wrong", median_us=None, spread=None, fraction=None, kernel="")


@pytest.fixture
def record():
    return Record(environment(torch.device("cpu"), ["halfbyte", "bench", "moe", "--peers", "a b"]), CEILINGS, ROW)


def test_round_trip_and_append_only(tmp_path, record):
    file = tmp_path / "results.jsonl"
    append(file, record)
    before = file.read_bytes()
    append(file, replace(record, row=REFUSED))
    assert file.read_bytes().startswith(before) and file.read_text().count("\n") == 2
    assert read(file) == [record, replace(record, row=REFUSED)]


def test_environment_says_what_ran(record):
    described = record.environment
    assert described["torch"] == torch.__version__ and described["halfbyte"] and described["command"] == "halfbyte bench moe --peers 'a b'"
    assert described["date"].endswith("+00:00") and "commit" in described


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"environment": {}, "ceilings": {}, "row": {}}'])
def test_damaged_files_are_named(tmp_path, line, record):
    file = tmp_path / "results.jsonl"
    append(file, record)
    with file.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(InputError, match=r"results.jsonl:2: not a row"):
        read(file)
    with pytest.raises(InputError, match="no such results file"):
        read(tmp_path / "absent.jsonl")


def test_table(record):
    few = replace(record, row=replace(ROW, num_tokens=1))
    loose = replace(record, row=replace(ROW, system="torch", global_limit=7e-3))
    lines = render(tables([record, replace(record, row=REFUSED), loose, few])).splitlines()
    assert lines[0] == "### dsr1 NVFP4, bf16 activations, uniform routing"
    assert "read 4600 GB/s" in lines[2] and "fp8 1425 TFLOP/s" in lines[2]
    assert lines[6].startswith("| 1 | halfbyte |")
    assert lines[7] == "| 16 | halfbyte | 600.0 | 1.0% | 540.0 | 90.0% | memory | 3.0e-03 | 100.5 | 3.0 | hopper |"
    assert lines[8] == "| 16 | wrong | refused | - | 540.0 | - | memory | 3.0e-03 | 100.5 | 3.0 | - |"
    assert lines[11:] == [
        "- wrong at 16 tokens refused: the result is wrong",
        "- torch was allowed an error of 7e-03; the standard is 5e-03",
    ]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_runs_are_kept_apart(record):
    later = replace(record, environment=record.environment | {"date": "2030-01-01T00:00:00+00:00"})
    other = replace(later, row=replace(ROW, routing="skewed"))
    groups = tables([record, later, other])
    assert [len(group) for group in groups] == [1, 1, 1]
    assert latest(groups) == [[later], [other]]


def test_plot(tmp_path, record):
    compute = replace(record, row=replace(ROW, num_tokens=4096, bound="compute"))
    other = [replace(record, row=replace(ROW, shape=f"s{index}")) for index in range(3)]
    plot_fractions(tables([record, replace(record, row=REFUSED), compute, *other]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
