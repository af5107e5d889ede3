"""The end of a run, as text: the steps and the targets, short enough to be the last that a terminal keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .targets import FLOOR, MICROSECONDS, TFLOPS

WIDTH, TABLE_WIDTH = 110, 150


def summary(document: dict[str, Any]) -> Iterator[str]:
    """The lines."""
    yield from _failures(document)
    yield from document["missing_peers"] or ()
    yield ""
    yield from _aligned(("step", "outcome", "s", ""), _steps(document))
    yield ""
    yield from _aligned(("target", "metric", "required", "measured", ""), _targets(document))
    if document["dry"]:
        yield "DRY RUN: tiny shapes on a CPU. No figure here says anything of a GPU."


def _steps(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, step in document["steps"].items():
        yield name, step["outcome"], f"{step['seconds']:.0f}", step["why"] or ""


def _targets(document: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in document["targets"]:
        against = f" ({row['against']})" if row["against"] else ""
        time = f", {row['median_ms']:.4g} ms" if row["median_ms"] else ""
        yield row["case"], row["metric"], row["target"], measured(row) + against + time, row["verdict"]


def measured(target: dict[str, Any]) -> str:
    """A target's figure in its unit."""
    value = target["measured"]
    if value is None:
        return "-"
    shown = {FLOOR: f"{value:.2f}", MICROSECONDS: f"{value:.1f} us", TFLOPS: f"{value:.0f} TFLOP/s"}
    return shown.get(target["metric"], f"{value:.2f}x")


def _failures(document: dict[str, Any], most: int = 12) -> Iterator[str]:
    failures = (document["results"].get("tests") or {}).get("failures") or []
    for failure in failures[:most]:
        yield f"FAILED {failure['id']}: {failure['message']}"[:WIDTH]
    if len(failures) > most:
        yield f"and {len(failures) - most} more"


def _aligned(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, (*widths, 0), strict=True))
        yield "  ".join(cells).rstrip()[:TABLE_WIDTH]
