"""`--plot`: bytes and time of every operation, against ranks and against tokens."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from lightning_attn.cli.case import FORWARD

from .operations import OPERATIONS, Row

COLOURS = dict(
    zip(
        OPERATIONS,
        ("#d9480f", "#f59f00", "#4c6ef5", "#1c2f9c", "#91a7ff", "#0b7285", "#9c36b5", "#2b8a3e", "#82c91e"),
        strict=True,
    )
)
DASHED = (
    "softmax, ring, zigzag",
    "softmax, all-gather, zigzag",
    "softmax, head all-to-all",
)  # on top of others
FEW = 64  # ranks, against tokens: as many as heads


def save_plot(rows: list[Row], path: Path, note: str) -> None:
    """The forward: top, bytes that the busiest rank receives; below, compute and exposed communication of a layer."""
    tokens = max(row.tokens for row in rows)
    ranks = max((row.ranks for row in rows if row.ranks <= FEW), default=min(row.ranks for row in rows))
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for column, (x, fixed, of) in enumerate(
        (("ranks", "tokens", tokens), ("tokens", "ranks", ranks)),
    ):
        chosen = [
            row for row in rows if getattr(row, fixed) == of and row.pass_ == FORWARD and not row.impossible
        ]
        for row_, (y, scale, label) in enumerate(
            (
                ("received_max", 2**30, "GiB that the busiest rank receives"),
                ("time", 1e-3, "ms of a layer: compute + exposed"),
            )
        ):
            ax = axes[row_, column]
            for name in OPERATIONS:
                points = [
                    (getattr(row, x), getattr(row, y) / scale) for row in chosen if row.operation == name
                ]
                points = [point for point in points if point[1] > 0]
                if points:
                    ax.plot(
                        *zip(*points, strict=True),
                        marker="o",
                        linestyle="--" if name in DASHED else "-",
                        markersize=3,
                        color=COLOURS[name],
                        label=name,
                    )
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xlabel(x)
            ax.set_title(f"{of:,} {fixed}", loc="left")
            ax.spines[["top", "right"]].set_visible(False)
            if not column:
                ax.set_ylabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(f"Forward. {note}", x=0.01, ha="left", size=11)
    figure.savefig(path, dpi=150)
