"""Rewrites the README's figures: of a CPU from results of `lightning-attn bench --compare --json`, one of attention and one
of the mixture of experts, and of `lightning-attn ranks --json`; of a GPU from one of `python -m benchmarks.gpu`, if there is one.

python -m benchmarks.readme_table [RESULT.json] [--experts E.json] [--ranks R.json] [--gpu GPU.json]     # writes between the markers
python -m benchmarks.readme_table --check                            # exits with 1 if the README says anything else
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import readme as gpu

BENCHMARKS = Path(__file__).resolve().parent
README = BENCHMARKS.parent / "README.md"
RESULT = BENCHMARKS / "results" / "cpu.json"
EXPERTS_RESULT = BENCHMARKS / "results" / "experts.json"
RANKS_RESULT = BENCHMARKS / "results" / "ranks.json"
GPU_RESULT = BENCHMARKS / "results" / "gpu.json"

OURS = "lightning_attn"
Shape = dict[str, int | str]
# The shapes that the README shows, of all those in the file, by the name that it gives them: an op, or an op and more. The
# passes and dtypes are the file's.
ATTENTION: dict[str, Shape] = {
    "attention": {"B": 1, "T": 8192, "H": 8, "K": 128, "V": 128},
    "decode": {"B": 16, "T": 1, "H": 64, "K": 128, "V": 128, "state": "float32"},
    "gated_rms_norm": {"rows": 2048, "D": 8192},
    "module": {"B": 1, "T": 2048, "hidden": 1024, "H": 8, "D": 128},
}
BLOCK: Shape = {"D": 1024, "F": 1536, "E": 16, "k": 2}
EXPERTS: dict[str, Shape] = {
    "moe": {"T": 2048, **BLOCK},
    "moe, 4 tokens": {"T": 4, **BLOCK},
    "moe_mlp, 4 tokens": {"T": 4, **BLOCK},
    "moe_mlp, 4 tokens, int8": {"T": 4, **BLOCK, "experts": "int8"},
    "grouped_gemm": {"M": 4096, "E": 16, "N": 3072, "K": 1024},
    "route": {"T": 8192, "E": 32, "k": 2},
}
Row = dict[str, Any]


def table(result: dict[str, Any], shown: dict[str, Shape]) -> str:
    """Markdown: the machine and its limits, then a line for each op, pass and dtype."""
    named = [(name, row) for row in result["rows"] if (name := _name(row, shown))]
    if not named:
        raise SystemExit(f"the result has none of {', '.join(shown)}")
    rows = [row for _, row in named]
    peers = list(dict.fromkeys(row["provider"] for row in rows if row["provider"] != OURS))
    head = ["| op", "pass", "dtype", "time", "of the limit", *(f"against {peer}" for peer in peers)]
    lines = [" | ".join(head) + " |", "|---" * 3 + "|--:" * (2 + len(peers)) + "|"]
    for name, row in named:
        if row["provider"] == OURS:
            theirs = (_of_peer(rows, row, peer) for peer in peers)
            cells = [
                name,
                row["pass"],
                row["dtype"],
                _time(row),
                _share(row),
                *(_ratio(row, x) for x in theirs),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    names = {name for name, _ in named}
    return "\n".join([_machine(result), "", *lines, "", *_shapes(names, shown)])


def _name(row: Row, shown: dict[str, Shape]) -> str | None:
    """The name of a row's shape; None if it is not shown."""
    return next((n for n, s in shown.items() if n.partition(",")[0] == row["op"] and s == row["shape"]), None)


def _machine(result: dict[str, Any]) -> str:
    device, limits = result["device"], result["limits"]
    gemm = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in limits["gemm_flops_per_s"].items())
    return (
        f"{device['name']}, {device['threads']} threads, {device['instruction_set']}; PyTorch "
        f"{result['versions']['torch']}. Measured limits: matrix product {gemm} GFLOP/s, copy "
        f"{limits['copy_bytes_per_s'] / 1e9:.1f} GB/s."
    )


def _shapes(names: set[str], shown: dict[str, Shape]) -> list[str]:
    shapes = (
        f"{name.partition(',')[0]} {', '.join(f'{k}={v}' for k, v in shape.items())}"
        for name, shape in shown.items()
        if name in names
    )
    return [f"Shapes: {'; '.join(shapes)}."]


