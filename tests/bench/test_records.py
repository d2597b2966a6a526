"""Results survive the file, whatever benchmark wrote them; tables and plots show what they hold."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from halfbyte.bench.moe import MoERow
from halfbyte.bench.plot import plot_fractions
from halfbyte.bench.prepare import PrepareRow
from halfbyte.bench.quantize import QuantizeCase, QuantizeRow
from halfbyte.bench.records import ROW_MODULES, Record, append, environment, latest, read, render, tables
from halfbyte.cli.bench import BENCHMARKS
from halfbyte.cli.main import main
from halfbyte.errors import CheckpointError, InputError

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
CEILINGS = {"read_gbps": 4600.0, "copy_gbps": 4000.0, "bf16_tflops": 787.0, "fp8_tflops": 1425.0}
ROW = MoERow(
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


PREPARE = PrepareRow("dsr1", "nvfp4", "hopper", "torch", 256, "ok", ms=900.0, gbps=12.0, copy_fraction=3e-3, extra_bytes=1 << 20, speedup=40.0)
QUANTIZE = QuantizeRow(QuantizeCase(64, 7168, "mxfp4", "128x4", 40), "search", "ok", 10**6, median_us=5.0, spread=0.02, gbps=200.0, fraction=0.05)


@pytest.fixture
def record():
    return Record("moe", environment(torch.device("cpu"), ["halfbyte", "bench", "moe", "--peers", "a b"]), CEILINGS, ROW)


@pytest.fixture
def of_each(record):
    """A record of every benchmark."""
    copy = {"copy_gbps": 4000.0}
    return [record, replace(record, benchmark="prepare", ceilings=copy, row=PREPARE), replace(record, benchmark="quantize", row=QUANTIZE)]


def test_every_benchmark_of_the_command_line_has_rows():
    assert {*ROW_MODULES, "report"} == {*BENCHMARKS}


def test_round_trip_and_append_only(tmp_path, of_each):
    file = tmp_path / "results.jsonl"
    append(file, of_each[0])
    before = file.read_bytes()
    for record in of_each[1:]:
        append(file, record)
    assert file.read_bytes().startswith(before) and file.read_text().count("\n") == 3
    assert read(file) == of_each and [type(record.row) for record in read(file)] == [MoERow, PrepareRow, QuantizeRow]


def test_progress_names_subject_size_system_and_outcome(of_each):
    assert [str(record) for record in of_each] == [
        "dsr1 NVFP4, bf16 activations, uniform routing, 16 tokens, halfbyte: 600.0 us, 90.0% of the memory floor",
        "dsr1 NVFP4, layout hopper, 1 layer, torch: 900.00 ms per layer of 256 experts, 0.3% of the copy bandwidth",
        "K 7168 to MXFP4, scales 128x4, 40 experts, 64 rows, search: 5.0 us, 200 GB/s, 5.0% of the copy bandwidth",
    ]
    refused = replace(of_each[0], row=REFUSED)
    assert str(refused) == "dsr1 NVFP4, bf16 activations, uniform routing, 16 tokens, wrong: refused: the result is wrong"


def test_environment_says_what_ran(record):
    described = record.environment
    assert described["torch"] == torch.__version__ and described["halfbyte"] and described["command"] == "halfbyte bench moe --peers 'a b'"
    assert described["date"].endswith("+00:00") and "commit" in described


def test_lines_of_november_2026_still_read():
    """`bench prepare` wrote its ceiling beside the row, and had no layers."""
    (record, *_) = read(RESULTS / "prepare-h100.jsonl")
    assert record.ceilings == {"copy_gbps": 3024.7270261846984} and record.environment["commit"] == "8c13960"
    assert record.row == PrepareRow(
        "dsr1", "nvfp4", "hopper", "naive", 4, "ok", 1, "", 638.3816339999839, 0.31051336918631495, 0.00010265831147678386, 275206080, 1.0
    )
    (record, *_) = read(RESULTS / "quantize-h200.jsonl")
    assert record.row.case == QuantizeCase(64, 4096, "nvfp4", "128x4", 0) and record.row.median_us == 2.213000087067485
    assert record.ceilings["fp8_tflops"] == 1363.8063725699485


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: "{", "not a line of halfbyte bench"),
        (lambda line: [], "not a line of halfbyte bench"),
        (lambda line: {}, "not a line of halfbyte bench"),
        (
            lambda line: line | {"benchmark": "tiles"},
            r"not a benchmark of halfbyte bench \(given 'tiles'; needed moe or .* or serve\)",
        ),
        (lambda line: line | {"benchmark": ["moe"]}, "not a benchmark"),
        (lambda line: line | {"benchmark": "quantize"}, "not a row of halfbyte bench quantize"),
        (lambda line: line | {"environment": {}}, "not a row of halfbyte bench moe .given KeyError: 'date'"),
        (lambda line: line | {"environment": None}, "not a row of halfbyte bench moe"),
        (lambda line: line | {"ceilings": None}, "not a row of halfbyte bench moe"),
        (lambda line: line | {"row": []}, "not a row of halfbyte bench moe"),
        (lambda line: line | {"row": line["row"] | {"colour": "red"}}, "colour"),
        (lambda line: {name: part for name, part in line.items() if name != "ceilings"}, "KeyError: 'ceilings'"),
        (lambda line: line | {"row": line["row"] | {"median_us": "4"}}, "row.median_us is '4', no float"),
        (lambda line: line | {"row": line["row"] | {"format": ["nvfp4"]}}, r"row.format is \['nvfp4'\], no str"),
        (lambda line: line | {"ceilings": {"read_gbps": 10**400}}, "ceilings.read_gbps is 1000"),
        (lambda line: line | {"environment": line["environment"] | {"date": None}}, "environment.date is None"),
    ],
)
def test_damaged_lines_are_named(tmp_path, change, message, record):
    file = tmp_path / "results.jsonl"
    append(file, record)
    changed = change(asdict(record))
    with file.open("a") as stream:
        stream.write((changed if changed == "{" else json.dumps(changed)) + "\n")
    with pytest.raises(InputError, match=f"results.jsonl:2: .*{message}"):
        read(file)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match="no such results file"):
        read(tmp_path / "absent.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    for file in (tmp_path / "binary.jsonl", tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match=f"{file}: cannot read the file"):
            read(file)


def test_no_name_drives_a_terminal(record):
    row = replace(ROW, system="\x1b[2J")
    assert "\x1b" not in render(tables([replace(record, row=row), replace(record, row=replace(REFUSED, reason="\x1b[2J"))]))


def test_table(record):
    few = replace(record, row=replace(ROW, num_tokens=1))
    loose = replace(record, row=replace(ROW, system="torch", global_limit=7e-3))
    lines = render(tables([record, replace(record, row=REFUSED), loose, few])).splitlines()
    assert lines[0] == "### dsr1 NVFP4, bf16 activations, uniform routing"
    assert lines[2].endswith("measured ceilings: read 4600 GB/s, copy 4000 GB/s, bf16 787 TFLOP/s, fp8 1425 TFLOP/s")
    assert lines[4] == "| tokens | system | us | spread | floor us | of floor | bound | error | allowed | experts | extra MiB | kernel |"
    assert lines[6].startswith("| 1 | halfbyte |")
    assert lines[7] == "| 16 | halfbyte | 600.0 | 1.0% | 540.0 | 90.0% | memory | 3.0e-03 | 5.0e-03 | 100.5 | 3.0 | hopper |"
    assert lines[8] == "| 16 | wrong | refused | - | 540.0 | - | memory | 3.0e-03 | 5.0e-03 | 100.5 | 3.0 | - |"
    assert lines[9].startswith("| 16 | torch |") and "| 3.0e-03 | 7.0e-03 |" in lines[9]
    assert lines[11:] == ["- wrong at 16 tokens refused: the result is wrong"]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_reasons_are_given_once(record):
    rows = [replace(REFUSED, num_tokens=tokens, reason=reason) for tokens, reason in ((1, "bad"), (4, "bad"), (1, "worse"))]
    lines = render(tables(replace(record, row=row) for row in rows)).splitlines()
    assert lines[-2:] == ["- wrong at 1, 4 tokens refused: bad", "- wrong at 1 token refused: worse"]


def test_tables_of_the_other_benchmarks(of_each):
    prepare, quantize = (render([[record]]).splitlines() for record in of_each[1:])
    assert prepare[0] == "### dsr1 NVFP4, layout hopper" and prepare[2].endswith("measured ceilings: copy 4000 GB/s")
    assert prepare[4:] == [
        "| layers | system | ms per layer | experts | GB/s | of copy | extra MiB | speed-up |",
        "|---|---|---|---|---|---|---|---|",
        "| 1 | torch | 900.00 | 256 | 12 | 0.3% | 1.0 | 40.0 |",
    ]
    assert quantize[0] == "### K 7168 to MXFP4, scales 128x4, 40 experts"
    assert quantize[4:] == [
        "| rows | system | us | spread | GB/s | of copy |",
        "|---|---|---|---|---|---|",
        "| 64 | search | 5.0 | 2.0% | 200 | 5.0% |",
    ]


def test_runs_are_kept_apart(record):
    later = replace(record, environment=record.environment | {"date": "2030-01-01T00:00:00+00:00"})
    other = replace(later, row=replace(ROW, routing="skewed"))
    elsewhere = replace(later, environment=later.environment | {"device": "another"})
    groups = tables([record, later, other, elsewhere])
    assert [len(group) for group in groups] == [1, 1, 1, 1]
    assert latest(groups) == [[later], [other], [elsewhere]]


def test_plot(tmp_path, record, of_each):
    compute = replace(record, row=replace(ROW, num_tokens=4096, bound="compute"))
    other = [replace(record, row=replace(ROW, shape=f"s{index}")) for index in range(3)]
    plot_fractions(tables([*of_each, replace(record, row=REFUSED), compute, *other]), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    many = [replace(record, row=replace(REFUSED, activations=name)) for name in "abcdefg"]
    with pytest.raises(InputError, match="too many tables for one plot"):
        plot_fractions(tables(many), tmp_path / "many.png")
    with pytest.raises(InputError, match="nothing to plot"):
        plot_fractions(tables(of_each[1:]), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_report_reads_every_results_file(capsys):
    """All that is kept, but for what scripts wrote: sweeps over tiles, comparisons of checkouts."""
    files = sorted(str(file) for file in RESULTS.glob("*.jsonl") if not file.name.startswith(("tiles-", "checkouts-")))
    assert len(files) >= 7 and main(["bench", "report", *files]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("## ")] == [f"## halfbyte bench {name}" for name in ROW_MODULES]
    assert "| 1 | halfbyte, in place | 18.73 | 256 |" in printed and "| 65536 | halfbyte | 306.7 |" in printed
    assert main(["bench", "report", *files, "--all"]) == 0
    layer = "### dsr1 NVFP4, layout hopper\n"
    assert capsys.readouterr().out.count(layer) >= 9 > printed.count(layer) >= 2


def test_report_as_one_document(capsys):
    file = RESULTS / "quantize-h200.jsonl"
    assert main(["bench", "report", str(file), "--all", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row for table in document["tables"] for row in table["rows"]] == [line["row"] for line in lines]
    first = document["tables"][0]
    assert (first["benchmark"], first["subject"]) == ("quantize", "K 4096 to NVFP4, scales 128x4")
    assert (first["environment"], first["ceilings"]) == (lines[0]["environment"], lines[0]["ceilings"])


def test_report_refuses_what_it_cannot_show(tmp_path, capsys):
    assert main(["bench", "report", str(RESULTS / "tiles-h100.jsonl")]) == 1
    captured = capsys.readouterr()
    assert "tiles-h100.jsonl:1: not a benchmark of halfbyte bench (given 'tiles'; needed moe or prepare or quantize" in captured.err
    assert captured.out == ""
    assert main(["bench", "report", str(RESULTS / "prepare-h100.jsonl"), "--plot", str(tmp_path / "plot.png")]) == 1
    assert "nothing to plot" in capsys.readouterr().err and not (tmp_path / "plot.png").exists()
    assert main(["bench", "report", str(RESULTS / "prepare-h100.jsonl"), "--only", "no such layer"]) == 1
    assert "prepare-h100.jsonl: no results about 'no such layer'" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").touch()
    assert main(["bench", "report", str(tmp_path / "empty.jsonl")]) == 1
    assert "empty.jsonl: no results" in capsys.readouterr().err


@pytest.mark.parametrize("write", [lambda file, record: append(file, record), lambda file, record: plot_fractions(tables([record]), file)])
def test_a_file_that_cannot_be_written_is_named(tmp_path, of_each, write):
    with pytest.raises(CheckpointError, match=r"gone/out\.png: cannot write the file"):
        write(tmp_path / "gone" / "out.png", of_each[0])
