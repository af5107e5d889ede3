"""The command line: what info and check print and write, how every command ends, and that check praises
nothing that is wrong."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import BF16, F32, MOE, SMALL, check_module, machine_module, needs_cpu, off, run, spoil
from support import BACKENDS, DTYPES, HERE, ON_CPU, dtype_id, dtypes_of
from torch import Tensor

import lightning_attn
from lightning_attn import available_backends, backends, ops
from lightning_attn.cli.accuracy import Judge, Verdict
from lightning_attn.cli.case import Case
from lightning_attn.dispatch import Spec

ROOT = Path(__file__).resolve().parent.parent

# ---- info -------------------------------------------------------------------------------------------------


def test_info() -> None:
    """Every backend, with its reason if it cannot run; versions and the processor."""
    result = run("info")
    assert result.exit_code == 0
    for name, reason in available_backends().items():
        assert re.search(rf"{name}\s+{re.escape(reason)}", result.output)
    assert torch.__version__ in result.output and lightning_attn.__version__ in result.output


def test_info_of_what_is_absent(absent: str) -> None:
    """The reason, in full."""
    result = run("info")
    assert result.exit_code == 0
    assert re.search(rf"{absent}\s+{re.escape(available_backends()[absent])}", result.output)


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

# Of each op a raw function that it comes to; the layer's norm is in the backends that have its attention.
RAW = {
    "attention": "attention_forward",
    "decode": "attention_decode",
    "gated_rms_norm": "gated_rms_norm_forward",
    "module": "attention_forward",
    "route": "moe_route_backward",
    "grouped_gemm": "grouped_gemm_backward",
    "moe_mlp": "moe_mlp_backward",
    "moe": "moe_mlp_backward",
}


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
        (backend, op, dtype_id(dtype))
        for backend in BACKENDS
        for op, raw in RAW.items()
        for dtype in (DTYPES if backend in ON_CPU else dtypes_of(backend, raw))
    }
    outputs = {row["output"] for row in rows if row["op"] == "attention"}
    assert outputs == {"o", "state", "dq", "dk", "dv", "dinitial_state"}
    outputs = {row["output"] for row in rows if row["op"] in MOE}
    matrices = {"dw", "dgate", "dgate_up", "ddown"}
    assert outputs == {"y", "dx", "weights", "dweights", "experts", "dlogits"} | matrices
    assert "FAIL" not in result.output and f"{len(rows)} of {len(rows)} outputs pass" in result.output


@pytest.mark.parametrize("backend", HERE)
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


@needs_cpu
def test_check_leaves_out_what_a_backend_does_not_take(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither passed nor failed: counted, with the reason; a check that is left with nothing has failed."""

    def choosy(spec: Spec) -> list[str]:
        return ["it is picky"] if spec.dtype == BF16 else []

    monkeypatch.setattr(backends.load("cpu"), "supports", choosy)
    path = tmp_path / "check.json"
    result = run("check", "--json", str(path))
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())
    assert {row["dtype"] for row in rows if row["backend"] == "cpu"} == {"float32"}
    assert {row["dtype"] for row in rows if row["backend"] == "reference"} == {"float32", "bfloat16"}
    count = sum(case.dtype == BF16 for case in SMALL)
    assert f"cpu: {count} of {len(SMALL)} cases left out: it is picky" in result.output

    monkeypatch.setattr(check_module, "check_cases", lambda: iter(c for c in SMALL if c.dtype == BF16))
    result = run("check", "--backend", "cpu")
    assert result.exit_code == 1
    assert f"cpu: {count} of {count} cases left out" in result.output and "0 of 0 outputs" in result.output


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.op)
def test_a_case_says_which_calls_it_makes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a backend is asked about is what it is then given."""
    asked: list[Spec] = []
    reference = backends.load("reference")
    monkeypatch.setattr(reference, "supports", lambda spec: asked.append(spec) or [])
    ops._resolve.cache_clear()
    case.evaluate(case.ours("reference"), case.inputs(torch.device("cpu")), case.passes[-1])
    ops._resolve.cache_clear()
    assert set(asked) == set(case.specs(torch.device("cpu")))


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
    ("moe_route_forward", 0, "route", {"weights"}),
    ("moe_route_backward", 0, "route", {"dlogits"}),
    ("grouped_gemm_forward", 0, "grouped_gemm", {"y"}),
    ("grouped_gemm_backward", 0, "grouped_gemm", {"dx"}),
    ("grouped_gemm_backward", 1, "grouped_gemm", {"dw"}),
    ("moe_mlp_forward", 0, "moe_mlp", {"y"}),
    ("moe_mlp_backward", 0, "moe_mlp", {"dx"}),
    ("moe_mlp_backward", 1, "moe_mlp", {"dgate_up"}),
    ("moe_mlp_backward", 2, "moe_mlp", {"ddown"}),
    ("moe_mlp_backward", 3, "moe_mlp", {"dweights"}),
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
    found = {row["output"] for row in bad if row["op"] == op}
    assert (
        found >= failing if function == "moe_route_forward" else found == failing
    )  # its backward takes the weights
    assert {row["op"] for row in bad} <= {op, "moe" if op in MOE else "module"}
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
def test_absent_backend(command: str, absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is not there: its reason, and a failure."""
    monkeypatch.setattr(check_module, "check_cases", lambda: pytest.fail("work was done"))
    monkeypatch.setattr(machine_module, "measure_limits", lambda *_: pytest.fail("work was done"))
    result = run(command, "--backend", absent)
    assert result.exit_code == 1
    assert available_backends()[absent] in result.output


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
