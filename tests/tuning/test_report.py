"""What `halfbyte tune --report` says of races whose times are known."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from races import Racing, layer

from halfbyte.cli.main import main
from halfbyte.errors import InputError
from halfbyte.kernels.tuned import read
from halfbyte.tuning import report
from halfbyte.tuning.plot import plot, rivals
from halfbyte.tuning.run import load, tune
from halfbyte.tuning.store import write_table


def test_the_summary_is_by_activations_and_routing(tmp_path: Path) -> None:
    list(tune([layer()], Racing(), directory=tmp_path))
    (table,) = load([layer()], tmp_path)
    races = table.layers[0].races
    regrets = [race.times[race.default][0] / min(times[0] for times in race.times.values()) for race in races]
    gains = [race.default_us / race.us for race in races if race.config is not None and race.us and race.default_us]
    lines = report.summary(table.layers).splitlines()
    assert [line.split(" | ")[1] for line in lines[4:7]] == ["uniform", "skewed", "one-expert"]
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert cells[:3] == ["bf16", "uniform", str(len(races))]
    assert cells[4:] == [f"{max(regrets):.3f}", str(sum(regret > 1.03 for regret in regrets))]
    assert gains and lines[-1] == f"Buckets with a faster configuration: {len(gains)}, by {min(gains):.3f} to {max(gains):.3f}."
    assert all(f"| {race.bucket} | {race.num_tokens} | {race.default} | {race.taken} |" in report.render([table]) for race in races)


def test_a_rival_is_judged_by_the_routing_that_suits_it_least(tmp_path: Path) -> None:
    list(tune([layer()], Racing(), directory=tmp_path))
    race = load([layer()], tmp_path)[0].layers[0].races[0]
    times = {race.default: [10.0, 20.0], "other": [9.0, 24.0], "failed": []}
    assert rivals(replace(race, times=times)) == {"other": 1.2}
    assert rivals(replace(race, times={"other": [9.0, 24.0]})) == {}


def test_nothing_raced_is_said() -> None:
    assert report.summary([]) == "no races"


def test_what_a_table_leaves_out_or_misnames_stops_no_report(tmp_path: Path) -> None:
    list(tune([layer()], Racing(), directory=tmp_path))
    (table,) = load([layer()], tmp_path)
    (known,) = table.layers
    odd = replace(known, key=replace(known.key, format="\x1b[2J"), ceilings={"read_gbps": 1.0})
    printed = report.render([replace(table, layers=(odd, replace(known, ceilings={"read_gbps": None}), replace(odd, ceilings=known.ceilings)))])
    assert printed.count("### ") == 3 and "\x1b" not in printed
    plot([replace(table, layers=(odd, known))], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="nothing to plot"):
        plot([replace(table, layers=())], tmp_path / "plot.png")


def test_a_file_has_the_races_of_one_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    list(tune([layer()], Racing(), directory=tmp_path))
    (table,) = load([layer()], tmp_path)
    for name in ("one", "other"):
        write_table(replace(table, device=replace(table.device, name=name)), tmp_path / f"{name}.json")
    files, export = [str(tmp_path / "one.json"), str(tmp_path / "other.json")], ["--export", str(tmp_path / "out.json")]
    assert main(["tune", "--report", *files, *export]) == 1
    assert "--export: a file has the races of one GPU (given one, other)" in capsys.readouterr().err and not (tmp_path / "out.json").exists()
    assert main(["tune", "--report", files[0], *export]) == 0 and read(tmp_path / "out.json").device.name == "one"


def test_a_plot_without_matplotlib_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("halfbyte.bench.picture", "halfbyte.tuning.plot"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["tune", "--name", "mixtral", "--plot", str(tmp_path / "plot.png")]) == 3
    assert "the plot needs matplotlib. Run: pip install 'halfbyte[bench]'" in capsys.readouterr().err
