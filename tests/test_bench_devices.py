"""Where bench runs: the device and the backends that it takes, and what it does on CUDA, with a stand-in for the device."""

import contextlib
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_support import F32, MOE, SMALL, bench_module, machine_module, measured, needs_cpu, run
from support import ON_CPU

from lightning_attn import backends, decay, ops
from lightning_attn.cli import graph, results, timing
from lightning_attn.cli.case import Case, decay_rates
from lightning_attn.cli.cases import Attention
from lightning_attn.dispatch import Spec

CUDA = torch.device("cuda")


@needs_cpu
def test_auto_names_the_backend_of_each_op(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that really runs it."""

    def choosy(spec: Spec) -> list[str]:
        return ["it is picky"] if spec.op in ("attention_decode", "gated_rms_norm_forward") else []

    monkeypatch.setattr(backends.load("cpu"), "supports", choosy)
    ops._resolve.cache_clear()
    rows, said = measured(*SMALL)
    ops._resolve.cache_clear()
    assert {(row["op"], row["backend"]) for row in rows} == {
        ("attention", "cpu"),
        ("decode", "reference"),
        ("gated_rms_norm", "reference+cpu"),
        ("module", "cpu+reference"),
        *((op, "cpu") for op in MOE),
    }
    assert re.search(r"backend cpu \(\w+\), reference", said)


def test_device_of_the_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU if there is one and the backend can use it; what cannot be is refused."""
    device = bench_module.report.device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_module, "bench_cases", lambda *_, **__: pytest.fail("work was done"))
    assert [device(None, name).type for name in ("auto", "triton", "cpu")] == ["cpu", "cpu", "cpu"]
    result = run("bench", "--device", "cuda")
    assert result.exit_code == 2 and "--device: PyTorch finds no CUDA device here" in result.output
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [device(None, name).type for name in ("auto", "triton", "cpu")] == ["cuda", "cuda", "cpu"]
    assert device("cpu", "auto").type == "cpu" and device("cuda", "reference").type == "cuda"
    if "cpu" in ON_CPU:
        result = run("bench", "--device", "cuda", "--backend", "cpu")
        assert result.exit_code == 2 and "runs on the CPU only" in result.output


