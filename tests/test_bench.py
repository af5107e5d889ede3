"""The bench command: what it prints and writes, its cases and their costs, and that it times nothing that is
wrong."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import BF16, F32, SMALL, bench_module, needs_cpu, off, run, spoil
from support import ON_CPU
from torch import Tensor

from lightning_attn import backends
from lightning_attn.cli.cases import Attention, Decode

ROW = {
    "op": str,
    "pass": str,
    "provider": str,
    "backend": str,
    "device": str,
    "dtype": str,
    "shape": dict,
    "median_ms": (float, type(None)),
    "bytes": int,
    "flops": int,
    "limit_ms": float,
    "fraction_of_limit": (float, type(None)),
    "error": (float, type(None)),
    "ok": bool,
}


def assert_is_row(row: dict[str, Any]) -> None:
    assert set(row) == set(ROW)
    for name, kind in ROW.items():
        assert isinstance(row[name], kind), (name, row[name])
    assert row["pass"] in ("forward", "forward+backward")
    assert row["ok"] == (row["median_ms"] is not None) == (row["fraction_of_limit"] is not None)


def assert_is_head(head: dict[str, Any]) -> None:
    assert {"versions", "device", "commit", "date", "rows"} <= set(head)
    assert head["versions"]["torch"] and head["versions"]["lightning_attn"]
    assert head["device"]["name"] and head["device"]["threads"] >= 1
    assert head["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", head["commit"])
    assert datetime.fromisoformat(head["date"]).tzinfo is not None


@pytest.mark.parametrize("backend", ON_CPU)
def test_bench(backend: str, small: None, tmp_path: Path) -> None:
    """The JSON has the documented rows and head, and its figures agree with each other."""
    path = tmp_path / "new" / "bench.json"
    result = run("bench", "--backend", backend, "--json", str(path))
    assert result.exit_code == 0, result.output
    head = json.loads(path.read_text())
    assert_is_head(head)
    rows = head["rows"]
    passes = [(case, pass_) for case in SMALL for pass_ in case.passes]
    assert [(row["op"], row["pass"], row["shape"]) for row in rows] == [(c.op, p, c.shape) for c, p in passes]
    gemm, copy = head["limits"]["gemm_flops_per_s"], head["limits"]["copy_bytes_per_s"]
    for row, (case, pass_) in zip(rows, passes, strict=True):
        assert_is_row(row)
        assert row["ok"] and row["provider"] == "lightning_attn" and row["backend"] == backend
        assert row["device"] == "cpu" and row["dtype"] == str(case.dtype).removeprefix("torch.")
        assert row["bytes"] == case.bytes(pass_) and row["flops"] == case.flops(pass_)
        limit = 1e3 * max(row["flops"] / gemm[row["dtype"]], row["bytes"] / copy)
        assert row["limit_ms"] == pytest.approx(limit)
        assert row["fraction_of_limit"] == pytest.approx(row["limit_ms"] / row["median_ms"])
        assert row["median_ms"] > 0 and 0 <= row["error"] < 0.1
    assert gemm["bfloat16"] >= gemm["float32"] > 0
    for case in SMALL:
        assert case.op in result.output


def test_bench_of_some_ops(small: None, tmp_path: Path) -> None:
    """Named ops, and no others."""
    path = tmp_path / "bench.json"
    result = run("bench", "decode", "gated_rms_norm", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert {row["op"] for row in json.loads(path.read_text())["rows"]} == {"decode", "gated_rms_norm"}


def test_bench_compare(small: None, tmp_path: Path) -> None:
    """--compare adds eager PyTorch to every case, and transformers' layer to the module."""
    pytest.importorskip("transformers")
    path = tmp_path / "bench.json"
    result = run("bench", "--compare", "--json", str(path))
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["rows"]
    for row in rows:
        assert_is_row(row)
    for case in SMALL:
        for pass_ in case.passes:
            same = [
                row for row in rows if (row["op"], row["pass"], row["shape"]) == (case.op, pass_, case.shape)
            ]
            expected = ["lightning_attn", "eager-256"] + ["transformers"] * (case.op == "module")
            assert [row["provider"] for row in same] == expected
            assert all(row["ok"] and row["limit_ms"] == same[0]["limit_ms"] for row in same)
            assert [row["backend"] for row in same][1:] == ["torch"] * (len(same) - 1)
    assert "lightning_attn against" in result.output and "eager-256" in result.output


def test_bench_plot(small: None, tmp_path: Path) -> None:
    """--plot leaves a PNG per op, in a directory that it makes."""
    pytest.importorskip("matplotlib")
    plots = tmp_path / "a" / "b"
    result = run("bench", "--compare", "--plot", str(plots))
    assert result.exit_code == 0, result.output
    assert {path.name for path in plots.iterdir()} == {f"{case.op}.png" for case in SMALL}
    for path in plots.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG\r\n") and path.stat().st_size > 5000
        assert path.name in result.output


