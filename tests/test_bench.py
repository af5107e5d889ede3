"""The bench command: what it prints and writes, its cases and their costs, and that it times nothing that is
wrong."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import BF16, F32, MOE, SMALL, after, bench_module, measured, needs_cpu, off, run, spoil
from support import ON_CPU
from torch import Tensor

from lightning_attn import backends
from lightning_attn.cli.case import Case
from lightning_attn.cli.cases import Attention, Decode, GatedRMSNorm, Layer
from lightning_attn.cli.moe_blocks import MoeBlock, MoeMlp

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
    "limit_ms": (float, type(None)),
    "fraction_of_limit": (float, type(None)),
    "error": (float, type(None)),
    "ok": bool,
    "raised": (str, type(None)),
}


def assert_is_row(row: dict[str, Any]) -> None:
    assert set(row) == set(ROW)
    for name, kind in ROW.items():
        assert isinstance(row[name], kind), (name, row[name])
    assert row["pass"] in ("forward", "forward+backward", "backward", "graph")
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
    result = run("bench", "--backend", backend, "--device", "cpu", "--json", str(path))
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
    """--compare adds eager PyTorch to every case, transformers' layers to the modules, and grouped_mm where there is one."""
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
            plain = {"route": "softmax-topk"}.get(case.op, "per-expert" if case.op in MOE else "eager-256")
            expected = ["lightning_attn", plain]
            expected += ["grouped_mm"] * (case.op in MOE[1:] and "experts" not in case.shape)
            expected += ["transformers"] * (case.op in ("module", "moe"))
            expected += ["transformers-eager"] * (case.op == "moe")
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
        block = {"D": 1024, "F": 1536, "E": 16, "k": 2}
        assert MoeBlock(dtype, T=2048, **block, passes=("forward", "forward+backward")) in quick
        assert MoeBlock(dtype, T=4, **block) in quick
    assert MoeMlp(BF16, T=4, **block, int8=True) in quick
    for preset in PRESETS:
        everything = {case.op for case in bench_cases(preset, module=True)}
        assert everything == {"attention", "decode", "gated_rms_norm", "module", *MOE}
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
    for case in SMALL:
        for cost in (case.flops, case.bytes):
            assert cost("graph") == cost("forward")
            if case.op != "decode":
                assert cost("forward+backward") == cost("forward") + cost("backward")
    assert Attention(BF16, T=1, H=1, K=128, V=128).bytes("backward") == 1792
    case = Attention(BF16, T=1000, H=8, K=128, V=128)
    assert case.flops("backward") == 2.5 * case.flops("forward")


