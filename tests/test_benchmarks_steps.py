"""What `python -m benchmarks.gpu` makes of its steps: failures, time, signals, tests in many processes, peers as wheels."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent

from benchmarks.gpu import process, wheels
from benchmarks.gpu.record import FAILED, LEFT_OUT, OK, TIMED_OUT, Outcome, Record
from benchmarks.gpu.run import allowance, run_steps
from benchmarks.gpu.show import summary
from benchmarks.gpu.steps import STEPS, Context, Step
from benchmarks.gpu.suite import Job, Suite, counted, jobs

# ---- steps that fail -----------------------------------------------------------------------------------------------


def python(code: str) -> Any:
    return lambda context: {"it": lambda limit: [sys.executable, "-c", code]}


def run(tmp_path: Path, *steps: Step, limit: float = 60.0, only: tuple[str, ...] = ()) -> dict[str, Any]:
    record = Record(tmp_path / "gpu.json", True, limit, [])
    context = Context(ROOT, tmp_path, tmp_path, True, dict(os.environ), {})
    run_steps(steps, context, record, only=only, say=lambda line: None)
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert list(summary(data))
    return data["steps"]


def alive(pid: int) -> bool:
    """Whether it runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_a_failing_step_is_recorded_and_the_rest_runs(tmp_path: Path) -> None:
    def broken(context: Context) -> Any:
        raise RuntimeError("out of coffee")

    steps = run(
        tmp_path,
        Step("fails", 30, 1, python("print('before'); raise SystemExit('no luck')")),
        Step("crashes", 30, 1, python("import os; os.abort()")),
        Step("cannot begin", 30, 1, broken),
        Step("is not there", 30, 1, lambda context: {"it": lambda limit: ["/no/such/program"]}),
        Step(
            "is excused",
            30,
            1,
            python("exit('Device not supported')"),
            excuse=lambda text: f"it says: {text}",
        ),
        Step("need not", 30, 1, lambda context: {"it": Outcome(LEFT_OUT, "no need")}),
        Step("works", 30, 1, python("print('done')")),
    )
    outcomes = {name: step["outcome"] for name, step in steps.items()}
    assert list(outcomes.values()) == [FAILED] * 4 + [LEFT_OUT] * 2 + [OK]
    assert steps["fails"]["exit_code"] == 1 and steps["fails"]["tail"] == "before\nno luck"
    assert steps["fails"]["why"] == "no luck"
    assert steps["crashes"]["exit_code"] == -signal.SIGABRT
    assert steps["cannot begin"]["why"] == "RuntimeError: out of coffee"
    assert steps["is excused"]["why"] == "it says: Device not supported"
    assert (tmp_path / "logs" / "it.log").read_text() == "done\n"


def test_without_a_gpu_nothing_is_tried(tmp_path: Path) -> None:
    """What the step "machine" says; one that merely fails stops nothing."""
    json_ = tmp_path / "logs" / "it.json"

    def machine(code: str) -> Step:
        return Step("machine", 30, 1, python(code), always=True)

    says = f'import pathlib; pathlib.Path({str(json_)!r}).write_text(\'{{"why_not": "no GPU"}}\'); exit(1)'
    after = Step("after", 30, 1, python("print('ran')"))
    steps = run(tmp_path, machine(says), after)
    assert {name: step["outcome"] for name, step in steps.items()} == {"machine": FAILED, "after": FAILED}
    assert steps["after"]["why"] == "no GPU" and steps["after"]["exit_code"] is None
    assert run(tmp_path, machine("exit(1)"), after)["after"]["outcome"] == OK


