"""Times of calls, in one process, side by side: by the host's clock, on CUDA by events on the device."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter

import torch

Call = Callable[[], object]
Mark = Callable[[], float]  # the seconds of a call, once the device has done what it was given
OnError = Callable[[str, Exception], None]  # told of the call that raised, by name

MIN_REPEATS = 5
PATIENCE = 20.0  # seconds, after which slow calls are not repeated so often
QUEUE_SECONDS, QUEUE_TURNS = (
    0.02,
    50,
)  # on CUDA: the work that is queued before the device is waited for, at most


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(call: Call, device: torch.device) -> float:
    """The time of one call by the host's clock."""
    synchronize(device)
    start = perf_counter()
    call()
    synchronize(device)
    return perf_counter() - start


def medians(
    calls: Mapping[str, Call], device: torch.device, budget: float, on_error: OnError | None = None
) -> dict[str, float]:
    """The median time of each call, in seconds.

    The calls take turns, so that a change of clock or a busy neighbour meets all of them alike and their
    ratios stay true. One turn warms up; turns go on for `budget` seconds per call, and until there are
    MIN_REPEATS, unless that takes longer than PATIENCE.

    A call that raises is left out, the times of the others are kept, if there is somebody to tell.
    """
    times = _turns(calls, device, budget * len(calls), MIN_REPEATS, on_error)
    return {name: statistics.median(t) for name, t in times.items()}


def best_seconds(call: Call, device: torch.device, budget: float = 0.2) -> float:
    """The shortest time of one call among as many as `budget` seconds allow."""
    return min(_turns({"": call}, device, budget, 1)[""])


def _turns(
    calls: Mapping[str, Call],
    device: torch.device,
    budget: float,
    least: int,
    on_error: OnError | None = None,
) -> dict[str, list[float]]:
    """On CUDA several turns are queued without waiting: then the device goes from call to call as it does in a
    model, and an event does not see the host prepare a launch, unless that takes longer than the call before.
    """
    mark = _by_events if device.type == "cuda" else _by_host
    left = dict(calls)

    def turn(mark: Callable[[Call, torch.device], Mark]) -> dict[str, Mark]:
        marks = {}
        for name in list(left):
            try:
                marks[name] = mark(left[name], device)
            except Exception as error:
                if on_error is None:
                    raise
                del left[name]
                on_error(name, error)
        return marks

    turn(_by_host)  # warms up
    queued = 1
    if device.type == "cuda":
        pace = sum(m() for m in turn(_by_host).values())
        queued = max(1, min(int(QUEUE_SECONDS / pace) if pace else 1, QUEUE_TURNS))
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, spent, turns = perf_counter(), 0.0, 0
    while left and (spent < budget or (turns < least and spent < PATIENCE)):
        marks = [turn(mark) for _ in range(queued)]
        synchronize(device)
        for name in left:
            times[name] += [m[name]() for m in marks]
        spent, turns = perf_counter() - start, turns + queued
    return {name: times[name] for name in left}


def _by_host(call: Call, device: torch.device) -> Mark:
    time = seconds(call, device)
    return lambda: time


def _by_events(call: Call, device: torch.device) -> Mark:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
    return lambda: start.elapsed_time(end) / 1e3  # of milliseconds
