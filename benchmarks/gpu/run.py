"""Runs the steps one after the other within one limit of time; none that fails stops the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from . import process
from .record import FAILED, LEFT_OUT, OK, TIMED_OUT, Outcome, Record, read_json, together
from .steps import Command, Context, Step

ENOUGH = 3.0  # seconds: with less a step is not begun


def allowance(most: float, least: float, left: float, later: float) -> float:
    """The seconds that a step may take of those that are `left`, if the steps after it are to have `later`.

    What a step does not use is left to the next. Where there is not enough for all, each has its share.
    """
    share = left * least / (least + later) if least + later else left
    return min(most, max(left - later, share))


def run_steps(
    steps: Sequence[Step],
    context: Context,
    record: Record,
    *,
    only: Sequence[str] = (),
    start: float | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Fills `record`, and writes it after every step; its limit counts from `start` on, of the monotonic clock."""
    deadline = (time.monotonic() if start is None else start) + record.limit_s
    asked = [step for step in steps if not only or step.name in only or step.always]
    record.write()  # one of an earlier run is not taken for this one's
    for step in steps:
        if step not in asked:
            record.steps[step.name] = Outcome(LEFT_OUT, "not asked for")
            continue
        left = deadline - time.monotonic()
        later = sum(s.least for s in asked[asked.index(step) + 1 :])
        seconds = allowance(step.most, step.least, left, later)
        say(f"{step.name}: at most {max(seconds, 0):.0f} s of {max(left, 0):.0f} s")
        if seconds < min(ENOUGH, step.most):
            record.steps[step.name] = Outcome(TIMED_OUT, "no time was left for it", allowed_s=0.0)
        elif why_not := context.facts.get("why_not"):
            record.steps[step.name] = Outcome(FAILED, why_not)
        else:
            try:
                _run_step(step, context, record, seconds)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other steps are to run
                record.steps[step.name] = Outcome(FAILED, f"{type(error).__name__}: {error}")
        if step.name == "machine":
            context = replace(context, facts=record.results.get("machine") or {})
        outcome = record.steps[step.name]
        say(f"{step.name}: {outcome.outcome}, {outcome.seconds:.1f} s. {outcome.why or ''}".rstrip())
        record.write()
    record.complete = True
    record.write()


def _run_step(step: Step, context: Context, record: Record, seconds: float) -> None:
    start = time.monotonic()
    end = start + seconds
    parts, outcomes, results = step.parts(context), dict[str, Outcome](), dict[str, Any]()
    for number, (name, command) in enumerate(parts.items()):
        if isinstance(command, Outcome):
            outcomes[name] = command
            continue
        share = (end - time.monotonic()) / (len(parts) - number)
        outcomes[name], results[name] = _run_part(step, name, command, context, share)
    outcome = together(outcomes)
    record.steps[step.name] = replace(outcome, seconds=round(time.monotonic() - start, 2))
    results = {name: data for name, data in results.items() if data is not None}
    if results:
        record.results[step.name] = results if len(parts) > 1 else next(iter(results.values()))


def _run_part(
    step: Step, name: str, command: Command, context: Context, seconds: float
) -> tuple[Outcome, Any]:
    """The command, and again as long as it says that it has not finished; what it leaves as JSON."""
    log, path = context.log(name), context.json(name)
    path.unlink(missing_ok=True)
    start, again = time.monotonic(), False
    before: Any = None
    while True:
        left = seconds - (time.monotonic() - start)
        finished = process.run(
            command(left), log, limit=left, cwd=context.root, env=context.env, append=again
        )
        data = read_json(path)
        # One that ends before it has written anything new would do so for ever.
        again = isinstance(data, dict) and bool(data.get("unfinished")) and data != before
        before = data
        if not again or finished.exit_code is None or seconds - (time.monotonic() - start) < ENOUGH:
            break
    spent = time.monotonic() - start
    cut = [str(x) for x in data.get("cut") or []] if isinstance(data, dict) else []
    verdict, why = _verdict(step, finished, cut, seconds)
    outcome = Outcome(
        verdict,
        why,
        round(spent, 2),
        round(seconds, 1),
        finished.exit_code,
        "" if verdict == OK else finished.tail,
        str(log.relative_to(context.out)),
        cut,
    )
    return outcome, data


def _verdict(
    step: Step, finished: process.Finished, cut: list[str], seconds: float
) -> tuple[str, str | None]:
    code = finished.exit_code
    if code is None:
        return TIMED_OUT, f"ended after {seconds:.0f} s"
    if code:
        excuse = step.excuse(finished.tail)
        return (LEFT_OUT, excuse) if excuse else (FAILED, _last_line(finished.tail) or f"exit code {code}")
    if cut:
        return TIMED_OUT, f"{len(cut)} not reached: {', '.join(cut[:4])}{', …' if len(cut) > 4 else ''}"
    return OK, None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
