"""`bench --plot`: a PNG per op, bars of each case and provider against the limit of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .moe_peers import GROUPED_MM, LIGER, PER_EXPERT, SOFTMAX_TOPK, TRANSFORMERS_EAGER
from .peers import EAGER, FLA, FLA_LIGHTNING, OURS, SDPA, TRANSFORMERS
from .report import shape_name
from .results import Row

COLOURS = {
    OURS: "#d9480f",
    EAGER: "#868e96",
    TRANSFORMERS: "#4c6ef5",
    FLA: "#2b8a3e",
    FLA_LIGHTNING: "#82c91e",
    SDPA: "#9c36b5",
    PER_EXPERT: "#adb5bd",
    SOFTMAX_TOPK: "#ced4da",
    GROUPED_MM: "#0b7285",
    TRANSFORMERS_EAGER: "#91a7ff",
    LIGER: "#f59f00",
}
ANOTHER = "#212529"
BAR = 0.22  # inches
GAP = 0.8  # bars, between groups
OVER_LINE = {
    "facecolor": "white",
    "edgecolor": "none",
    "pad": 0.5,
}  # figures stay readable on the dashed line


def save_plots(rows: list[Row], directory: Path) -> Iterator[Path]:
    for op in dict.fromkeys(row.op for row in rows):
        groups: dict[str, list[tuple[float, Row]]] = {}
        for row in rows:
            if row.op == op and row.fraction_of_limit is not None:
                label = f"{row.pass_}, {row.dtype}\n{shape_name(row.shape)}"
                groups.setdefault(label, []).append((row.fraction_of_limit, row))
        if groups:
            path = directory / f"{op}.png"
            _plot(op, groups, path)
            yield path


def _plot(op: str, groups: dict[str, list[tuple[float, Row]]], path: Path) -> None:
    bars = [bar for group in groups.values() for bar in group]
    height = BAR * (len(bars) + GAP * len(groups))
    figure = Figure(figsize=(9, height + 1.3), layout="constrained")
    axes = figure.subplots()
    y, ticks = 0.0, []
    for group in groups.values():
        ticks.append(y + BAR * (len(group) - 1) / 2)
        for fraction, row in group:
            axes.barh(y, fraction, 0.9 * BAR, color=COLOURS.get(row.provider, ANOTHER))
            text = f"{row.time} ms, {row.rate}"
            axes.annotate(
                text, (fraction, y), (4, 0), textcoords="offset points", va="center", size=8, bbox=OVER_LINE
            )
            y += BAR
        y += BAR * GAP
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(ticks, list(groups), size=8)
    axes.set_ylim(y - BAR * GAP, -BAR)
    axes.set_xlim(0, 1.3 * max(1.0, *(fraction for fraction, _ in bars)))
    axes.set_xlabel("fraction of the measured limit of this machine (dashed: the limit)")
    axes.set_title(f"{op}: longer is faster", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    providers = dict.fromkeys(row.provider for _, row in bars)
    handles = [Patch(color=COLOURS.get(provider, ANOTHER), label=provider) for provider in providers]
    figure.legend(handles=handles, loc="outside lower right", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