@pytest.mark.parametrize(
    "case", [*SMALL, Attention(F32, T=9, H=3, K=16, V=16, slopes="fla")], ids=lambda c: c.op
)
def test_inputs_are_the_same_at_every_call(case: Case) -> None:
    """And all where they are asked for."""
    first, second = (case.inputs(torch.device("cpu")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {x.device.type for x in first.values()} == {"cpu"}


def test_rates_of_a_case() -> None:
    """By the name of their formula."""
    assert torch.equal(decay_rates("fla", 3), decay.fla(3, 0, 80))
    assert torch.equal(decay_rates("minimax", 3), decay.minimax(3, 0, 80))
    assert Attention(F32, T=1, H=1, K=16, V=16, slopes="fla").shape["slopes"] == "fla"


# ---- on CUDA, with a stand-in for it ----------------------------------------------------------------------


class StandIn:
    """Of torch.cuda what bench uses: notes what happens, and counts the seconds of the calls that it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.now, self.debug, self.stream = 0.0, 0, "current"
        stand_in = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = stand_in.now

            def elapsed_time(self, end: Any) -> float:
                assert stand_in.log[-1] == "wait"
                return 1e3 * (end.time - self.time)

        class Graph:
            def replay(self) -> None:
                stand_in.log.append("replay")

        @contextlib.contextmanager
        def on(stream: str) -> Iterator[None]:
            before, self.stream = self.stream, stream
            yield
            self.stream = before

        @contextlib.contextmanager
        def capture(graph: Graph) -> Iterator[None]:
            assert isinstance(graph, Graph) and self.stream == "current" and self.debug == 0
            with on("capture"):
                yield

        def stream(name: str) -> Any:
            return SimpleNamespace(
                name=name, wait_stream=lambda other: self.log.append(f"{name} waits for {other.name}")
            )

        def debug(mode: int | str) -> None:
            self.debug = {"error": 2, 0: 0}[mode]

        for name, value in {
            "device": lambda device: contextlib.nullcontext(),
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "Stream": lambda: stream("side"),
            "current_stream": lambda: stream("current"),
            "stream": lambda s: on(s.name),
            "get_sync_debug_mode": lambda: self.debug,
            "set_sync_debug_mode": debug,
            "empty_cache": lambda: self.log.append("empty"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: self.log.append("wait"))

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.log.append(name)
            self.now += seconds

        return call


def test_times_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """By events around each call, in turns, many of which are queued before the device is waited for; in one queue
    what raises is left out."""
    cuda = StandIn(monkeypatch)
    calls = {"a": cuda.call("a", 0.002), "b": cuda.call("b", 0.003)}
    monkeypatch.setattr(timing, "PATIENCE", 0.0)
    assert timing.medians(calls, CUDA, 0.01) == pytest.approx({"a": 0.002, "b": 0.003})
    warm_up = ["wait", "a", "wait", "wait", "b", "wait"]
    assert cuda.log[:12] == warm_up * 2
    queued = cuda.log[12:]
    first = queued.index("wait")
    assert queued[:first] == ["a", "b"] * (first // 2) and first > 2
    assert timing.best_seconds(calls["a"], CUDA, 0.001) == pytest.approx(0.002)

    left = iter(range(5))

    def fails() -> None:
        if next(left, None) is None:
            raise torch.OutOfMemoryError("no room")

    errors: dict[str, str] = {}
    calls["c"] = fails
    times = timing.medians(calls, CUDA, 0.01, lambda name, error: errors.update({name: str(error)}))
    assert times == pytest.approx({"a": 0.002, "b": 0.003}) and errors == {"c": "no room"}
    with pytest.raises(torch.OutOfMemoryError):
        timing.medians({"c": fails}, CUDA, 0.01)


def test_graph_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warmed up on a stream at the side, the last time with errors where it would wait; captured once; replayed."""
    cuda = StandIn(monkeypatch)

    def call() -> str:
        cuda.log.append(f"{cuda.stream} {cuda.debug}")
        return cuda.stream

    replayed = graph.Replayed(call, CUDA)
    warm_ups = ["side 0"] * (graph.WARM_UPS - 1) + ["side 2"]
    assert cuda.log == ["side waits for current", *warm_ups, "current waits for side", "capture 0"]
    cuda.log.clear()
    assert [replayed(), replayed()] == ["capture", "capture"] and cuda.log == ["replay", "replay"]


def test_a_call_that_waits_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises before the capture, which it would spoil, and leaves everything as it was."""
    cuda = StandIn(monkeypatch)

    def call() -> None:
        assert cuda.stream != "capture"
        if cuda.debug:
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        graph.Replayed(call, CUDA)
    assert cuda.debug == 0


def test_facts_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name, size and driver, beside the processor; the headline names it."""
    properties = SimpleNamespace(
        name="A GPU", major=9, minor=0, multi_processor_count=132, total_memory=2**37
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(machine_module.shutil, "which", lambda name: None)
    host, device = machine_module.device(), machine_module.device(CUDA)
    assert (
        device["name"] == "A GPU" and device["compute_capability"] == "9.0" and device["host"] == host["name"]
    )
    assert device["multiprocessors"] == 132 and device["memory_bytes"] == 2**37
    assert {name: device[name] for name in ("cores", "threads", "instruction_set")} == {
        name: host[name] for name in ("cores", "threads", "instruction_set")
    }
    assert "driver" in device and {"cuda", "fla"} <= set(machine_module.versions())
    document = {
        "device": device,
        "limits": {"gemm_flops_per_s": {"bfloat16": 7.12e14, "float32": 5e12}, "copy_bytes_per_s": 4.1e12},
        "rows": [{"provider": "lightning_attn", "backend": "triton"}],
    }
    said = results.headline(document)
    assert "A GPU, 132 multiprocessors of 9.0, backend triton" in said
    assert "bfloat16 712 TFLOP/s, float32 5000 GFLOP/s; copy 4100.0 GB/s" in said


def test_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nvidia-smi says, of one GPU of several; nothing if it says nothing."""
    monkeypatch.setattr(machine_module.shutil, "which", lambda name: f"/bin/{name}")
    answer = SimpleNamespace(stdout="580.65.06\n580.65.06\n")
    monkeypatch.setattr(machine_module.subprocess, "run", lambda *_, **__: answer)
    assert machine_module._driver() == "580.65.06"

    def fails(*_: Any, **__: Any) -> None:
        raise OSError

    monkeypatch.setattr(machine_module.subprocess, "run", fails)
    monkeypatch.setattr(machine_module.Path, "read_text", fails)
    assert machine_module._driver() is None


def test_buffers_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 GiB on a GPU that has room, else a small part of what is free; that of the cache counts as free."""
    cuda = StandIn(monkeypatch)
    for free, expected in ((2**37, 2**31), (2**33, 2**30)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2**38))
        assert machine_module._copy_bytes(CUDA) == expected
    assert cuda.log == ["empty", "empty"]
