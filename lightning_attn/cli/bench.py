"""`lightning-attn bench`: times of the ops, as fractions of this machine's limits and beside their peers."""

from __future__ import annotations

import gc
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from . import machine, report, results, timing
from .accuracy import Judge, Verdict, failed
from .case import Case, Tensors, dtype_name
from .machine import Limits
from .overhead import call_times
from .peers import OURS, Peer, missing_peers, peers
from .results import Row, Timing
from .suites import DTYPES, OPS, PRESETS, bench_cases

SECONDS_PER_CALL = 1.0  # for timing one provider at one pass of one case; slow calls take longer
SHARE_OF_MEMORY = 0.8  # of what is free: a case may need that much

Say = Callable[[str], None]


@click.command()
@click.argument("ops", nargs=-1, type=click.Choice(OPS), metavar="[OP]...")
@click.option(
    "--preset", type=click.Choice(PRESETS), default="quick", show_default=True, help="Which shapes."
)
@click.option("--backend", help="The backend to time.  [default: the one that 'auto' takes for each op]")
@click.option(
    "--device",
    "device_name",
    type=click.Choice(["cpu", "cuda"]),
    help="The device to run on.  [default: cuda if there is a GPU, unless the backend is cpu]",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(list(DTYPES)),
    help="In place of the preset's; repeatable.",
)
@click.option(
    "--compare",
    is_flag=True,
    help="Add the peers: eager PyTorch, its grouped_mm, and what is installed of transformers and, on a GPU, "
    "flash-linear-attention and Liger-Kernel; there also PyTorch's softmax attention, as a yardstick.",
)
@report.json_option
@report.plot_option
def bench(
    ops: tuple[str, ...],
    preset: str,
    backend: str | None,
    device_name: str | None,
    dtypes: tuple[str, ...],
    compare: bool,
    json_path: Path | None,
    plot_dir: Path | None,
) -> None:
    """Time the ops: attention, decode, gated_rms_norm, module (the attention layer), route, grouped_gemm, moe_mlp, moe
    (the block of experts).  [default: all of the preset]

    Measures what this machine reaches, the rate of a large matrix product and the bandwidth of a large copy,
    and shows each time as a fraction of that limit. Each case is checked against float64 before it is timed.
    Exits with 1 if a result of ours does not pass.
    """
    if plot_dir and not importlib.util.find_spec("matplotlib"):
        raise click.UsageError("--plot needs matplotlib: pip install 'lightning-attn-kernels[bench]'")
    backend = report.one_backend(backend)
    device = report.device(device_name, backend)
    compared = compare or "module" in ops
    cases = [
        case
        for case in bench_cases(preset, tuple(DTYPES[name] for name in dtypes), module=compared)
        if not ops or case.op in ops
    ]
    if not cases:
        raise click.UsageError(f"preset {preset!r} has no case of {', '.join(ops)}")

    console = report.console()
    cases, left_out = fitting(cases, machine.free_bytes(device))
    for note in left_out:
        console.print(note, markup=False, highlight=False)
    document = measure(cases, backend, device, compare=compare, console=console, call_costs=preset == "full")
    show(document, console)
    if compare:
        for note in missing_peers(device):
            console.print(note, markup=False, highlight=False)
    if json_path:
        report.write_json(json_path, document)
    rows = results.rows_of(document)
    if plot_dir:
        from .plot import save_plots  # only now: matplotlib is slow to import

        for path in save_plots(rows, plot_dir):
            console.print(f"Plot: {path}", highlight=False)
    if not all(row.ok for row in rows if row.provider == OURS):
        raise click.ClickException(
            "one of our results failed its check or raised an error, and was not timed"
        )


def fitting(cases: list[Case], free: int | None) -> tuple[list[Case], list[str]]:
    """Those that there is memory for, and what is to be said of the others. Never a smaller one in their stead."""
    if free is None:
        return cases, []
    small = [case for case in cases if case.needed_bytes <= SHARE_OF_MEMORY * free]
    notes = [
        f"{_where(case)} is left out: it needs about {case.needed_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        for case in cases
        if case not in small
    ]
    return small, notes


def measure(
    cases: Sequence[Case],
    backend: str,
    device: torch.device,
    *,
    compare: bool,
    console: Console,
    call_costs: bool = False,
) -> dict[str, Any]:
    """Checks and times cases, each at its passes -> the JSON document (`results.document`), without NaN.

    Whatever a case raises is noted in its rows, and the others are measured all the same. A row names the
    backend that ran it where `backend` is "auto".

    Args:
        cases: what to time.
        backend: of ours.
        device: where all tensors live.
        compare: also time the peers (`peers.peers`).
        console: for a progress bar, and to say what is not timed and why.
        call_costs: also measure what a public call costs over the raw function of its backend.
    """
    facts = results.facts(device)  # before anything can break the device
    limits, timings = Limits(), list[Timing]()
    calls: dict[str, dict[str, float]] = {}
    with report.progress(console) as progress:

        def say(text: str) -> None:
            progress.console.print(text, markup=False, highlight=False)

        task = progress.add_task("bench", total=len(cases))
        for case in cases:
            progress.update(task, description=f"{case.op} {dtype_name(case.dtype)}")
            found: list[Timing] = []
            try:
                limits = limits.or_better(machine.measure_limits(case.dtype, device))
                found.extend(_time(case, backend, device, compare, say))  # what came before an error stays
            except Exception as error:  # noqa: BLE001 - a case that fails stops no other
                say(f"{OURS} is not timed at {_where(case)}: {failed(error)}")
                found += _left_over(case, found, backend, device, error)
            timings += found
            _free(device)
            progress.advance(task)
        if call_costs:
            try:
                calls = call_times(backend, device)
            except Exception as error:  # noqa: BLE001 - as above
                say(f"the cost of a call is not measured: {failed(error)}")
    return results.document(facts, limits, calls, [Row.of(timed, limits) for timed in timings])


