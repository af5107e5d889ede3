"""What the tests of the command line share: small cases, a run of one command, and a kernel made wrong."""

import importlib
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from support import BACKENDS
from torch import Tensor

from lightning_attn import backends
from lightning_attn.cli import main
from lightning_attn.cli.case import Case
from lightning_attn.cli.cases import Attention, Decode, GatedRMSNorm, Layer
from lightning_attn.cli.moe_blocks import MoeBlock, MoeMlp
from lightning_attn.cli.moe_cases import GroupedGemm, Route

F32, BF16 = torch.float32, torch.bfloat16

# Modules of the same names as the commands that they define.
bench_module = importlib.import_module("lightning_attn.cli.bench")
check_module = importlib.import_module("lightning_attn.cli.check")
cases_module = importlib.import_module("lightning_attn.cli.cases")
machine_module = importlib.import_module("lightning_attn.cli.machine")
moe_peers_module = importlib.import_module("lightning_attn.cli.moe_peers")
peers_module = importlib.import_module("lightning_attn.cli.peers")
softmax_module = importlib.import_module("lightning_attn.cli.softmax")

needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend was not built")

SMALL: list[Case] = [
    Attention(F32, T=70, H=2, K=16, V=24, stateful=True),
    Attention(BF16, T=70, H=2, K=16, V=16, lengths=(5, 0, 65)),
    Decode(F32, B=3, H=2, K=16, V=16),
    Decode(BF16, B=3, H=2, K=16, V=16, state=BF16, slots=True),
    GatedRMSNorm(F32, rows=6, D=33),
    Layer(F32, T=40, hidden=24, H=2, D=16),
    Route(F32, T=40, E=8, k=2),
    GroupedGemm(F32, M=40, E=4, N=24, K=16, spread="idle"),
    MoeMlp(F32, T=40, D=32, F=16, E=4, k=2, layout="interleaved"),
    MoeMlp(BF16, T=4, D=32, F=16, E=4, k=2, int8=True),
    MoeBlock(F32, T=40, D=32, F=16, E=4, k=2),
]
MOE = ("route", "grouped_gemm", "moe_mlp", "moe")


def run(*arguments: str) -> Result:
    """One command, whose output has no traceback whatever happens."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def spoil(
    monkeypatch: pytest.MonkeyPatch, function: str, how: Callable[[Tensor], Tensor], output: int = 0
) -> None:
    """Makes one raw function of the cpu backend wrong in one of its outputs."""
    module = backends.load("cpu")
    right = getattr(module, function)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        if isinstance(result, Tensor):
            return how(result)
        return tuple(how(x) if i == output and x is not None else x for i, x in enumerate(result))

    monkeypatch.setattr(module, function, wrong)


def off(x: Tensor) -> Tensor:
    """Too far from the truth in any dtype, in one element only."""
    x = x.clone()
    x.view(-1)[-1] += 0.1 * x.abs().max()
    return x


def measured(*cases: Case, backend: str = "auto", compare: bool = False) -> tuple[list[dict[str, Any]], str]:
    """The rows of `bench` for these cases on the CPU, in JSON and back, and what it said."""
    console = Console(file=io.StringIO(), width=400)
    cpu = torch.device("cpu")
    document = bench_module.measure(list(cases), backend, cpu, compare=compare, console=console)
    bench_module.show(document, console)
    assert isinstance(console.file, io.StringIO)
    return json.loads(json.dumps(document, allow_nan=False))["rows"], console.file.getvalue()


def after(calls: int, then: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for so many calls, from then on `then` of what it gives."""
    left = iter(range(calls))

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return result if next(left, None) is not None else then(result)

    return counted
