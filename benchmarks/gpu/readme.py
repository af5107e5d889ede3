"""The README's figures of a GPU, made from a run's `gpu.json`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from .show import measured
from .steps import MEASURED
from .targets import OURS, Row, fraction_of_floor, is_main, rows_of, same_case, tflops

PLOTS = {  # what `plots` draws, with what each shows
    "gpu-speed.png": "Tokens a second against T",
    "gpu-floor.png": "Fraction of the floor against T",
    "gpu-decode.png": "Time of a decode step against the batch",
    "gpu-experts.png": "Time of the experts of a decode step against the tokens",
}
EXPERTS = ("experts", "expert_decode")  # the steps of the mixture of experts
UNMEASURED = "The kernels have not run on a GPU yet: GPU figures are still to be measured."


def section(document: dict[str, Any] | None, plots: list[str]) -> str:
    """Markdown. `document` is None as long as there is no run, `plots` are paths from the README's directory."""
    if document is None:
        return UNMEASURED
    if document.get("dry", True):
        raise ValueError("this is the result of a dry run: it holds no figures of a GPU")
    rest = [step for step in MEASURED if step not in EXPERTS]
    parts = [_machine(document), *_table(document, rest), ""]
    if any(rows_of(document, step) for step in EXPERTS):
        parts += [*_table(document, EXPERTS, rates=True), ""]
    parts += _targets(document)
    for plot in plots:
        parts += ["", f"![{PLOTS[plot.rpartition('/')[2]]}]({plot})"]
    return "\n".join(parts)


def _machine(document: dict[str, Any]) -> str:
    device, versions = document["device"] or {}, document["versions"] or {}
    rates = ", ".join(f"{name} {x / 1e12:.3g}" for name, x in document["matrix_flops_per_s"].items())
    copy = document["copy_bytes_per_s"]
    return (
        f"{device.get('name')}, driver {device.get('driver')}; PyTorch {versions.get('torch')}, Triton "
        f"{versions.get('triton')}, CuPy {versions.get('cupy')}; flash-linear-attention {versions.get('fla')}, "
        f"transformers {versions.get('transformers')}, Liger-Kernel {versions.get('liger-kernel')}; commit {(document.get('commit') or '-')[:12]}, "
        f"{document['date'][:10]}. Measured in the same run: copy "
        f"{f'{copy / 1e9:.0f} GB/s' if copy else '-'}, matrix product {rates or '-'} TFLOP/s.\n"
    )


def _table(document: dict[str, Any], steps: Iterable[str], rates: bool = False) -> Iterator[str]:
    """`rates`: with one more column, of the products of matrices."""
    shown = [row for step in steps for row in rows_of(document, step) if row.get("listed", True)]
    peers = list(dict.fromkeys(row["provider"] for row in shown if row["provider"] != OURS))
    head = ["op", "pass", "shape", "backend", "time", *["TFLOP/s"] * rates, "of the floor"]
    head += [f"against {peer}" for peer in peers]
    yield f"| {' | '.join(head)} |"
    yield "|---" * 4 + "|--:" * (2 + rates + len(peers)) + "|"
    for row in shown:
        if not is_main(row):
            continue
        same = {r["provider"]: r for r in shown if same_case(r) == same_case(row) and r["provider"] != OURS}
        # The layer is products of matrices for the most part: bytes do not bound it.
        fraction = None if row["op"] == "module" else fraction_of_floor(row, document)
        cells = [row["op"], row["pass"], _shape(row), row["backend"], _time(row)]
        cells += [f"{tflops(row) or 0:.3g}"] if rates else []
        cells += ["-" if fraction is None else f"{fraction:.2f}", *(_ratio(row, same.get(p)) for p in peers)]
        yield f"| {' | '.join(cells)} |"


def _targets(document: dict[str, Any]) -> Iterator[str]:
    yield "| target | required | measured | verdict |"
    yield "|---|--:|--:|---|"
    for row in document["targets"]:
        against = f" ({row['against']})" if row["against"] else ""
        yield f"| {row['case']}: {row['metric']} | {row['target']} | {measured(row)}{against} | {row['verdict']} |"


def _shape(row: Row) -> str:
    return ", ".join([row["dtype"], *(f"{name}={size}" for name, size in row["shape"].items())])


def _time(row: Row) -> str:
    if row["median_ms"] is None:
        return "-"
    return f"{1e3 * row['median_ms']:.3g} us" if row["median_ms"] < 0.1 else f"{row['median_ms']:.3g} ms"


def _ratio(ours: Row, theirs: Row | None) -> str:
    if theirs is None or not ours["median_ms"] or not theirs["median_ms"]:
        return "-"
    return f"{theirs['median_ms'] / ours['median_ms']:.1f}x"
