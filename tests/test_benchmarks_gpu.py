"""`python -m benchmarks.gpu`, without a GPU: the dry run of all of it, its cases and its targets."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent

from benchmarks.gpu import dry
from benchmarks.gpu.cases import of_step
from benchmarks.gpu.readme import UNMEASURED, section
from benchmarks.gpu.record import LEFT_OUT, OK
from benchmarks.gpu.steps import MEASURED, STEPS
from benchmarks.gpu.targets import FLOOR, PEER, TARGETS, TFLOPS, judged

YARDSTICKS = {"eager-256", "per-expert", "softmax-topk"}
NAMES = [step.name for step in STEPS]


def command(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        # Beside other tests it has to wait its turn.
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), "--dry", "--limit", "1400", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def visible_files() -> list[Path]:
    """At the top of the checkout and among the benchmarks."""
    found = [*ROOT.glob("[!.]*"), *(ROOT / "benchmarks").rglob("*")]
    return [path for path in found if "__pycache__" not in path.parts]


# ---- the dry run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a dry run of every step, and what it printed."""
    out = tmp_path_factory.mktemp("gpu")
    before = set(visible_files())
    done = command(out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not set(visible_files()) - before, "it leaves files in the checkout"
    return out, done.stdout


@pytest.fixture(scope="module")
def document(dry_run: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((dry_run[0] / "gpu.json").read_text())


def test_every_step_of_a_dry_run_is_ok_or_says_why_not(document: dict[str, Any]) -> None:
    assert list(document["steps"]) == NAMES
    for name, step in document["steps"].items():
        if name == "build":
            assert step["outcome"] == OK or (step["outcome"] == LEFT_OUT and step["why"]), step
        elif name == "sanitizer":
            outcomes = {part: found["outcome"] for part, found in step["parts"].items()}
            assert outcomes == {"alone": OK, "compute-sanitizer": LEFT_OUT}, step
        else:
            assert step["outcome"] == OK and step["exit_code"] == 0 and step["log"], (name, step)


def test_a_dry_run_says_that_it_is_one(document: dict[str, Any], dry_run: tuple[Path, str]) -> None:
    """Its figures are nowhere taken for those of a GPU."""
    assert document["dry"] is True
    assert {target["verdict"] for target in document["targets"]} == {"not measured"}
    assert len(document["targets"]) == len(TARGETS)
    assert "DRY RUN" in dry_run[1].splitlines()[-1] and len(dry_run[1].splitlines()) < 100
    with pytest.raises(ValueError, match="dry run"):
        section(document, [])


def test_the_json_is_complete(document: dict[str, Any]) -> None:
    assert document["versions"]["torch"] and document["versions"]["triton"] and document["device"]["name"]
    assert document["backends"]["triton"] == "ok" and isinstance(document["missing_peers"], list)
    assert document["copy_bytes_per_s"] > 0 and document["matrix_flops_per_s"]["float16"] > 0
    results = document["results"]
    for step in MEASURED:
        expected = {
            (m.case.op, pass_, tuple(sorted(m.case.shape.items())))
            for m in of_step(step, dry_run=True)
            for pass_ in m.case.passes
        }
        rows = [row for row in results[step]["rows"] if row["provider"] == "lightning_attn"]
        assert {(r["op"], r["pass"], tuple(sorted(r["shape"].items()))) for r in rows} == expected, step
        assert all(row["ok"] and row["median_ms"] > 0 for row in rows)
        assert YARDSTICKS & {row["provider"] for row in results[step]["rows"]}
        assert not results[step]["unfinished"] and not results[step]["cut"]
    assert {row["backend"] for row in results["smoke"]["rows"]} >= {"triton"}
    assert results["tests"]["totals"]["passed"] > 0 and not results["tests"]["failures"]
    assert results["tests"]["files"]["test_slots.py"]["processes"] == 2
    checked = results["check"]
    assert checked["passed"] > 0 and not checked["failed"] and not checked["crashed"]
    assert {group["backend"] for group in checked["groups"]} >= {"triton"}


def test_the_plots_and_the_readme_can_be_made_of_it(document: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.gpu.plots import NAMES as plots
    from benchmarks.gpu.plots import save_plots

    made = list(save_plots(document, tmp_path))
    assert [path.name for path in made] == list(plots)
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") and path.stat().st_size > 5000 for path in made)
    text = section(_as_measured(document), ["a/gpu-speed.png"])
    listed = sum(len(m.case.passes) for step in MEASURED for m in of_step(step, dry_run=True) if m.listed)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == listed + len(TARGETS) + 6  # three heads, each with its rule
    measured = lines[: -len(TARGETS) - 2]
    assert sum(line.count(" ms |") + line.count(" us |") == 1 for line in measured) == listed
    assert "TFLOP/s | of the floor" in text
    assert "![Tokens a second against T](a/gpu-speed.png)" in text
    assert section(None, []) == UNMEASURED


def _as_measured(document: dict[str, Any]) -> dict[str, Any]:
    """The document of a dry run as that of a run on a GPU would be, where "auto" is asked for."""
    text = json.dumps(document).replace('"asked": "triton"', '"asked": "auto"')
    return json.loads(text) | {"dry": False}


def test_only(tmp_path: Path) -> None:
    """The others are left out and said to be; the head is there all the same."""
    done = command(tmp_path, "--only", "build")
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["versions"]["torch"]
    reasons = {name: step["why"] for name, step in data["steps"].items() if step["outcome"] == LEFT_OUT}
    assert set(reasons) | {"build"} == set(NAMES) - {"machine"}
    assert all(why == "not asked for" for name, why in reasons.items() if name != "build")
    assert command(tmp_path, "--only", "nonsense").returncode == 2


# ---- the cases and the targets -------------------------------------------------------------------------------------


def test_every_target_is_measured_by_a_case_of_its_step() -> None:
    """Of the same op, shape, pass and dtype, on a shape that the README lists."""
    for target in TARGETS:
        found = [m for m in of_step(target.step, dry_run=False) if m.case.shape == target.shape]
        assert any(
            m.case.op == target.op
            and target.pass_ in m.case.passes
            and str(m.case.dtype) == "torch.bfloat16"
            and m.listed
            for m in found
        ), target


def test_tiny_cases_are_of_the_same_kinds() -> None:
    for step in MEASURED:
        real, tiny = (of_step(step, dry_run=flag) for flag in (False, True))
        assert {(m.case.op, m.case.passes) for m in real} == {(m.case.op, m.case.passes) for m in tiny}
        assert all(m.case.dtype == dry.DTYPE for m in tiny)


def test_targets() -> None:
    """A fraction is of the bytes at the run's copy bandwidth, a peer the fastest that computes the same, and the
    row that counts the one that "auto" took.
    """
    target = next(t for t in TARGETS if t.metric == FLOOR and t.step == "decode")
    row = {"op": target.op, "pass": target.pass_, "dtype": "bfloat16", "shape": target.shape, "ok": True}
    row |= {"bytes": 2 * 10**9, "asked": "auto", "backend": "cuda"}
    rows = [
        row | {"provider": "lightning_attn", "median_ms": 0.5, "asked": "triton"},
        row | {"provider": "lightning_attn", "median_ms": 1.0},
        row | {"provider": "fla", "median_ms": 1.1},
        row | {"provider": "eager-256", "median_ms": 0.9},
        row | {"provider": "sdpa", "median_ms": 0.1},
        row | {"provider": "broken", "median_ms": None},
    ]
    document = {"dry": False, "copy_bytes_per_s": 2.0e12, "results": {"decode": {"rows": rows}}}
    found = {(t["case"], t["metric"]): t for t in judged(document)}
    floor, peer = found[target.case, FLOOR], found[target.case, PEER]
    assert floor["measured"] == pytest.approx(1.0) and floor["verdict"] == "met"
    assert peer["measured"] == pytest.approx(1.1) and peer["verdict"] == "missed" and peer["against"] == "fla"
    document["results"]["decode"]["rows"] = [row for row in rows if row["provider"] != "fla"]
    alone = next(t for t in judged(document) if (t["case"], t["metric"]) == (target.case, PEER))
    assert alone["verdict"] == "not measured", "to be faster than eager PyTorch meets no target"
    others = [t for key, t in found.items() if key[0] != target.case]
    assert all(t["verdict"] == "not measured" and t["measured"] is None for t in others)
    assert all(t["verdict"] == "not measured" for t in judged(document | {"dry": True}))
    assert all(t["verdict"] == "not measured" for t in judged({"dry": False}))


def test_targets_of_the_experts() -> None:
    """The rate of the products, the bandwidth of the matrices that are read, and PyTorch's grouped product, not the loop."""
    experts = [t for t in TARGETS if t.step in ("experts", "expert_decode")]
    assert {(t.metric, t.value) for t in experts} == {
        (TFLOPS, 600),
        (TFLOPS, 500),
        (PEER, 1.05),
        (FLOOR, 0.75),
    }
    results: dict[str, Any] = {"experts": {"rows": []}, "expert_decode": {"rows": []}}
    for target in experts:
        row = {"op": target.op, "pass": target.pass_, "dtype": "bfloat16", "shape": target.shape, "ok": True}
        row |= {"bytes": 2 * 10**9, "flops": 55 * 10**10, "asked": "auto", "backend": "triton"}
        results[target.step]["rows"] += [
            row | {"provider": "lightning_attn", "median_ms": 1.0},
            row | {"provider": "grouped_mm", "median_ms": 1.04},
            row | {"provider": "per-expert", "median_ms": 0.5},
        ]
    document = {"dry": False, "copy_bytes_per_s": 2.0e12, "results": results}
    found = {t["case"]: t for t in judged(document)}
    for target in experts:
        measured, verdict = {
            (TFLOPS, 600): (550, "missed"),
            (TFLOPS, 500): (550, "met"),
            (PEER, 1.05): (1.04, "missed"),
            (FLOOR, 0.75): (1.0, "met"),
        }[target.metric, target.value]
        assert found[target.case]["measured"] == pytest.approx(measured)
        assert found[target.case]["verdict"] == verdict


def test_bytes_of_a_decode_step_are_those_of_its_experts() -> None:
    """Of the experts that have tokens, once each."""
    for measured in of_step("expert_decode", dry_run=False):
        case = measured.case
        bytes_ = 1 if case.int8 else 2
        few = 0.01 * case.bytes("graph")
        assert case.used <= min(32, 2 * case.T)
        assert case.bytes("graph") == pytest.approx(case.used * 3 * 6144 * 9216 * bytes_, abs=few)
