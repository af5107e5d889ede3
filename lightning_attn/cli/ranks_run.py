"""What `ranks` does: checks every case, times what passes, and makes rows and tables of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import report, results
from .accuracy import Verdict, failed, relative_error
from .case import TRAIN, Shape, dtype_name
from .cases import Attention
from .ranks_cases import CPU, PASSES, RankCase, cases, evaluate
from .ranks_pool import Processes, processes, values, wall
from .suites import DTYPES

CHECKED = 2048  # tokens that are compared with float64
# Turns of a pass go on for SECONDS and until there are TURNS, but for no longer than PATIENCE after LEAST.
SECONDS, TURNS, LEAST, PATIENCE = 2.0, 5, 3, 60.0


def measure(ops: tuple[str, ...], size: int, tokens: int, dtype: str, console: Console) -> dict[str, Any]:
    """Checks and times every case -> the JSON document, without NaN."""
    facts = results.facts(CPU)
    threads = torch.get_num_threads()
    each = max(threads // size, 1)
    wanted = list(cases(ops, DTYPES[dtype], tokens))
    rows: list[dict[str, Any]] = []
    with report.progress(console) as progress:
        task = progress.add_task("ranks", total=len(wanted))
        pair = _Pair(size, threads, each)
        for case in wanted:
            progress.update(task, description=f"{case.op}, {case.name}")
            try:
                found = list(_rows(case, pair, size))
            except Exception as error:  # noqa: BLE001 - a case that fails stops no other
                pair.close()  # its ranks may wait for each other for ever
                pair = _Pair(size, threads, each)
                found = [_row(case, pass_, size, failed(error)) for pass_ in PASSES]
            for row in found:
                if not row["ok"]:
                    text = f"{case.op}, {case.name}, {row['pass']} is not timed: {row['raised']}"
                    progress.console.print(text, markup=False, highlight=False)
            rows += found
            progress.advance(task)
        pair.close()
    shared = {
        "ranks": size,
        "threads": threads,
        "threads_of_a_rank": each,
        "backend": report.runs_on(Attention(DTYPES[dtype], T=1, H=1, K=128, V=128), "auto", CPU),
    }
    return report.finite(facts | shared | {"rows": rows})


class _Pair:
    """The one process and the ranks, of which one side sleeps while the other is at work. Started when first wanted."""

    def __init__(self, size: int, threads: int, each: int) -> None:
        self._sizes, self._stack = ((1, threads), (size, each)), ExitStack()
        self._found: list[Processes] = []

    def __iter__(self) -> Iterator[Processes]:
        if not self._found:
            self._found = [self._stack.enter_context(processes(*sizes)) for sizes in self._sizes]
        return iter(self._found)

    def close(self) -> None:
        self._stack.close()


# ---- checks --------------------------------------------------------------------------------------------------------


def _rows(case: RankCase, pair: _Pair, size: int) -> Iterator[dict[str, Any]]:
    small = replace(case, T=min(case.T, CHECKED))
    plain, truth = _truth(small)
    for side in pair:
        side.call("prepare", small)
    verdicts = []
    for side in pair:
        names = side.call("evaluate", TRAIN)[0][0]
        verdicts += [_verdict(small, side, name, truth[name], plain[name]) for name in names]
    for side in pair:
        side.call("prepare", case)
    for pass_ in PASSES:
        yield _timed(case, pass_, pair, size, verdicts, plain)


def _truth(case: RankCase) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The error of plain PyTorch by output, and the outputs in float64."""
    inputs = case.inputs()
    truth = evaluate(case.truth, {name: x.double() for name, x in inputs.items()}, TRAIN)
    plain = evaluate(case.plain, inputs, TRAIN)
    return {name: relative_error(x, truth[name]) for name, x in plain.items()}, truth


def _verdict(
    case: RankCase, side: Processes, name: str, truth: torch.Tensor, plain: float, off: int = 1
) -> Verdict:
    """On an output of the one process, or of all ranks: the rule of `accuracy`, `off` times where what it is compared with is no
    truth, but allowed to be off too.
    """
    dtypes, parts = values(side.call("output", name))
    error = math.inf
    if dtypes == {case.dtype}:
        error = relative_error(case.whole(parts) if len(parts) > 1 else parts[0], truth)
    who = "ranks" if len(parts) > 1 else "one process"
    return Verdict(f"{name} of the {who}", error, off * (2 * plain + torch.finfo(case.dtype).eps))


