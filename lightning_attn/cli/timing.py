"""Wall-clock times of calls, in one process, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from time import perf_counter

import torch

Call = Callable[[], object]

MIN_REPEATS = 5
PATIENCE = 20.0  # seconds, after which slow calls are not repeated so often


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(call: Call, device: torch.device) -> float:
    """The time of one call."""
    synchronize(device)
    start = perf_counter()
    call()
    synchronize(device)
    return perf_counter() - start


def medians(calls: Mapping[str, Call], device: torch.device, budget: float) -> dict[str, float]:
    """The median time of each call, in seconds.

    The calls take turns, so that a change of clock or a busy neighbour meets all of them alike and their
    ratios stay true. One turn warms up; turns go on for `budget` seconds per call, and until there are
    MIN_REPEATS, unless that takes longer than PATIENCE.
    """
    times = _turns(calls, device, budget * len(calls), MIN_REPEATS)
    return {name: statistics.median(t) for name, t in times.items()}


def best_seconds(call: Call, device: torch.device, budget: float = 0.2) -> float:
    """The shortest time of one call among as many as `budget` seconds allow."""
    return min(_turns({"": call}, device, budget, 1)[""])


def _turns(
    calls: Mapping[str, Call], device: torch.device, budget: float, least: int
) -> dict[str, list[float]]:
    for call in calls.values():
        seconds(call, device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    start, spent, turns = perf_counter(), 0.0, 0
    while spent < budget or (turns < least and spent < PATIENCE):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
        spent, turns = perf_counter() - start, turns + 1
    return times