@needs_cpu
@pytest.mark.parametrize("kind", ["off", "NaN", "raises"])
def test_bench_times_nothing_wrong(
    kind: str, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result that fails its check is not timed, by no means; the rest is; exit code 1."""
    if kind == "raises":

        def broken(*args: Any) -> Tensor:
            raise RuntimeError("out of coffee")

        monkeypatch.setattr(backends.load("cpu"), "attention_decode", broken)
    else:
        spoil(monkeypatch, "attention_decode", off if kind == "off" else lambda x: x * float("nan"))
    timed: list[tuple[str, ...]] = []
    medians = bench_module.timing.medians

    def spy(calls: dict[str, Any], *args: Any) -> dict[str, float]:
        timed.append(tuple(calls))
        return medians(calls, *args)

    monkeypatch.setattr(bench_module.timing, "medians", spy)
    path = tmp_path / "bench.json"
    result = run("bench", "--backend", "cpu", "--compare", "--json", str(path))
    assert result.exit_code == 1
    assert "lightning_attn is not timed at decode float32" in result.output
    rows = json.loads(path.read_text())["rows"]
    for row in rows:
        assert_is_row(row)
        wrong = row["op"] == "decode" and row["provider"] == "lightning_attn"
        assert row["ok"] == (not wrong)
        assert (row["median_ms"] is None) == wrong
    assert timed.count(("eager-256",)) == 2  # the two decodes, without ours
    assert len(timed) == sum(len(case.passes) for case in SMALL)


@needs_cpu
def test_bench_judges_each_pass(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong gradient bars the backward pass, not the forward; a wrong output both."""
    for function, expected in (("attention_backward", [True, False]), ("attention_forward", [False, False])):
        with monkeypatch.context() as patch:
            spoil(patch, function, off)
            path = tmp_path / "bench.json"
            result = run("bench", "attention", "--backend", "cpu", "--json", str(path))
        assert result.exit_code == 1
        assert [row["ok"] for row in json.loads(path.read_text())["rows"]] == expected * 2


@needs_cpu
def test_bench_call_times(small: None, tmp_path: Path) -> None:
    """The full preset also measures what a public call costs over the raw kernel."""
    path = tmp_path / "bench.json"
    result = run("bench", "decode", "--preset", "full", "--json", str(path))
    assert result.exit_code == 0, result.output
    calls = json.loads(path.read_text())["call_us"]
    assert set(calls) == {"attention", "decode"}
    assert all(0 < times["raw"] < 10_000 and 0 < times["public"] < 10_000 for times in calls.values())


def test_shapes_of_the_presets() -> None:
    """The quick preset holds the shapes that the speed targets are stated for, each preset something in every
    op."""
    from lightning_attn.cli.suites import PRESETS, bench_cases

    quick = bench_cases("quick")
    for dtype in (F32, BF16):
        assert Attention(dtype, T=8192, H=8, K=128, V=128) in quick
        assert Decode(dtype, B=16, H=64, K=128, V=128, state=F32) in quick
    for preset in PRESETS:
        everything = {case.op for case in bench_cases(preset, module=True)}
        assert everything == {"attention", "decode", "gated_rms_norm", "module"}
        in_half = bench_cases(preset, (torch.float16,), module=True)
        assert {case.dtype for case in in_half} == {torch.float16}


def test_what_an_op_costs() -> None:
    """Flops and bytes are counted as documented: the block algorithm at C = 64, each operand moved once."""
    C = 64
    for d in (64, 128):
        case = Attention(BF16, T=1000, H=8, K=d, V=d)
        flops = 1000 * 8 * (4 * C * d // 2 + 4 * d * d)
        assert case.flops("forward") == flops and case.flops("forward+backward") == 3.5 * flops
    assert Attention(BF16, T=1, H=1, K=128, V=128).bytes("forward") == 1024
    assert Attention(BF16, T=1, H=1, K=128, V=128).bytes("forward+backward") == 1024 + 1792
    state = 2 * 128 * 128 * 4
    assert Decode(F32, B=16, H=64, K=128, V=128).bytes("forward") == 16 * 64 * (state + 4 * 128 * 4)
    assert Decode(F32, B=1, H=1, K=128, V=128, T=3).bytes("forward") == state + 3 * 4 * 128 * 4


def test_bench_of_the_environment(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LIGHTNING_ATTN_BACKEND is what "auto" means here as well."""
    path = tmp_path / "bench.json"
    monkeypatch.setenv("LIGHTNING_ATTN_BACKEND", "reference")
    assert run("bench", "decode", "--json", str(path)).exit_code == 0
    assert {row["backend"] for row in json.loads(path.read_text())["rows"]} == {"reference"}
    monkeypatch.setenv("LIGHTNING_ATTN_BACKEND", "nonsense")
    assert run("bench", "decode").exit_code == 2
