"""Tests across ranks: a pool of processes joined by gloo, in which functions of the test files run."""

from __future__ import annotations

import atexit
import functools
import importlib
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_attn.cli.received import Received

__all__ = ["Ranks", "Received", "fresh_ranks", "run_ranks"]

HERE = Path(__file__).parent
MOST = 5  # ranks of the pool
PATIENCE = 600  # seconds, for a function on all ranks
PATIENCE_AFTER_A_FAILURE = 5


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Ranks:
    """Processes that are ranks of one default group, with a group of the first n of them for each smaller n."""

    def __init__(self, size: int, timeout: float = 300.0) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ranks_support", "lightning_attn.distributed"])
        port = free_port()
        self.size, self.pipes, self.processes = size, list[Connection](), list[Any]()
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, size: int | None = None) -> list[Any]:
        """function(group, *args) on each of the first `size` ranks -> what each returned. The function stands at the top of
        a test file. Raises AssertionError with the traceback of every rank that raised.
        """
        answers = self.outcomes(function, *args, size=size, patience_after_a_failure=PATIENCE_AFTER_A_FAILURE)
        failures = [f"rank {rank}:\n{what}" for rank, (ok, what) in enumerate(answers) if not ok]
        if failures:
            self.close()
            raise AssertionError("\n".join(failures))
        return [what for _, what in answers]

    def outcomes(
        self,
        function: Callable[..., Any],
        *args: Any,
        size: int | None = None,
        patience_after_a_failure: float = PATIENCE,
        lost: Collection[int] = (),
    ) -> list[tuple[bool, Any]]:
        """As `run`, but (True, what it returned) or (False, what happened) of each rank; `lost` ones are not waited for."""
        n = size or self.size
        for pipe in self.pipes[:n]:
            pipe.send((function.__module__, function.__qualname__, n, args))
        answers: dict[int, tuple[bool, Any]] = {rank: (False, "is lost") for rank in lost}
        deadline = time.monotonic() + PATIENCE
        while len(answers) < n:
            left = {pipe: rank for rank, pipe in enumerate(self.pipes[:n]) if rank not in answers}
            ready = wait(list(left), max(deadline - time.monotonic(), 0))
            if not ready:
                answers |= {rank: (False, "has not answered") for rank in left.values()}
            for pipe in ready:
                try:
                    answer = pipe.recv()
                except (EOFError, ConnectionResetError):
                    answer = False, "is gone"
                answers[left[pipe]] = answer
                if not answer[0]:  # the others wait for this one, and need not do so for long
                    deadline = min(deadline, time.monotonic() + patience_after_a_failure)
        return [answers[rank] for rank in range(n)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        _pool.cache_clear()


@functools.cache
def _pool() -> Ranks:
    pool = Ranks(MOST)
    atexit.register(pool.close)
    return pool


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(group, *args) on `size` ranks of a pool that lives as long as this process -> the result of each."""
    return _pool().run(function, *args, size=size)


@contextmanager
def fresh_ranks(size: int, timeout: float) -> Iterator[Ranks]:
    """Ranks of their own, for those that are to die; timeout of their group in seconds."""
    ranks = Ranks(size, timeout)
    try:
        yield ranks
    finally:
        for process in ranks.processes:
            process.kill()


def _serve(rank: int, size: int, port: int, timeout: float, pipe: Connection) -> None:
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    groups = {n: dist.new_group(list(range(n))) for n in range(1, size)} | {size: dist.group.WORLD}
    while True:
        try:
            module, name, n, args = pipe.recv()
        except EOFError:
            return
        try:
            function = getattr(importlib.import_module(module), name)
            answer = True, function(groups[n], *args)
        except BaseException:  # noqa: BLE001 - it is told to the test
            answer = False, traceback.format_exc()
        pipe.send(answer)
