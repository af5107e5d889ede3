"""`lightning-attn bench`: times of the ops, as fractions of this machine's limits and beside their peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch

from . import machine, report, results, timing
from .accuracy import Judge, of_pass
from .cases import Case, dtype_name
from .eager import Function
from .machine import Limits
from .overhead import call_times
from .peers import OURS, missing_peers, peers
from .results import Row, Timing
from .suites import DTYPES, OPS, PRESETS, bench_cases

SECONDS_PER_CALL = 1.0  # for timing one provider at one pass of one case; slow calls take longer


@click.command()
@click.argument("ops", nargs=-1, type=click.Choice(OPS), metavar="[OP]...")
@click.option(
    "--preset", type=click.Choice(PRESETS), default="quick", show_default=True, help="Which shapes."
)
@click.option("--backend", help="The backend to time.  [default: the one that 'auto' takes]")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(list(DTYPES)),
    help="In place of the preset's; repeatable.",
)
@click.option(
    "--compare", is_flag=True, help="Add the peers: eager PyTorch, and transformers if it is installed."
)
@report.json_option
@report.plot_option
def bench(
    ops: tuple[str, ...],
    preset: str,
    backend: str | None,
    dtypes: tuple[str, ...],
    compare: bool,
    json_path: Path | None,
    plot_dir: Path | None,
) -> None:
    """Time the ops: attention, decode, gated_rms_norm, module.  [default: all of the preset]

    Measures what this machine reaches, the rate of a large matrix product and the bandwidth of a large copy,
    and shows each time as a fraction of that limit. Each case is checked against float64 before it is timed.
    Exits with 1 if a result of ours does not pass.
    """
    if plot_dir and not importlib.util.find_spec("matplotlib"):
        raise click.UsageError("--plot needs matplotlib: pip install 'lightning-attn-kernels[bench]'")
    device = torch.device("cpu")
    backend = report.one_backend(backend, device)
    compared = compare or "module" in ops
    cases = [
        case
        for case in bench_cases(preset, tuple(DTYPES[name] for name in dtypes), module=compared)
        if not ops or case.op in ops
    ]
    if not cases:
        raise click.UsageError(f"preset {preset!r} has no case of {', '.join(ops)}")

    console = report.console()
    limits, timings = Limits(), list[Timing]()
    with report.progress(console) as progress:
        task = progress.add_task("bench", total=len(cases))
        for case in cases:
            progress.update(task, description=f"{case.op} {dtype_name(case.dtype)}")
            limits = limits.or_better(machine.measure_limits(case.dtype, device))
            timings += _time(case, backend, device, compare, progress.console.print)
            progress.advance(task)
    rows = [Row.of(timing, limits) for timing in timings]
    calls = call_times(backend, device) if preset == "full" else {}

    console.print(results.headline(limits, backend), highlight=False)
    for table in results.times(rows):
        console.print(table)
    for op, us in calls.items():
        console.print(
            f"{op}: a call costs {us['public'] - us['raw']:.1f} us over the {us['raw']:.1f} us of the backend"
        )
    if compare:
        console.print(results.speed_ups(rows))
        for note in missing_peers():
            console.print(note)
    if json_path:
        report.write_json(json_path, results.document(limits, calls, rows))
    if plot_dir:
        from .plot import save_plots  # only now: matplotlib is slow to import

        for path in save_plots(rows, plot_dir):
            console.print(f"Plot: {path}", highlight=False)
    if not all(row.ok for row in rows if row.provider == OURS):
        raise click.ClickException("a result is further from float64 than the rule allows and was not timed")


def _time(
    case: Case, backend: str, device: torch.device, compare: bool, say: Callable[[str], None]
) -> Iterator[Timing]:
    """Checks one case, says what fails, and times what passes."""
    inputs = case.inputs(device)
    judge = Judge(case, inputs, case.passes[-1])
    functions: dict[str, Function] = {OURS: case.ours(backend)} | (peers(case) if compare else {})
    verdicts = {provider: judge.verdicts(function) for provider, function in functions.items()}
    del judge  # the truth of a long sequence takes gigabytes
    where = f"{case.op} {dtype_name(case.dtype)} {report.shape_name(case.shape)}"
    for provider in functions:
        for verdict in verdicts[provider]:
            if not verdict.ok:
                say(f"{provider} is not timed at {where}: {verdict}")
    for pass_ in case.passes:
        judged = {provider: of_pass(verdicts[provider], pass_, case) for provider in functions}
        passed = [provider for provider in functions if all(v.ok for v in judged[provider])]
        steps = {provider: case.step(functions[provider], inputs, pass_) for provider in passed}
        medians = timing.medians(steps, device, SECONDS_PER_CALL)
        for provider in functions:
            yield Timing(
                case=case,
                pass_=pass_,
                provider=provider,
                backend=backend if provider == OURS else "torch",
                device=str(device),
                median_ms=1e3 * medians[provider] if provider in medians else None,
                error=max(v.error for v in judged[provider]),
                ok=provider in passed,
            )
