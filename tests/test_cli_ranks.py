"""`lightning-attn ranks`: processes of this machine at tiny sizes, what it writes, and that it times nothing that is wrong."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cli_support import off, run
from torch import Tensor

from lightning_attn.cli import ranks_cases, ranks_run
from lightning_attn.cli.case import TRAIN, Tensors
from lightning_attn.cli.ranks_cases import Lasp, RankCase, Ring
from lightning_attn.distributed import ring_plan

T, F32 = 200, torch.float32
LASP = Lasp(F32, T, layer=40, packed=True, H=2, K=16, V=8)
RING = Ring(F32, T, zigzag=True, H=4, G=2, D=8)


@dataclass(frozen=True)
class Wrong(Lasp):
    """One element off, on the last rank."""

    def across(self, inputs: Tensors, group: dist.ProcessGroup) -> Tensor:
        o = super().across(inputs, group)
        return off(o.detach()) + 0 * o if dist.get_rank(group) == 1 else o


@dataclass(frozen=True)
class Raising(Lasp):
    """One rank raises, for which the other would wait."""

    def across(self, inputs: Tensors, group: dist.ProcessGroup) -> Tensor:
        if dist.get_rank(group) == 1:
            raise RuntimeError("out of coffee")
        return super().across(inputs, group)


@dataclass(frozen=True)
class Chatty(Ring):
    """Its formula has forgotten something."""

    def bytes(self, rank: int, ranks: int, pass_: str) -> int:
        return super().bytes(rank, ranks, pass_) - 4


def use(monkeypatch: pytest.MonkeyPatch, *wanted: RankCase) -> None:
    def cases(ops: tuple[str, ...], dtype: torch.dtype, tokens: int) -> Iterator[RankCase]:
        for case in wanted:
            if case.op in ops:
                yield replace(case, dtype=dtype, T=tokens)

    monkeypatch.setattr(ranks_run, "cases", cases)
    monkeypatch.setattr(ranks_run, "SECONDS", 0.0)


def found(*arguments: str, code: int, tmp_path: Path) -> tuple[dict[str, Any], str]:
    path = tmp_path / "ranks.json"
    result = run("ranks", "--tokens", str(T), "--json", str(path), *arguments)
    assert result.exit_code == code, result.output
    return json.loads(path.read_text()), result.output


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ops on two ranks: every row checked, timed, its bytes as the formula says; JSON, table and plots."""
    use(monkeypatch, LASP, RING)
    document, output = found("--plot", str(tmp_path), code=0, tmp_path=tmp_path)
    assert {
        "versions",
        "device",
        "commit",
        "date",
        "ranks",
        "threads",
        "threads_of_a_rank",
        "backend",
    } <= set(document)
    rows = document["rows"]
    assert [(row["op"], row["pass"]) for row in rows] == [
        (op, pass_) for op in ("lasp", "ring_attention") for pass_ in ("forward", "forward+backward")
    ]
    for row in rows:
        assert row["ok"] and row["error"] <= row["allowed"] and row["raised"] is None
        assert row["turns"] >= ranks_run.LEAST and row["ratio"] == pytest.approx(
            row["ranks_ms"] / row["one_process_ms"]
        )
        assert (
            row["received_bytes"] == row["formula_bytes"] and len(row["received_bytes"]) == row["ranks"] == 2
        )
    states = 2 * 16 * 8 * 4
    assert rows[0]["received_bytes"] == [states] * 2 and rows[1]["received_bytes"] == [2 * states] * 2
    assert rows[0]["shape"]["N"] == 6 and rows[0]["target"] == 1.25 and rows[2]["target"] == 1.35
    assert "layer 40, packed" in output and "zigzag" in output and "1,024" in output
    assert {path.name for path in tmp_path.glob("*.png")} == {"lasp.png", "ring_attention.png"}


def test_wrong_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong, raises, or receives other bytes than it should is not timed, exit code 1; the rest is as ever."""
    names = {f: getattr(LASP, f) for f in ("dtype", "T", "packed", "layer", "H", "K", "V")}
    ring = {f: getattr(RING, f) for f in ("dtype", "T", "packed", "zigzag", "H", "G", "D")}
    use(monkeypatch, Wrong(**names), Raising(**names), Chatty(**ring), RING)
    document, output = found("--dtype", "bfloat16", code=1, tmp_path=tmp_path)
    rows = document["rows"]
    assert [row["ok"] for row in rows] == [False] * 6 + [True] * 2
    assert all(row["ratio"] is None and row["turns"] == 0 for row in rows[:6])
    assert "o of the ranks: error" in rows[0]["raised"] and rows[0]["error"] > rows[0]["allowed"]
    assert "out of coffee" in rows[2]["raised"] or "RankError" in rows[2]["raised"]
    assert "bytes received" in rows[4]["raised"]
    assert "lasp, layer 40, packed, forward is not timed" in output and "was not timed" in output


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize(
    "case", [LASP, RING, replace(RING, zigzag=False, packed=True)], ids=lambda case: case.name
)
def test_parts(case: RankCase, ranks: int) -> None:
    """What the ranks hold makes the whole again; plain PyTorch agrees with the truth."""
    inputs = case.inputs()
    parts = [case.part(inputs["q"], r, ranks) for r in range(ranks)]
    assert torch.equal(case.whole(parts), inputs["q"])
    assert sum(ring_plan.length(held) for held in case.layout(ranks)) == T
    plain = ranks_cases.evaluate(case.plain, inputs, TRAIN)
    truth = ranks_cases.evaluate(case.truth, {name: x.double() for name, x in inputs.items()}, TRAIN)
    for name, x in truth.items():
        assert (plain[name] - x).abs().max() <= 1e-5 * x.abs().max()


def test_the_cases_of_the_command() -> None:
    """Each op with its rates, documents and cuts, at all tokens."""
    names = {op: [case.name for case in ranks_cases.cases((op,), F32, 10)] for op in ranks_cases.OPS}
    assert names["lasp"] == ["layer 0", "layer 40", "no decay", "layer 0, packed"]
    assert names["ring_attention"] == ["zigzag", "contiguous"]
    assert all(
        case.T == 10 and case.offsets[-1] == 10 for case in ranks_cases.cases(ranks_cases.OPS, F32, 10)
    )


def test_usage() -> None:
    result = run("ranks", "--help")
    assert result.exit_code == 0 and "Usage:" in result.output and "float64" in result.output
    for arguments in (
        ["nonsense"],
        ["--ranks", "1"],
        ["--tokens", "0"],
        ["--dtype", "int8"],
        ["--json", "/"],
    ):
        result = run("ranks", *arguments)
        assert result.exit_code == 2 and "Usage:" in result.output


def test_other_commands_do_not_load_it() -> None:
    code = "import sys, lightning_attn.cli; print([m for m in sys.modules if 'ranks_' in m or 'attn.distributed' in m])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.stdout.strip() == "[]"
