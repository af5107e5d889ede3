"""The ops under pytest-benchmark, for watching a change: `pytest benchmarks --benchmark-only`.

Keep a run with `--benchmark-autosave`, make the change, see the difference with `--benchmark-compare`. The
cases, and the check before each is timed, are those of `lightning-attn bench`, at smaller sizes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_attn import available_backends
from lightning_attn.cli.accuracy import Judge
from lightning_attn.cli.case import Case, dtype_name
from lightning_attn.cli.cases import Attention, Decode, GatedRMSNorm, Layer

pytest.importorskip("pytest_benchmark")

BACKENDS = [name for name, reason in available_backends().items() if reason == "ok"]
DEVICE = torch.device("cpu")


def cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield Attention(dtype, T=1, H=8, K=128, V=128)  # the cost of a call
        yield Attention(dtype, T=2048, H=4, K=128, V=128)
        yield Attention(dtype, T=2048, H=4, K=64, V=64, lengths=(64,) * 32)
        yield Decode(dtype, B=4, H=64, K=128, V=128)
        yield GatedRMSNorm(dtype, rows=1024, D=8192)
        yield Layer(dtype, T=512, hidden=512, H=4, D=128)


def parameters() -> Iterator[object]:
    for case in cases():
        for pass_ in case.passes:
            shape = "-".join(f"{name}{size}" for name, size in case.shape.items())
            yield pytest.param(case, pass_, id=f"{case.op}-{pass_}-{dtype_name(case.dtype)}-{shape}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case, pass_", parameters())
def test_op(benchmark, case: Case, pass_: str, backend: str) -> None:
    inputs = case.inputs(DEVICE)
    function = case.ours(backend)
    for verdict in Judge(case, inputs, pass_).verdicts(function):
        assert verdict.ok, verdict
    benchmark.group = f"{case.op} {pass_}"
    benchmark(case.step(function, inputs, pass_))
