"""`bench --plot`: a PNG per op, bars of each case and provider against the limit of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed

from matplotlib import pyplot as plt  # noqa: E402

from .peers import EAGER, OURS, TRANSFORMERS  # noqa: E402
from .report import shape_name  # noqa: E402
from .results import Row  # noqa: E402

COLOURS = {OURS: "#d9480f", EAGER: "#868e96", TRANSFORMERS: "#4c6ef5"}
BAR = 0.22  # inches
GAP = 0.8  # bars, between groups


def save_plots(rows: list[Row], directory: Path) -> Iterator[Path]:
    directory.mkdir(parents=True, exist_ok=True)
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
    figure, axes = plt.subplots(figsize=(9, height + 1.3), layout="constrained")
    y, ticks = 0.0, []
    for group in groups.values():
        ticks.append(y + BAR * (len(group) - 1) / 2)
        for fraction, row in group:
            axes.barh(y, fraction, 0.9 * BAR, color=COLOURS[row.provider])
            text = f"{row.time} ms, {row.rate}"
            axes.annotate(text, (fraction, y), (4, 0), textcoords="offset points", va="center", size=8)
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
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[provider]) for provider in providers]
    figure.legend(handles, list(providers), loc="outside lower right", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
