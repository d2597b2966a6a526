"""The tables of docs/benchmarks.md and README's chart are those of the recorded rows."""

from __future__ import annotations

from pathlib import Path

from benchmark_scripts import load_script

figures = load_script("figures")
PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def test_the_page_has_the_recorded_rows() -> None:
    page = PAGE.read_text().splitlines()
    missing = [line for line in figures.tables() if line not in page]
    assert not missing, "run: python benchmarks/figures.py --tables"


def test_speeds_of_engines_are_over_their_marlin() -> None:
    vllm, sglang = figures.engine_speeds()
    assert list(vllm.factors) == list(sglang.factors) == ["prefill", "1 seq.", "16 seq.", "64 seq.", "256 seq."]
    assert round(vllm.factors["prefill"], 2) == 1.82 and round(sglang.factors["64 seq."], 2) == 1.36


def test_the_chart_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "speed.svg"
    figures.draw_speed(file)
    assert file.read_text().rstrip().endswith("</svg>")
