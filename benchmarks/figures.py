"""Draw the speed chart of README, and print the layer tables of docs/benchmarks.md, from benchmarks/results.

python benchmarks/figures.py            # writes docs/images/speed.svg; needs matplotlib
python benchmarks/figures.py --tables   # prints the tables instead
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
LAYERS_OF = "2026-11-30T23:50"  # the run whose rows count today
MODELS = {"dsr1": "DeepSeek-R1", "qwen3-235b": "Qwen3-235B", "qwen3-30b": "Qwen3-30B", "mixtral": "Mixtral 8x7B", "gptoss": "gpt-oss-120b"}
GREEN, LIGHT_GREEN, GREY, BLUE, ORANGE, INK = "#1b7837", "#7fbf7b", "#8c8c8c", "#2166ac", "#e08214", "#222222"


class LayerRow(NamedTuple):
    """One layer and number of tokens: halfbyte beside the fastest other system on the same weights, in us."""

    model: str
    num_tokens: int
    floor: float
    ours: float
    ours_fp8: float
    peer: float
    peer_name: str
    peer_fp8: float | None


def layer_rows(weights: str) -> list[LayerRow]:
    """Every layer in `weights` ("nvfp4" or "mxfp4"), by model and tokens."""
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in (RESULTS / "h200.jsonl").read_text().splitlines():
        record = json.loads(line)
        row = record["row"]
        if record["environment"]["date"].startswith(LAYERS_OF) and row["format"] == weights and row["status"] == "ok":
            rows.setdefault((row["shape"], row["num_tokens"]), []).append(row)
    return [_layer_row(MODELS[model], num_tokens, rows[model, num_tokens]) for model, num_tokens in sorted(rows, key=_order)]


def _order(key: tuple[str, int]) -> tuple[int, int]:
    return list(MODELS).index(key[0]), key[1]


def _layer_row(model: str, num_tokens: int, rows: list[dict[str, Any]]) -> LayerRow:
    ours = {row["activations"]: row for row in rows if row["system"] == "halfbyte"}
    peers = [row for row in rows if row["system"] != "halfbyte"]
    exact = min((row for row in peers if row["activations"] == "bf16"), key=lambda row: row["median_us"])
    fp8 = min((row["median_us"] for row in peers if row["activations"] == "fp8"), default=None)
    times = (ours["bf16"]["median_us"], ours["fp8"]["median_us"])
    return LayerRow(model, num_tokens, ours["bf16"]["floor_us"], *times, exact["median_us"], exact["system"], fp8)


def tables() -> Iterator[str]:
    """The lines of the two tables."""
    yield "| NVFP4 layer | tokens | floor, us | halfbyte, us | of floor | fastest peer, us | peer | faster by | halfbyte fp8, us | faster by |"
    yield "|---|---:|---:|---:|---:|---:|---|---:|---:|---:|"
    for row in layer_rows("nvfp4"):
        fraction, faster, faster_fp8 = f"{row.floor / row.ours:.0%}".replace("%", " %"), row.peer / row.ours, row.peer / row.ours_fp8
        cells = (f"{row.floor:.0f}", f"{row.ours:.0f}", fraction, f"{row.peer:.0f}", row.peer_name, f"{faster:.2f}x", f"{row.ours_fp8:.0f}")
        yield f"| {row.model} | {row.num_tokens:,} | {' | '.join(cells)} | {faster_fp8:.2f}x |"
    yield ""
    bf16, fp8 = "halfbyte, us | of floor | fastest peer, us | peer | faster by", "halfbyte fp8, us | humming fp8, us | faster by"
    yield f"| MXFP4 layer | tokens | floor, us | {bf16} | {fp8} |"
    yield "|---|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|"
    for row in layer_rows("mxfp4"):
        fraction, faster = f"{row.floor / row.ours:.0%}".replace("%", " %"), row.peer / row.ours
        assert row.peer_fp8 is not None, row
        cells = (f"{row.floor:.0f}", f"{row.ours:.0f}", fraction, f"{row.peer:.0f}", row.peer_name, f"{faster:.2f}x")
        cells += (f"{row.ours_fp8:.0f}", f"{row.peer_fp8:.0f}")
        yield f"| {row.model} | {row.num_tokens:,} | {' | '.join(cells)} | {row.peer_fp8 / row.ours_fp8:.2f}x |"


class EngineSpeed(NamedTuple):
    """One engine with halfbyte: its speed over the engine's own Marlin, by workload."""

    name: str
    factors: dict[str, float]