def show(document: dict[str, Any], console: Console) -> None:
    """Prints what `measure` gave: limits, a table per op, and how ours compares, if there are others."""
    rows = results.rows_of(document)
    console.print(results.headline(document), highlight=False)
    for table in results.times(rows):
        console.print(table)
    for op, us in document["call_us"].items():
        console.print(
            f"{op}: a call costs {us['public'] - us['raw']:.1f} us over the {us['raw']:.1f} us of the backend"
        )
    if any(row.provider != OURS for row in rows):
        console.print(results.speed_ups(rows))


def _time(case: Case, backend: str, device: torch.device, compare: bool, say: Say) -> Iterator[Timing]:
    """Checks one case, says what fails, and times what passes."""
    inputs = case.inputs(device)
    providers = {OURS: Peer(case.ours(backend), case)}
    if compare:
        try:
            providers |= peers(case, device)
        except Exception as error:  # noqa: BLE001 - ours is timed all the same
            say(f"{_where(case)} is not compared: {failed(error)}")
    verdicts = _judge(case, inputs, providers)
    for (provider, pass_), found in verdicts.items():
        for verdict in found:
            if not verdict.ok:
                say(f"{provider} is not timed at {_where(case, pass_)}: {verdict}")
    ran_by = report.runs_on(case, backend, device)
    for pass_ in case.passes:
        passed = [name for name in providers if all(v.ok for v in verdicts[name, pass_])]
        medians, raised = _medians(case, inputs, pass_, {name: providers[name] for name in passed}, device)
        for name, text in raised.items():
            say(f"{name} is not timed at {_where(case, pass_)}: {text}")
        for name in providers:
            found = verdicts[name, pass_]
            yield Timing(
                case=case,
                pass_=pass_,
                provider=name,
                backend=ran_by if name == OURS else "torch",
                device=str(device),
                median_ms=medians.get(name),
                error=max(v.error for v in found),
                ok=name in medians,
                raised=raised.get(name) or next((v.raised for v in found if v.raised), None),
            )


def _judge(case: Case, inputs: Tensors, providers: dict[str, Peer]) -> dict[tuple[str, str], list[Verdict]]:
    """By provider and pass. The truth, which takes gigabytes for a long sequence, is gone when this returns."""
    verdicts: dict[tuple[str, str], list[Verdict]] = {}
    judges: dict[type[Case], Judge] = {}
    for name, peer in providers.items():
        kind = type(peer.case)
        try:
            if kind not in judges:
                judges[kind] = Judge(peer.case, inputs, peer.case.fullest_pass)
        except Exception as error:
            if name == OURS:
                raise
            verdicts |= {(name, pass_): [failed(error)] for pass_ in case.passes}
            continue
        for pass_ in case.passes:
            verdicts[name, pass_] = judges[kind].verdicts(peer.function, pass_)
    return verdicts


def _medians(
    case: Case, inputs: Tensors, pass_: str, providers: dict[str, Peer], device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of a call of each provider; of those that raised, what."""
    steps: dict[str, timing.Call] = {}
    raised: dict[str, str] = {}

    def on_error(name: str, error: Exception) -> None:
        raised[name] = str(failed(error))

    for name, peer in providers.items():
        try:
            steps[name] = case.step(peer.function, inputs, pass_)
        except Exception as error:  # noqa: BLE001 - the others are timed
            on_error(name, error)
    medians = timing.medians(steps, device, SECONDS_PER_CALL, on_error)
    calls = case.calls_per_step(pass_)
    return {name: 1e3 * seconds / calls for name, seconds in medians.items()}, raised


def _left_over(
    case: Case, found: list[Timing], backend: str, device: torch.device, error: Exception
) -> Iterator[Timing]:
    """Rows of ours for the passes of a case that raised before they were timed."""
    done = [timed.pass_ for timed in found if timed.provider == OURS]
    for pass_ in case.passes:
        if pass_ not in done:
            ran_by = report.runs_on(case, backend, device)
            text = str(failed(error))
            yield Timing(case, pass_, OURS, ran_by, str(device), None, math.nan, False, text)


def _free(device: torch.device) -> None:
    """The next case finds the memory that this one had."""
    gc.collect()  # graphs and tracebacks go round in circles
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            pass  # the device is broken: every case that follows will say so


def _where(case: Case, pass_: str | None = None) -> str:
    parts = (case.op, dtype_name(case.dtype), report.shape_name(case.shape), pass_)
    return " ".join(part for part in parts if part)
