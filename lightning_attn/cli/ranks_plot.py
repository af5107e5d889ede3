"""`ranks --plot`: a PNG per op, the time of the ranks over that of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .report import shape_name, three_digits


def save_plots(document: dict[str, Any], directory: Path) -> Iterator[Path]:
    for op in dict.fromkeys(row["op"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["op"] == op and row["ratio"] is not None]
        if rows:
            path = directory / f"{op}.png"
            _plot(document, rows, path)
            yield path


def _plot(document: dict[str, Any], rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(9, 0.32 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        axes.barh(y, row["ratio"], 0.8, color="#d9480f")
        text = f"{three_digits(row['ranks_ms'])} ms; one process {three_digits(row['one_process_ms'])} ms"
        axes.annotate(text, (row["ratio"], y), (4, 0), textcoords="offset points", va="center", size=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.axvline(rows[0]["target"], color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(rows)), [f"{row['case']}, {row['pass']}" for row in rows], size=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.6 * max(row["ratio"] for row in rows))
    axes.set_xlabel(
        f"time on {document['ranks']} ranks over that of one process, {document['threads']} threads both (dashed: the target)"
    )
    title = f"{rows[0]['op']}, {rows[0]['dtype']}, {shape_name(rows[0]['shape'])}: shorter is faster"
    axes.set_title(title, loc="left", size=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