def test_bench_of_the_environment(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LIGHTNING_ATTN_BACKEND is what "auto" means here as well."""
    path = tmp_path / "bench.json"
    monkeypatch.setenv("LIGHTNING_ATTN_BACKEND", "reference")
    assert run("bench", "decode", "--json", str(path)).exit_code == 0
    assert {row["backend"] for row in json.loads(path.read_text())["rows"]} == {"reference"}
    monkeypatch.setenv("LIGHTNING_ATTN_BACKEND", "nonsense")
    assert run("bench", "decode").exit_code == 2


# ---- passes that a case names -----------------------------------------------------------------------------

NAMED: list[Case] = [
    Attention(BF16, T=70, H=2, K=128, V=128, passes=("backward", "forward")),
    Decode(F32, B=3, H=2, K=16, V=16, slots=True, passes=("graph", "forward")),
    GatedRMSNorm(F32, rows=6, D=33, passes=("backward",)),
    Layer(F32, T=40, hidden=24, H=2, D=16, passes=("backward", "forward+backward")),
]


def test_passes_of_a_case(small: None) -> None:
    """Each at the passes that it names, in their order, with their costs, beside eager PyTorch."""
    rows, _ = measured(*NAMED, compare=True)
    for row in rows:
        assert_is_row(row)
        assert row["ok"] and row["raised"] is None and row["median_ms"] > 0
    ours = [row for row in rows if row["provider"] == "lightning_attn"]
    pairs = [(case, pass_) for case in NAMED for pass_ in case.passes]
    assert [(row["op"], row["pass"], row["shape"]) for row in ours] == [(c.op, p, c.shape) for c, p in pairs]
    for row, (case, pass_) in zip(ours, pairs, strict=True):
        assert row["bytes"] == case.bytes(pass_) and row["flops"] == case.flops(pass_)
    assert ours[0]["bytes"] == 70 * 2 * 1792 and ours[1]["bytes"] == 70 * 2 * 1024
    assert sum(row["provider"] == "eager-256" for row in rows) == len(pairs)


def test_passes_that_a_case_has_not() -> None:
    """A case cannot name a pass that it has not; named or not, the usual passes make the same case."""
    with pytest.raises(ValueError, match="decode: expected passes among forward, graph, got 'backward'"):
        Decode(F32, B=1, H=1, K=16, V=16, passes=("backward",))
    with pytest.raises(ValueError, match="got 'graph'"):
        Attention(F32, T=1, H=1, K=16, V=16, passes=("graph",))
    case = Attention(F32, T=1, H=1, K=16, V=16)
    assert case == Attention(F32, T=1, H=1, K=16, V=16, passes=("forward", "forward+backward"))
    assert Attention(F32, T=2**20, H=1, K=16, V=16).passes == ("forward",)


@needs_cpu
@pytest.mark.parametrize("calls", [0, 1])
def test_backward_alone_is_judged(calls: int, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its gradients, and not by those of its first run only: it is repeated when it is timed."""
    module = backends.load("cpu")
    wrong = after(
        calls, lambda gradients: (*gradients[:2], off(gradients[2]), gradients[3]), module.attention_backward
    )
    monkeypatch.setattr(module, "attention_backward", wrong)
    rows, said = measured(NAMED[0], backend="cpu")
    assert [row["ok"] for row in rows] == [False, True]
    assert "lightning_attn is not timed at attention bfloat16" in said and "backward: dv: error" in said


@needs_cpu
def test_replay_is_judged(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay's outputs are judged, not those of another call; so is the state that it leaves."""
    module = backends.load("cpu")
    right = module.attention_decode
    case = Decode(F32, B=3, H=2, K=16, V=16, passes=("forward", "graph"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "attention_decode", after(1, off, right))
        rows, _ = measured(case, backend="cpu")
        assert [row["ok"] for row in rows] == [True, False]

    def forgets(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, *rest: Any) -> Tensor:
        return right(q, k, v, decay, state.clone(), *rest)

    monkeypatch.setattr(module, "attention_decode", forgets)
    rows, said = measured(case, backend="cpu")
    assert [row["ok"] for row in rows] == [False, False]
    assert "graph: state: error" in said


def test_time_of_a_graph_is_that_of_one_call(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph makes a call with each of the states that no cache holds together."""
    case = Decode(F32, B=3, H=2, K=16, V=16, passes=("forward", "graph"))
    calls = -(-(2**16) // (3 * 2 * 16 * 16 * 4))
    assert case.calls_per_step("graph") == calls > 1 and case.calls_per_step("forward") == 1
    monkeypatch.setattr(bench_module.timing, "medians", lambda steps, *_: dict.fromkeys(steps, 1.0))
    rows, _ = measured(case)
    assert [row["median_ms"] for row in rows] == pytest.approx([1000, 1000 / calls])
    called: list[int] = []

    def count(*args: Any, **kwargs: Any) -> Tensor:
        called.append(id(args[4]))
        return args[2]

    step = case.step(count, case.inputs(torch.device("cpu")), "graph")
    called.clear()
    step()
    assert len(set(called)) == len(called) == calls


# ---- what fails -------------------------------------------------------------------------------------------


@needs_cpu
def test_a_case_that_raises(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a row for each pass that says what it raised; the others are measured."""
    inputs = Decode.inputs

    def too_large(case: Decode, device: torch.device) -> dict[str, Tensor]:
        if case.slots:
            return inputs(case, device)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Decode, "inputs", too_large)
    path = tmp_path / "bench.json"
    result = run("bench", "--backend", "cpu", "--json", str(path))
    assert result.exit_code == 1 and "OutOfMemoryError: no room" in result.output
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == sum(len(case.passes) for case in SMALL)
    for row in rows:
        assert_is_row(row)
        raised = row["op"] == "decode" and "slots" not in row["shape"]
        assert row["ok"] != raised and (row["raised"] == "OutOfMemoryError: no room") == raised
        assert row["backend"] == "cpu" and (row["error"] is None) == raised


@needs_cpu
def test_a_case_without_limits(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """If not even the limits can be measured, the rows are there."""

    def broken(*_: Any) -> None:
        raise RuntimeError("no device")

    monkeypatch.setattr(bench_module.machine, "measure_limits", broken)
    rows, said = measured(*SMALL[:2])
    assert len(rows) == 4 and "RuntimeError: no device" in said
    for row in rows:
        assert_is_row(row)
        assert row["limit_ms"] is None and row["raised"] == "RuntimeError: no device"


@needs_cpu
def test_a_call_that_raises_when_it_is_timed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its check: it is said and not timed, what else was to be timed with it is."""

    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("out of coffee")

    module = backends.load("cpu")
    monkeypatch.setattr(module, "attention_decode", after(3, fail, module.attention_decode))
    rows, said = measured(SMALL[2], backend="cpu", compare=True)
    assert [(row["ok"], row["raised"]) for row in rows] == [
        (False, "RuntimeError: out of coffee"),
        (True, None),
    ]
    assert rows[0]["error"] is not None and "lightning_attn is not timed" in said
