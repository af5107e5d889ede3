"""The command line: what it prints, what it writes, how it ends, and that it times and praises nothing that
is wrong."""

import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from support import BACKENDS
from torch import Tensor

import lightning_attn
from lightning_attn import available_backends, backends
from lightning_attn.cli import main
from lightning_attn.cli.accuracy import Judge, Verdict
from lightning_attn.cli.cases import Attention, Case, Decode, GatedRMSNorm, Layer

ROOT = Path(__file__).resolve().parent.parent
ABSENT = [name for name, reason in available_backends().items() if reason != "ok"]
ON_CPU = [name for name in BACKENDS if name in ("reference", "cpu")]
F32, BF16 = torch.float32, torch.bfloat16

# Modules of the same names as the commands that they define.
bench_module = importlib.import_module("lightning_attn.cli.bench")
check_module = importlib.import_module("lightning_attn.cli.check")
cases_module = importlib.import_module("lightning_attn.cli.cases")
machine_module = importlib.import_module("lightning_attn.cli.machine")

needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend was not built")

SMALL: list[Case] = [
    Attention(F32, T=70, H=2, K=16, V=24, stateful=True),
    Attention(BF16, T=70, H=2, K=16, V=16, lengths=(5, 0, 65)),
    Decode(F32, B=3, H=2, K=16, V=16),
    Decode(BF16, B=3, H=2, K=16, V=16, state=BF16, slots=True),
    GatedRMSNorm(F32, rows=6, D=33),
    Layer(F32, T=40, hidden=24, H=2, D=16),
]


def run(*arguments: str) -> Result:
    """One command, whose output has no traceback whatever happens."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """check and bench see small cases, bench measures small limits and times each call a few times."""
    monkeypatch.setattr(check_module, "check_cases", lambda: iter(SMALL))
    monkeypatch.setattr(bench_module, "bench_cases", lambda preset, dtypes, module: SMALL)
    monkeypatch.setattr(bench_module, "SECONDS_PER_CALL", 0.001)
    monkeypatch.setattr(cases_module, "COLD_BYTES", 2**16)
    monkeypatch.setattr(machine_module, "GEMM_SIZES", (64,))
    monkeypatch.setattr(machine_module, "COPY_BYTES", 2**20)


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


# ---- info -------------------------------------------------------------------------------------------------


def test_info() -> None:
    """Every backend, with its reason if it cannot run; versions and the processor."""
    result = run("info")
    assert result.exit_code == 0
    for name, reason in available_backends().items():
        assert re.search(rf"{name}\s+{re.escape(reason)}", result.output)
    assert torch.__version__ in result.output and lightning_attn.__version__ in result.output


def test_info_json() -> None:
    """The same as JSON, and nothing else on stdout."""
    result = run("info", "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 0
    assert facts["backends"] == available_backends()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["lightning_attn"] == lightning_attn.__version__
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"name", "cores", "threads", "instruction_set"} <= set(facts["device"])
    if "cpu" in BACKENDS:
        assert facts["device"]["instruction_set"] == backends.load("cpu").instruction_set()


# ---- check ------------------------------------------------------------------------------------------------


def test_check_is_green(tmp_path: Path) -> None:
    """Row 1: every op, dtype and shape of the command as it is shipped passes on every backend that is
    here."""
    path = tmp_path / "check.json"
    result = run("check", "--json", str(path))
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())
    assert all(row["ok"] and row["raised"] is None and row["error"] <= row["allowed"] for row in rows)
    found = {(row["backend"], row["op"], row["dtype"]) for row in rows}
    assert found == {
        (backend, op, dtype)
        for backend in BACKENDS
        for op in ("attention", "decode", "gated_rms_norm", "module")
        for dtype in ("float64", "float32", "bfloat16", "float16")
    }
    outputs = {row["output"] for row in rows if row["op"] == "attention"}
    assert outputs == {"o", "state", "dq", "dk", "dv", "dinitial_state"}
    assert "FAIL" not in result.output and f"{len(rows)} of {len(rows)} outputs pass" in result.output


@pytest.mark.parametrize("backend", ON_CPU)
def test_check_of_one_backend(backend: str, small: None, tmp_path: Path) -> None:
    """--backend judges that backend and no other; every row says what was judged."""
    path = tmp_path / "new" / "check.json"
    result = run("check", "--backend", backend, "--json", str(path))
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())
    assert rows and {row["backend"] for row in rows} == {backend}
    keys = {"backend", "op", "dtype", "shape", "output", "error", "allowed", "raised", "ok"}
    assert all(set(row) == keys for row in rows)
    assert next(row["shape"] for row in rows if row["op"] == "decode") == SMALL[2].shape


BREAKS = [
    ("attention_forward", 0, "attention", {"o"}),
    ("attention_forward", 1, "attention", {"state"}),
    ("attention_backward", 0, "attention", {"dq"}),
    ("attention_backward", 1, "attention", {"dk"}),
    ("attention_backward", 2, "attention", {"dv"}),
    ("attention_backward", 3, "attention", {"dinitial_state"}),
    ("attention_decode", 0, "decode", {"o"}),
    ("gated_rms_norm_forward", 0, "gated_rms_norm", {"o"}),
    ("gated_rms_norm_backward", 0, "gated_rms_norm", {"dx"}),
    ("gated_rms_norm_backward", 1, "gated_rms_norm", {"dgate"}),
    ("gated_rms_norm_backward", 2, "gated_rms_norm", {"dweight"}),
]


@needs_cpu
@pytest.mark.parametrize("function, output, op, failing", BREAKS, ids=[f"{f}-{i}" for f, i, *_ in BREAKS])
def test_check_finds_a_wrong_kernel(
    function: str,
    output: int,
    op: str,
    failing: set[str],
    small: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row 1: one element of one output of one kernel off: exit code 1, a FAIL line that names it, other rows
    as ever."""
    spoil(monkeypatch, function, off, output)
    path = tmp_path / "check.json"
    result = run("check", "--json", str(path))
    assert result.exit_code == 1
    rows = json.loads(path.read_text())
    bad = [row for row in rows if not row["ok"]]
    assert {row["backend"] for row in bad} == {"cpu"}
    assert {row["output"] for row in bad if row["op"] == op} == failing
    assert {row["op"] for row in bad} <= {op, "module"}
    for name in failing:
        assert re.search(rf"^FAIL cpu {op} float32 .*: {name}: error", result.output, re.MULTILINE)
    assert f"{len(rows) - len(bad)} of {len(rows)} outputs pass" in result.output