def test_a_step_out_of_time_is_ended_with_all_it_started(tmp_path: Path) -> None:
    """A child of a child too, also one that does not mind being asked; the next step runs."""
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
print("started", flush=True)
time.sleep(100)
"""
    start = time.monotonic()
    steps = run(tmp_path, Step("hangs", 2, 1, python(code)), Step("works", 30, 1, python("")))
    assert time.monotonic() - start < 30
    assert steps["hangs"]["outcome"] == TIMED_OUT and steps["hangs"]["exit_code"] is None
    assert steps["hangs"]["tail"] == "started" and steps["works"]["outcome"] == OK
    time.sleep(0.2)
    assert not alive(int((tmp_path / "pid").read_text()))


def test_no_time_left(tmp_path: Path) -> None:
    """Steps that do not get any are said to be cut, which is not ok."""
    steps = run(
        tmp_path,
        Step("slow", 30, 10, python("import time; time.sleep(100)")),
        Step("late", 30, 1, python("import time; time.sleep(100)")),
        limit=3.5,
    )
    assert [step["outcome"] for step in steps.values()] == [TIMED_OUT] * 2
    assert steps["late"]["why"] == "no time was left for it"


def test_how_the_time_is_divided() -> None:
    """A step takes what it may, leaves the others their least, and has its share if there is not enough."""
    assert allowance(most=100, least=10, left=500, later=200) == 100
    assert allowance(most=100, least=10, left=250, later=200) == 50
    assert allowance(most=100, least=50, left=100, later=150) == 25
    assert allowance(most=100, least=0, left=80, later=0) == 80
    least = sum(step.least for step in STEPS)
    assert least < 520 and all(step.least <= step.most for step in STEPS)


def test_what_has_not_finished_goes_on(tmp_path: Path) -> None:
    """A command that ends with its work unfinished is run again; what it cut is told."""
    path = tmp_path / "logs" / "it.json"
    code = f"""
import json, os, pathlib
path = pathlib.Path({str(path)!r})
data = json.loads(path.read_text()) if path.exists() else {{"turns": 0}}
data["turns"] += 1
data["unfinished"] = data["turns"] < 3
data["cut"] = ["the last"]
path.write_text(json.dumps(data))
if data["unfinished"]: os.abort()
"""
    steps = run(tmp_path, Step("thrice", 30, 1, python(code)))
    assert steps["thrice"]["outcome"] == TIMED_OUT and steps["thrice"]["cut"] == ["the last"]
    assert json.loads((tmp_path / "gpu.json").read_text())["results"]["thrice"]["turns"] == 3


def running(child: list[str], log: Path) -> list[str]:
    """A command that runs another one, as the steps do."""
    code = f"""