def _of_peer(rows: list[Row], ours: Row, peer: str) -> Row | None:
    same = ("op", "pass", "dtype", "shape")
    return next((r for r in rows if r["provider"] == peer and all(r[k] == ours[k] for k in same)), None)


def _time(row: Row) -> str:
    return "-" if row["median_ms"] is None else f"{row['median_ms']:.3g} ms"


def _share(row: Row) -> str:
    return "-" if row["fraction_of_limit"] is None else f"{row['fraction_of_limit']:.2f}"


def _ratio(ours: Row, theirs: Row | None) -> str:
    if theirs is None or ours["median_ms"] is None or theirs["median_ms"] is None:
        return "-"
    return f"{theirs['median_ms'] / ours['median_ms']:.2f}x"


def ranks_table(result: dict[str, Any]) -> str:
    """Markdown: the machine, then a line for each case and pass of `lightning-attn ranks`."""
    device, size = result["device"], result["ranks"]
    what = (
        f"{device['name']}, {device['instruction_set']}; PyTorch {result['versions']['torch']}: {size} ranks of "
        f"{result['threads_of_a_rank']} thread{'s' * (result['threads_of_a_rank'] > 1)} beside one process of {result['threads']}."
    )
    lines = [
        "| op | case | pass | dtype | one process | ranks | ratio | asked | received |",
        "|---" * 4 + "|--:" * 5 + "|",
    ]
    for row in result["rows"]:
        times = (f"{row[key] / 1e3:.3g} s" if row[key] else "-" for key in ("one_process_ms", "ranks_ms"))
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else "-"
        received = f"{max(row['received_bytes']) / 1e6:.3g} MB" if row["received_bytes"] else "-"
        cells = (
            row["op"],
            row["case"],
            row["pass"],
            row["dtype"],
            *times,
            ratio,
            f"{row['target']:.2f}",
            received,
        )
        lines.append("| " + " | ".join(cells) + " |")
    shapes = {row["op"]: row["shape"] for row in reversed(result["rows"])}
    described = (f"{op} {', '.join(f'{k}={v}' for k, v in shapes[op].items())}" for op in sorted(shapes))
    return "\n".join([what, "", *lines, "", f"Shapes: {'; '.join(described)}."])


def gpu_section(result: Path) -> str:
    """What `benchmarks.gpu` makes of a run on a GPU, with those of its plots that lie beside the result."""
    if not result.exists() and result != GPU_RESULT:
        raise SystemExit(f"{result} is not there")
    document = json.loads(result.read_text()) if result.exists() else None
    plots = [result.parent / name for name in gpu.PLOTS]
    try:
        return gpu.section(document, [os.path.relpath(p, README.parent) for p in plots if p.exists()])
    except ValueError as error:
        raise SystemExit(f"{result}: {error}") from error


def rewritten(readme: str, name: str, text: str) -> str:
    """The README with `text` between the markers of that name."""
    begin, end = (f"<!-- {name}:{edge} -->" for edge in ("begin", "end"))
    before, found, rest = readme.partition(begin)
    _, found_too, after = rest.partition(end)
    if not found or not found_too:
        raise SystemExit(f"README.md has no {begin} … {end}")
    return f"{before}{begin}\n{text}\n{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.readme_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", nargs="?", type=Path, default=RESULT)
    parser.add_argument(
        "--experts", type=Path, default=EXPERTS_RESULT, help="of the experts (default: %(default)s)"
    )
    parser.add_argument(
        "--ranks", type=Path, default=RANKS_RESULT, help="of several processes (default: %(default)s)"
    )
    parser.add_argument("--gpu", type=Path, default=GPU_RESULT, help="a run on a GPU (default: %(default)s)")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit with 1 if the README is stale"
    )
    arguments = parser.parse_args()
    old = README.read_text(encoding="utf-8")
    new = rewritten(old, "bench", table(json.loads(arguments.result.read_text()), ATTENTION))
    new = rewritten(new, "experts", table(json.loads(arguments.experts.read_text()), EXPERTS))
    new = rewritten(new, "ranks", ranks_table(json.loads(arguments.ranks.read_text())))
    new = rewritten(new, "gpu", gpu_section(arguments.gpu.absolute()))
    if arguments.check:
        if new != old:
            print(f"README.md is stale: run {parser.prog}", file=sys.stderr)
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
