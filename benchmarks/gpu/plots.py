"""Plots of a run: speed and fraction of the floor against the number of tokens, decode time against the batch, that of the
experts against the tokens.

python -m benchmarks.gpu.plots DIR/gpu.json --out benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_attn.cli.plot import ANOTHER, COLOURS

from .readme import PLOTS
from .targets import OURS, Row, fraction_of_floor, rows_of

# Of the attention, each with the step that measures it.
PASSES = {"forward": "forward", "backward": "backward"}
NAMES = tuple(PLOTS)
FLOOR_LABEL = "floor: the bytes at the copy bandwidth of the same run"


def sweep(rows: list[Row], along: str) -> list[Row]:
    """The rows whose shapes differ in `along` alone: of several such sets, the one with the most points."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["median_ms"] and along in row["shape"]:
            rest = tuple(sorted((name, size) for name, size in row["shape"].items() if name != along))
            groups.setdefault((row["dtype"], rest), []).append(row)
    return max(groups.values(), key=lambda group: len({row["shape"][along] for row in group}), default=[])


def lines(
    rows: list[Row], along: str, y: Callable[[Row], float | None]
) -> dict[str, list[tuple[int, float]]]:
    """By provider, the points; ours once for each backend that was asked for beside "auto"."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        value = y(row)
        if value is not None:
            name = row["provider"]
            if name == OURS and row["op"] == "decode":
                name = f"{OURS}, {row['backend']}"
            found.setdefault(name, {})[row["shape"][along]] = value
    return {name: sorted(points.items()) for name, points in found.items()}


def save_plots(document: dict[str, Any], directory: Path) -> Iterator[Path]:
    """Writes those of which there are figures."""
    directory.mkdir(parents=True, exist_ok=True)
    attention = {
        pass_: sweep(
            [r for r in rows_of(document, step) if r["op"] == "attention" and r["pass"] == pass_], "T"
        )
        for pass_, step in PASSES.items()
    }
    attention = {pass_: rows for pass_, rows in attention.items() if rows}
    decode = sweep([r for r in rows_of(document, "decode") if r["pass"] == "forward"], "B")
    if attention:
        figure, panels = _figure(document, len(attention))
        for axes, (pass_, rows) in zip(panels, attention.items(), strict=True):
            _draw(axes, lines(rows, "T", _tokens_per_second))
            axes.set(yscale="log", xlabel="T", ylabel="million tokens a second")
            axes.set_title(f"{pass_}, {_rest(rows[0], 'T')}", loc="left", size=9)
        yield _save(figure, directory / NAMES[0])
        figure, panels = _figure(document, len(attention))
        for axes, (pass_, rows) in zip(panels, attention.items(), strict=True):
            _draw(axes, lines(rows, "T", lambda row: fraction_of_floor(row, document)))
            axes.axhline(1, color="black", linewidth=1, linestyle="--", label=FLOOR_LABEL)
            axes.set(xlabel="T", ylabel="fraction of the floor's speed", ylim=(0, None))
            axes.set_title(f"{pass_}, {_rest(rows[0], 'T')}", loc="left", size=9)
        yield _save(figure, directory / NAMES[1])
    if decode:
        yield _save(_times(document, decode, "B", "sequences"), directory / NAMES[2])
    experts = sweep([r for r in rows_of(document, "expert_decode") if r["pass"] == "graph"], "T")
    if experts:
        yield _save(_times(document, experts, "T", "tokens"), directory / NAMES[3])


def _times(document: dict[str, Any], rows: list[Row], along: str, label: str) -> Figure:
    """Of a step, beside the floor."""
    figure, (axes,) = _figure(document, 1)
    _draw(axes, lines(rows, along, lambda row: 1e3 * row["median_ms"]))
    if bandwidth := document.get("copy_bytes_per_s"):
        floor = sorted({(row["shape"][along], 1e6 * row["bytes"] / bandwidth) for row in rows})
        axes.plot(*zip(*floor, strict=True), color="black", linewidth=1, linestyle="--", label=FLOOR_LABEL)
    axes.set(yscale="log", xlabel=label, ylabel="microseconds of a step")
    axes.set_title(f"{rows[0]['op']}, {_rest(rows[0], along)}", loc="left", size=9)
    return figure


def _tokens_per_second(row: Row) -> float:
    return row["shape"].get("B", 1) * row["shape"]["T"] / row["median_ms"] / 1e3


def _rest(row: Row, along: str) -> str:
    sizes = (f"{name}={size}" for name, size in row["shape"].items() if name != along)
    return ", ".join([row["dtype"], *sizes])


def _figure(document: dict[str, Any], panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.5 * panels, 4.2), layout="constrained")
    title = (document.get("device") or {}).get("name") or "unknown device"
    figure.suptitle("DRY RUN, no figures of a GPU" if document["dry"] else title, size=10)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _draw(axes: Axes, series: dict[str, list[tuple[int, float]]]) -> None:
    for name, points in series.items():
        provider, _, backend = name.partition(", ")
        axes.plot(
            *zip(*points, strict=True),
            marker="o",
            markersize=4,
            linestyle="-" if backend in ("", "cuda") else ":",
            color=COLOURS.get(provider, ANOTHER),
            linewidth=2 if provider == OURS else 1.2,
            label=name,
        )
    axes.set_xscale("log")
    sizes = sorted({x for points in series.values() for x, _ in points})
    axes.set_xticks(sizes, [f"{x // 1024}k" if x >= 1024 and not x % 1024 else str(x) for x in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    for axes in figure.axes:
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="directory for the PNGs")
    options = parser.parse_args()
    for path in save_plots(json.loads(options.result.read_text()), options.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
