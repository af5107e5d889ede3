"""Processes of this machine, joined by gloo on 127.0.0.1, that do what they are told: R ranks, or one process alone."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .case import Tensors
from .ranks_cases import RankCase
from .received import Received

TIMEOUT = timedelta(minutes=10)  # of one collective: a rank may wait for one that is slow to compute
# Threads that wait sleep: one side waits while the other is timed, on the same cores.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}


class Failed(RuntimeError):
    """A process raised, or is gone."""


class Processes:
    """Processes that are ranks of one group. `call` runs a method of `Member` on all of them."""

    def __init__(self, size: int, threads: int) -> None:
        # Not forked: the kernels of a forked process use one thread and keep no memory.
        context, port = multiprocessing.get_context("spawn"), _free_port()
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        with _environment(ENVIRONMENT):
            for rank in range(size):
                mine, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(rank, size, port, threads, theirs), daemon=True
                )
                process.start()
                theirs.close()
                self.pipes.append(mine)
                self.processes.append(process)

    def call(self, method: str, *args: Any) -> list[Any]:
        """What the method returned on each, by rank."""
        for pipe in self.pipes:
            try:
                pipe.send((method, args))
            except (BrokenPipeError, ConnectionResetError) as error:
                raise Failed("a process is gone") from error
        answers: dict[Any, Any] = {}
        while len(answers) < len(self.pipes):
            ready: list[Any] = wait([pipe for pipe in self.pipes if pipe not in answers])
            for pipe in ready:
                try:
                    ok, answers[pipe] = pipe.recv()
                except (EOFError, ConnectionResetError) as error:
                    raise Failed(f"rank {self.pipes.index(pipe)} is gone") from error
                if not ok:
                    raise Failed(f"rank {self.pipes.index(pipe)}: {answers[pipe]}")
        return [answers[pipe] for pipe in self.pipes]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(2)
            process.kill()


@contextmanager
def processes(size: int, threads: int) -> Iterator[Processes]:
    made = Processes(size, threads)
    try:
        yield made
    finally:
        made.close()


class Member:
    """One of the processes. Alone it has no group to speak of: it does what one process does."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        world = dist.group.WORLD
        assert world is not None
        self.world, self.group = world, world if size > 1 else None
        self.outputs: Tensors = {}
        self.kept: dict[Any, Tensors] = {}  # inputs of few and of all tokens, which cases share

    def prepare(self, case: RankCase) -> None:
        """Makes its part of the inputs of a case, which the following calls are about."""
        self.case, self.outputs = case, {}
        key = case.dtype, case.T, tuple(case.heads.items()), case.layout(self.size)
        if key not in self.kept:
            self.kept = dict(list(self.kept.items())[-1:])
            gc.collect()
            made = {name: case.part(x, self.rank, self.size) for name, x in case.inputs().items()}
            self.kept[key] = made
        self.inputs = self.kept[key]

    def evaluate(self, pass_: str) -> tuple[list[str], int]:
        """Computes the outputs -> their names, and the bytes that it received for them."""
        self.outputs = {}
        with Received(self.world) as received:
            self.outputs = self.case.evaluate(self.inputs, pass_, self.group)
        return list(self.outputs), received.total

    def output(self, name: str) -> tuple[torch.dtype, Any]:
        """Its dtype, and its values in NumPy, 16 bits widened."""
        x = self.outputs[name]
        return x.dtype, (x if x.dtype == torch.float64 else x.float()).numpy()

    def times(self, pass_: str) -> tuple[float, float]:
        """Begin and end of one pass by the clock of the machine, from when all ranks are there."""
        self.outputs = {}
        if self.group is not None:
            dist.barrier(self.group)
        start = perf_counter()
        outputs = self.case.evaluate(self.inputs, pass_, self.group)
        end = perf_counter()
        del outputs
        return start, end


def values(answers: list[tuple[torch.dtype, Any]]) -> tuple[set[torch.dtype], list[Tensor]]:
    """What `Member.output` gave, by rank."""
    return {dtype for dtype, _ in answers}, [torch.from_numpy(x) for _, x in answers]


def wall(times: list[tuple[float, float]]) -> float:
    """Seconds from the first begin to the last end."""
    return max(end for _, end in times) - min(start for start, _ in times)


def _serve(rank: int, size: int, port: int, threads: int, pipe: Connection) -> None:
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(threads)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size, timeout=TIMEOUT)
    member = Member(rank, size)
    while True:
        try:
            method, args = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            answer = True, getattr(member, method)(*args)
        except Exception as error:  # noqa: BLE001 - it is told
            answer = False, f"{type(error).__name__}: {error}"
            if os.environ.get("LIGHTNING_ATTN_CHECK") == "1":
                traceback.print_exc()
        try:
            pipe.send(answer)
        except (BrokenPipeError, KeyboardInterrupt):
            return


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """For processes that are started in it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