import os, pathlib, sys
sys.path.insert(0, {str(ROOT)!r})
from benchmarks.gpu import process
process.end_with_groups()
process.run({child!r}, pathlib.Path({str(log)!r}), limit=100, cwd=".", env=os.environ)
"""
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("nested", [False, True])
def test_a_signal_ends_the_groups_too(tmp_path: Path, nested: bool) -> None:
    """Whoever ends the command ends what it runs, and what that runs in groups of its own."""
    sleeper = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(100)"]
    command = running(sleeper, tmp_path / "log")
    if nested:
        command = running(command, tmp_path / "outer.log")
    parent = subprocess.Popen(command)
    log = tmp_path / "log"
    for _ in range(200):
        if log.exists() and log.read_text().strip():
            break
        time.sleep(0.1)
    parent.terminate()
    assert parent.wait(timeout=20) == -signal.SIGTERM
    time.sleep(0.2)
    assert not alive(int(log.read_text()))


# ---- the tests of a suite, and wheels ------------------------------------------------------------------------------


@pytest.fixture
def tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a suite of its own."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take their time
    folder = tmp_path / "tests"
    folder.mkdir()
    head = "import os, pytest, time\n\n@pytest.mark.gpu\ndef test_it():\n    "
    for name, body in {
        "good": "pass",
        "bad": "assert 1 == 2, 'it is wrong'",
        "crash": "os._exit(3)",
        "slow": "time.sleep(100)",
        "skip": "pytest.skip('no need')",
    }.items():
        (folder / f"test_{name}.py").write_text(head + body)
    (folder / "test_other.py").write_text("def test_it(): pass")
    (folder / "conftest.py").write_text(
        "def pytest_configure(config): config.addinivalue_line('markers', 'gpu: it')"
    )
    return folder


def test_a_suite_counts_what_passes_fails_and_crashes(tests: Path, tmp_path: Path) -> None:
    """A file that crashes costs nothing but itself."""
    suite = Suite(tmp_path / "suite.json", tmp_path / "logs", time.monotonic() + 200)
    names = ("bad", "crash", "skip", "other")
    suite.run([Job(tests / "test_good.py")], [Job(tests / f"test_{name}.py") for name in names], 3)
    data = json.loads((tmp_path / "suite.json").read_text())
    outcomes = {name[5:-3]: file["outcome"] for name, file in data["files"].items()}
    assert outcomes == {
        "good": "passed",
        "bad": "failed",
        "crash": "crashed",
        "skip": "passed",
        "other": "no GPU test",
    }
    assert data["totals"] == {"passed": 1, "failed": 1, "errors": 0, "skipped": 1}
    failures = {failure["id"].partition("::")[0].rpartition("/")[2]: failure for failure in data["failures"]}
    assert set(failures) == {"test_bad.py", "test_crash.py"}
    assert "it is wrong" in failures["test_bad.py"]["message"]
    assert (
        "test_it" in failures["test_crash.py"]["id"] and "exit code 3" in failures["test_crash.py"]["message"]
    )
    assert data["complete"] and not data["cut"] and not suite.green


def test_a_suite_ends_in_time(tests: Path, tmp_path: Path) -> None:
    """What does not end is ended, what has not begun is named."""
    suite = Suite(tmp_path / "suite.json", tmp_path / "logs", time.monotonic() + 5)
    suite.run([], [Job(tests / "test_slow.py"), Job(tests / "test_good.py")], 1)
    data = json.loads((tmp_path / "suite.json").read_text())
    assert data["files"]["test_slow.py"]["outcome"] == "timed out" and set(data["files"]) == {"test_slow.py"}
    assert data["cut"] == ["test_good", "test_slow"]


def test_a_suite_is_spread_over_processes(tests: Path, tmp_path: Path) -> None:
    """Files with many tests in parts, of which each test is in one; what has no GPU test is left out."""
    many = (
        "import pytest\n\n@pytest.mark.gpu\n@pytest.mark.parametrize('n', range(60))\ndef test_it(n): pass\n"
    )
    (tests / "test_many.py").write_text(many)
    counts = counted(tests, tmp_path / "log", 100)
    assert counts == {f"test_{name}.py": 1 for name in ("good", "bad", "crash", "slow", "skip")} | {
        "test_many.py": 60
    }
    heavy, others = jobs(tests, counts)
    assert not heavy and [(job.path.name, job.parts) for job in others][:3] == [("test_many.py", 3)] * 3
    assert len(others) == 3 + 5
    suite = Suite(tmp_path / "suite.json", tmp_path / "logs", time.monotonic() + 200)
    suite.run([], others[:3], 2)
    assert suite.files["test_many.py"]["passed"] == 60 and suite.files["test_many.py"]["processes"] == 3

    (tests / "test_broken.py").write_text("import nonsense_that_is_not_there")
    assert counted(tests, tmp_path / "log", 100) is None
    assert len(jobs(tests, None)[1]) == len(list(tests.glob("test_*.py")))


def test_wheels(tmp_path: Path) -> None:
    """Pure ones become importable, with their metadata; others are named."""
    beside = tmp_path / "wheels"
    beside.mkdir()
    with zipfile.ZipFile(beside / "some_peer-1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_peer/__init__.py", "x = 7")
        wheel.writestr(
            "some_peer-1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-peer\nVersion: 1.2\n"
        )
    (beside / "broken-1-py3-none-any.whl").write_text("no archive")
    (beside / "machine-1-cp312-cp312-linux_x86_64.whl").write_text("")
    found = wheels.unpack(beside, tmp_path / "into")
    assert found["some_peer-1.2-py3-none-any.whl"] == "ok"
    assert found["broken-1-py3-none-any.whl"].startswith("left out")
    assert found["machine-1-cp312-cp312-linux_x86_64.whl"].startswith("left out: it is not a pure wheel")
    code = "import importlib.metadata as m, some_peer; print(some_peer.x, m.version('some-peer'))"
    finished = process.run(
        [sys.executable, "-c", code],
        tmp_path / "log",
        limit=60,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "into")},
    )
    assert finished.exit_code == 0 and finished.tail == "7 1.2"
