"""One command in a process group of its own: a log, a limit of time, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

GRACE = 2.0  # seconds from the request to end to the end
TAIL_LINES, TAIL_CHARACTERS = 25, 3000

# A group, not a session: a session would outlive whoever ends this one.
_OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
)
_live: set[int] = set()  # groups


@dataclass(frozen=True)
class Finished:
    """`exit_code` is None if time ran out; negative: the signal that ended the process."""

    exit_code: int | None
    seconds: float
    tail: str


def run(
    command: Sequence[str],
    log: Path,
    *,
    limit: float,
    cwd: Path,
    env: Mapping[str, str],
    append: bool = False,
) -> Finished:
    """Runs `command`, what it prints goes to `log`; after `limit` seconds, its whole group is ended."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("ab" if append else "wb") as output:
        begin = output.tell()
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=dict(env),
                **_OWN_GROUP,
            )
        except OSError as error:
            return Finished(127, 0.0, f"{command[0]}: {error}")
        _live.add(process.pid)
        try:
            exit_code: int | None = process.wait(timeout=max(0.0, limit))
        except subprocess.TimeoutExpired:
            exit_code = None
            _signal(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                pass
        finally:
            _signal(process.pid, signal.SIGKILL)  # also what a process that has ended left behind
            process.wait()
            _live.discard(process.pid)
    return Finished(exit_code, time.monotonic() - start, tail(log, begin))


def tail(log: Path, begin: int = 0) -> str:
    """The last lines of a log, from byte `begin` on."""
    size = log.stat().st_size
    with log.open("rb") as text:
        text.seek(max(begin, size - 4 * TAIL_CHARACTERS))
        lines = text.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-TAIL_LINES:])[-TAIL_CHARACTERS:]


def end_with_groups() -> None:
    """From now on a signal that ends this process ends its groups first, and gives them time to end theirs."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    for group in list(_live):
        _signal(group, signal.SIGTERM)
    # Their leaders' ends are seen by the threads that wait for them, or, in this one, here.
    deadline = time.monotonic() + GRACE
    while any(map(_runs, _live)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for group in list(_live):
        _signal(group, signal.SIGKILL)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _runs(process: int) -> bool:
    """Whether a child has not ended yet."""
    try:
        return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def _signal(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass  # it has gone