@needs_cpu
@pytest.mark.parametrize(
    "how",
    [
        lambda x: torch.full_like(x, float("nan")),
        lambda x: x * float("inf"),
        torch.zeros_like,
        lambda x: x.double(),
        lambda x: x[..., :-1],
    ],
    ids=["NaN", "inf", "zero", "dtype", "shape"],
)
def test_check_finds_any_kind_of_wrong(
    how: Callable[[Tensor], Tensor], small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 1: NaN is not close to anything, zero is not, nor are another dtype and another shape."""
    spoil(monkeypatch, "attention_decode", how)
    result = run("check", "--backend", "cpu")
    assert result.exit_code == 1 and "FAIL cpu decode float32" in result.output


@needs_cpu
def test_check_sees_states(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 17: a decode that does not update its state, or writes to one that is in no slot, fails."""
    module = backends.load("cpu")
    right = module.attention_decode

    def forgets(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, *rest: Any) -> Tensor:
        return right(q, k, v, decay, state.clone(), *rest)

    def scribbles(
        q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, slots: Any, *rest: Any
    ) -> Tensor:
        o = right(q, k, v, decay, state, slots, *rest)
        if slots is not None:
            used = set(slots.tolist())
            state[next(i for i in range(len(state)) if i not in used)] += 1
        return o

    for wrong, output in ((forgets, "state"), (scribbles, "idle_state")):
        monkeypatch.setattr(module, "attention_decode", wrong)
        result = run("check", "--backend", "cpu")
        assert result.exit_code == 1
        assert re.search(rf"^FAIL cpu decode .*: {output}: error", result.output, re.MULTILINE)


@needs_cpu
def test_check_survives_a_kernel_that_raises(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that raises fails with its message and stops nothing else."""

    def broken(*args: Any) -> Tensor:
        raise RuntimeError("out of coffee")

    monkeypatch.setattr(backends.load("cpu"), "attention_decode", broken)
    result = run("check")
    assert result.exit_code == 1
    assert "FAIL cpu decode float32" in result.output and "RuntimeError: out of coffee" in result.output
    assert re.search(r"reference +decode +float32 .* yes", result.output)
    assert re.search(r"cpu +module +float32 .* yes", result.output)


def test_the_rule() -> None:
    """Row 1: twice the error of plain PyTorch plus one epsilon passes, a little more does not; NaN never
    does."""
    case = SMALL[0]
    inputs = case.inputs(torch.device("cpu"))
    judge = Judge(case, inputs, "forward")
    assert all(v.ok for v in judge.verdicts(case.plain))

    def distance(x: Tensor) -> float:
        """From the truth, over the largest truth."""
        return ((x.double() - truth).abs().max() / truth.abs().max()).item()

    truth, state = judge.truth["o"], judge.truth["state"].float()
    assert truth.dtype == torch.float64
    plain = distance(case.evaluate(case.plain, inputs, "forward")["o"])
    allowed = 2 * plain + torch.finfo(F32).eps
    for share in (0.5, 0.9, 1.1, 3.0):
        far = truth.clone()
        far.view(-1)[0] += share * allowed * truth.abs().max()
        far = far.float()
        verdicts = {v.output: v for v in judge.verdicts(lambda *_, far=far, **__: (far, state))}
        assert verdicts["o"].ok == (distance(far) <= allowed) == (share < 1)
        assert verdicts["state"].ok
    assert not Verdict("o", math.nan, 1.0).ok and not Verdict("o", math.inf, 1.0).ok
    assert Verdict("o", 1.0, 1.0).ok


# ---- bench ------------------------------------------------------------------------------------------------

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


# ---- mistakes of the user ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--nonsense"], "No such option"),
        (["nonsense"], "No such command"),
        (["info", "--nonsense"], "No such option"),
        (["check", "--nonsense"], "No such option"),
        (["check", "--backend", "nonsense"], "is not one of"),
        (["check", "surplus"], "unexpected extra argument"),
        (["bench", "--nonsense"], "No such option"),
        (["bench", "nonsense"], "is not one of"),
        (["bench", "--preset", "nonsense"], "is not one of"),
        (["bench", "--dtype", "int8"], "is not one of"),
        (["bench", "--backend", "nonsense"], "is not one of"),
        (["bench", "--json", f"{__file__}/x.json"], "--json"),
        (["bench", "--plot", __file__], "--plot"),
        (["check", "--json", "/"], "--json"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x).replace(__file__, "this-file"),
)
def test_usage_errors(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2, a message that says what is wrong, no traceback, and no work done before."""
    monkeypatch.setattr(check_module, "check_cases", lambda: pytest.fail("work was done"))
    monkeypatch.setattr(machine_module, "measure_limits", lambda *_: pytest.fail("work was done"))
    result = run(*arguments)
    assert result.exit_code == 2
    assert message.lower() in result.output.lower() and "Usage:" in result.output


@pytest.mark.parametrize("command", ["check", "bench"])
@pytest.mark.parametrize("name", ABSENT)
def test_absent_backend(command: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is not there: its reason, and a failure."""
    monkeypatch.setattr(check_module, "check_cases", lambda: pytest.fail("work was done"))
    monkeypatch.setattr(machine_module, "measure_limits", lambda *_: pytest.fail("work was done"))
    result = run(command, "--backend", name)
    assert result.exit_code == 1
    assert available_backends()[name] in result.output


def test_bench_of_the_environment(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LIGHTNING_ATTN_BACKEND is what "auto" means here as well."""
    path = tmp_path / "bench.json"
    monkeypatch.setenv("LIGHTNING_ATTN_BACKEND", "reference")
    assert run("bench", "decode", "--json", str(path)).exit_code == 0
    assert {row["backend"] for row in json.loads(path.read_text())["rows"]} == {"reference"}
    monkeypatch.setenv("LIGHTNING_ATTN_BACKEND", "nonsense")
    assert run("bench", "decode").exit_code == 2


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["info", "-h"], ["check", "-h"], ["bench", "-h"]], ids=" ".join
)
def test_help(arguments: list[str]) -> None:
    """Help is there for every command."""
    result = run(*arguments)
    assert result.exit_code == 0 and "Usage:" in result.output
    if len(arguments) == 1:
        assert all(command in result.output for command in ("info", "check", "bench"))


# ---- as a program -----------------------------------------------------------------------------------------


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lightning_attn", *arguments],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
        cwd=Path(lightning_attn.__file__).resolve().parent.parent,
    )


def test_as_a_program() -> None:
    """`python -m lightning_attn` is the console script."""
    result = program("info", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["backends"] == available_backends()
    result = program("check", "--backend", "nonsense")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "lightning-attn check" in result.stderr  # its name in the usage
    script = re.search(r'^lightning-attn = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert script and script[1] == "lightning_attn.cli:main"