def _timed(
    case: RankCase, pass_: str, pair: _Pair, size: int, small: list[Verdict], plain: dict[str, float]
) -> dict[str, Any]:
    """Checks one pass at all tokens, where the one process takes the place of the truth, and times it if all is well."""
    one, many = pair
    names = one.call("evaluate", pass_)[0][0]
    received = [bytes_ for _, bytes_ in many.call("evaluate", pass_)]
    verdicts = list(small)
    for name in names:
        truth = values(one.call("output", name))[1][0]
        verdicts.append(_verdict(case, many, name, truth, plain[name], off=2))
    formula = [case.bytes(rank, size, pass_) for rank in range(size)]
    wrong = [verdict for verdict in verdicts if not verdict.ok]
    row = _row(case, pass_, size, max(verdicts, key=lambda v: v.strain))
    row |= {"received_bytes": received, "formula_bytes": formula}
    if wrong:
        return row | {"ok": False, "raised": "; ".join(map(str, wrong))}
    if received != formula:
        return row | {"ok": False, "raised": f"expected {formula} bytes received, got {received}"}
    return row | _times(one, many, pass_)


def _times(one: Processes, many: Processes, pass_: str) -> dict[str, Any]:
    """Medians of turns, the two sides one after the other."""
    times: tuple[list[float], list[float]] = ([], [])
    for side in (one, many):
        side.call("times", pass_)  # warms up
    start = perf_counter()
    while True:
        for side, found in zip((one, many), times, strict=True):
            found.append(wall(side.call("times", pass_)))
        turns, spent = len(times[0]), perf_counter() - start
        if turns >= TURNS and spent >= SECONDS or turns >= LEAST and spent >= PATIENCE:
            break
    alone, across = (1e3 * statistics.median(found) for found in times)
    return {"one_process_ms": alone, "ranks_ms": across, "ratio": across / alone, "turns": turns}


def _row(case: RankCase, pass_: str, size: int, worst: Verdict) -> dict[str, Any]:
    """Not timed yet; `worst` is the verdict that is nearest to its bound or beyond."""
    shape: Shape = case.shape
    return {
        "op": case.op,
        "case": case.name,
        "pass": pass_,
        "dtype": dtype_name(case.dtype),
        "shape": shape,
        "ranks": size,
        "one_process_ms": None,
        "ranks_ms": None,
        "ratio": None,
        "target": case.target,
        "turns": 0,
        "received_bytes": None,
        "formula_bytes": None,
        "error": worst.error,
        "allowed": worst.allowed,
        "ok": worst.ok and not worst.raised,
        "raised": worst.raised,
    }


# ---- tables --------------------------------------------------------------------------------------------------------


def tables(document: dict[str, Any]) -> Iterator[Table]:
    """One for each op and shape."""
    rows, size = document["rows"], document["ranks"]
    name, threads, each = document["device"]["name"], document["threads"], document["threads_of_a_rank"]
    for op in dict.fromkeys(row["op"] for row in rows):
        chosen = [row for row in rows if row["op"] == op]
        backend = f", backend {document['backend']}" if op == "lasp" else ""
        table = report.table(
            f"{op}, {chosen[0]['dtype']}, {report.shape_name(chosen[0]['shape'])}{backend}\n{name}: one process of {threads} "
            f"threads, {size} ranks of {each}; times in ms, received by the rank that receives most",
            "case", "pass",
            right=("one process", "ranks", "ratio", "target", "received, B", "formula, B", "error", "allowed"),
        )  # fmt: skip
        table.add_column("ok")
        for row in chosen:
            table.add_row(
                row["case"], row["pass"],
                *("-" if row[key] is None else report.three_digits(row[key]) for key in ("one_process_ms", "ranks_ms", "ratio")),
                f"{row['target']:.2f}",
                *("-" if row[key] is None else f"{max(row[key]):,}" for key in ("received_bytes", "formula_bytes")),
                *(report.exponent(row[key]) for key in ("error", "allowed")),
                report.tick(row["ok"]),
            )  # fmt: skip
        yield table