def engine_speeds() -> list[EngineSpeed]:
    """vLLM and SGLang, bf16 activations: prefill of 256 prompts of 1,024 tokens, and decoding with 1 to 256 sequences."""
    return [EngineSpeed("vLLM 0.26.0", _speedups("vllm 0.26.0", "stock")), EngineSpeed("SGLang 0.5.17", _speedups("sglang 0.5.17", "marlin"))]


def _speedups(engine: str, marlin: str) -> dict[str, float]:
    """Of halfbyte in the last run with Qwen3-30B whose first system, which speed-ups are over, is Marlin by this name."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in (RESULTS / "serve-h200.jsonl").read_text().splitlines():
        record = json.loads(line)
        runs.setdefault(record["environment"]["date"], []).append(record["row"])
    of_marlin = [rows for rows in runs.values() if (rows[0]["model"], rows[0]["engine"], rows[0]["system"]) == ("qwen3-30b", engine, marlin)]
    ours = [row for row in of_marlin[-1] if row["system"] == "halfbyte" and "workload" in row]
    speeds = {(row["workload"]["kind"], row["workload"]["num_prompts"]): row["speedup"] for row in ours}
    return {"prefill": speeds["prefill", 256]} | {f"{number} seq.": speeds["decode", number] for number in (1, 16, 64, 256)}


def draw_speed(file: Path) -> None:
    """The picture of README: whole models on the left, one layer on the right, both over what they are compared with."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "halfbyte", "font.size": 10, "axes.edgecolor": GREY, "text.color": INK})
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    engines, layers = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_engines(engines)
    _draw_layers(layers)
    for axes in (engines, layers):
        axes.axhline(1, color=INK, linewidth=1)
        axes.set_ylim(0, 2.5)
        axes.set_yticks((0, 0.5, 1, 1.5, 2, 2.5))
        axes.yaxis.set_major_formatter("{x:.1f}x")
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
    figure.savefig(file, metadata={"Date": None})


def _draw_engines(axes: Any) -> None:
    speeds, width = engine_speeds(), 0.38
    for index, (speed, colour) in enumerate(zip(speeds, (GREEN, LIGHT_GREEN), strict=True)):
        places = [place + (index - 0.5) * width for place in range(len(speed.factors))]
        bars = axes.bar(places, speed.factors.values(), width * 0.92, color=colour, label=speed.name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.set_xticks(range(len(speeds[0].factors)), list(speeds[0].factors))
    axes.set_title("Whole model: speed over the engine's own Marlin\nQwen3-30B-A3B sizes, NVFP4, one H200", fontsize=10)
    axes.set_xlabel("decoding: sequences at once", fontsize=9)
    axes.legend(frameon=False, loc="upper right", ncols=2, fontsize=9)


def _draw_layers(axes: Any) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in layer_rows("nvfp4"):
        lines.setdefault(row.model, []).append((row.num_tokens, row.peer / row.ours))
    styles = zip(lines, (GREEN, BLUE, ORANGE, "#762a83"), ("o", "s", "^", "D"), strict=True)
    for model, colour, marker in styles:
        axes.plot(*zip(*lines[model], strict=True), color=colour, marker=marker, markersize=4, linewidth=1.8, label=model)
    axes.set_xscale("log", base=4)
    ticks = (1, 4, 16, 64, 256, 1024, 4096, 16384)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title("One layer: speed over the fastest of humming and Marlin\nNVFP4 weights, bf16 activations, one H200", fontsize=10)
    axes.set_xlabel("tokens", fontsize=9)
    axes.legend(frameon=False, loc="lower left", ncols=2, fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="print the tables of docs/benchmarks.md")
    if parser.parse_args().tables:
        print("\n".join(tables()))
    else:
        draw_speed(IMAGES / "speed.svg")


if __name__ == "__main__":
    main()
