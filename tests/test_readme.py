"""The README keeps its promises: two commands, examples that run, figures that are those of the committed
result."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import plain_environment

import lightning_attn

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULT = ROOT / "benchmarks" / "results" / "cpu.json"
COMMANDS = {
    "Run": "pip install -c constraints.txt -e '.[bench]' && lightning-attn bench",
    "Test": "pip install -c constraints.txt -e '.[test]' && pytest",
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = [code for language, code in FENCE.findall(README) if language == "python"]


def section(title: str) -> str:
    """What stands under `## title`."""
    found = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"README.md has {len(found)} headings '## {title}'"
    return found[0]


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
        cwd=cwd,
        env=plain_environment(),
    )


@pytest.mark.parametrize("title", COMMANDS)
def test_command(title: str) -> None:
    """Under its heading stands exactly one code block, of exactly one line, and it is the command."""
    blocks = FENCE.findall(section(title))
    assert len(blocks) == 1
    language, code = blocks[0]
    assert language in ("", "sh", "bash", "console")
    assert code.endswith("\n") and code.count("\n") == 1
    assert code.strip() == COMMANDS[title]


def test_commands_find_what_they_need() -> None:
    """The constraints file is there, and the extras and the program that the commands name are declared."""
    assert (ROOT / "constraints.txt").is_file()
    project = (ROOT / "pyproject.toml").read_text()
    for extra in ("bench", "test"):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)
    assert re.search(r"^lightning-attn = ", project, re.MULTILINE)


def test_there_are_examples() -> None:
    """One of the kernels, and one that takes arrays of another library through DLPack."""
    assert len(EXAMPLES) >= 2
    assert any("lightning_attention(" in code and "lightning_attention_decode(" in code for code in EXAMPLES)
    assert any("from_dlpack" in code for code in EXAMPLES)


@pytest.mark.parametrize("code", EXAMPLES, ids=[f"example-{i}" for i in range(len(EXAMPLES))])
def test_example(code: str) -> None:
    """Each runs as it is written, alone, in a fresh interpreter, without a warning."""
    package = Path(lightning_attn.__file__).resolve().parent.parent
    process = python("-W", "error::UserWarning", "-c", code, cwd=package)
    assert process.returncode == 0, process.stderr


def test_links() -> None:
    """Every file that the README points at is in the repository."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", README):
        path = next(filter(None, target))
        if not path.startswith(("http://", "https://", "mailto:")):
            assert (ROOT / path).exists(), f"README.md points at {path}"


SCRIPT = ("-m", "benchmarks.readme_table")


def between(name: str, readme: str = README) -> str:
    """What stands between the markers of that name."""
    return readme.partition(f"<!-- {name}:begin -->")[2].partition(f"<!-- {name}:end -->")[0].strip()


def test_figures_are_up_to_date() -> None:
    """The figures are what benchmarks/readme_table.py makes of the committed results, never typed."""
    process = python(*SCRIPT, "--check", cwd=ROOT)
    assert process.returncode == 0, process.stderr
    for name in ("bench", "experts", "ranks"):
        assert between(name).count("\n|") > 6, f"the table of {name} is empty"
    measured = (ROOT / "benchmarks" / "results" / "gpu.json").exists()
    assert between("gpu").endswith("still to be measured.") != measured


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout with no more than the script, its results and the README."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in (
        "__init__.py",
        "readme_table.py",
        "results/cpu.json",
        "results/experts.json",
        "results/ranks.json",
    ):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path / "benchmarks" / name)
    shutil.copytree(ROOT / "benchmarks" / "gpu", tmp_path / "benchmarks" / "gpu")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    return tmp_path


def test_a_stale_table_is_found(copy: Path) -> None:
    """The check itself: one changed figure in the result, or in the README, and it fails; without --check it
    repairs."""
    readme, result = copy / "README.md", copy / "result.json"
    data = json.loads(RESULT.read_text())
    assert python(*SCRIPT, cwd=copy).returncode == 0
    before = readme.read_text(encoding="utf-8")
    assert between("bench", before) == between("bench")

    result.write_text(json.dumps(data))
    assert python(*SCRIPT, str(result), "--check", cwd=copy).returncode == 0
    for row in data["rows"]:
        row["median_ms"] = row["median_ms"] and 3 * row["median_ms"]
    result.write_text(json.dumps(data))
    stale = python(*SCRIPT, str(result), "--check", cwd=copy)
    assert stale.returncode == 1 and "stale" in stale.stderr
    assert readme.read_text(encoding="utf-8") == before
    assert python(*SCRIPT, str(result), cwd=copy).returncode == 0
    assert python(*SCRIPT, str(result), "--check", cwd=copy).returncode == 0
    assert readme.read_text(encoding="utf-8") != before


def test_figures_of_a_gpu(copy: Path) -> None:
    """They come from the run's JSON, with those of its plots that are there; a dry run has none."""
    row = {"op": "attention", "pass": "forward", "dtype": "bfloat16", "bytes": 10**9, "ok": True}
    row |= {"shape": {"B": 2, "T": 8192, "H": 64, "K": 128, "V": 128}, "asked": "auto", "listed": True}
    rows = [
        row | {"provider": "lightning_attn", "backend": "triton", "median_ms": 2.0},
        row | {"provider": "fla", "backend": "torch", "median_ms": 5.0},
    ]
    data: dict[str, Any] = {
        "dry": False,
        "device": {"name": "Some GPU", "driver": "1"},
        "versions": {"torch": "2", "triton": "3"},
        "date": "2026-01-01T00:00:00+00:00",
        "copy_bytes_per_s": 1e12,
        "matrix_flops_per_s": {"bfloat16": 5e14},
        "results": {"forward": {"rows": rows}},
    }
    from benchmarks.gpu.targets import judged

    data["targets"] = judged(data)
    result = copy / "benchmarks" / "results" / "gpu.json"
    result.write_text(json.dumps(data))
    (result.parent / "gpu-floor.png").touch()
    assert python(*SCRIPT, "--check", cwd=copy).returncode == 1
    assert python(*SCRIPT, cwd=copy).returncode == 0
    text = between("gpu", (copy / "README.md").read_text(encoding="utf-8"))
    assert "Some GPU" in text and "copy 1000 GB/s" in text and "bfloat16 500 TFLOP/s" in text
    assert "| 2 ms | 0.50 | 2.5x |" in text and "(benchmarks/results/gpu-floor.png)" in text
    assert "gpu-speed" not in text and "met" in text and "missed" in text and "not measured" in text

    result.write_text(json.dumps(data | {"dry": True}))
    refused = python(*SCRIPT, cwd=copy)
    assert refused.returncode == 1 and "dry run" in refused.stderr


@pytest.mark.parametrize(
    ("result", "ops", "peers"),
    [
        ("cpu", {"attention", "decode", "gated_rms_norm", "module"}, {"eager-256", "transformers"}),
        (
            "experts",
            {"route", "grouped_gemm", "moe_mlp", "moe"},
            {"per-expert", "grouped_mm", "transformers"},
        ),
    ],
)
def test_committed_results(result: str, ops: set[str], peers: set[str]) -> None:
    """They are runs of `bench --compare` on a CPU whose every row of ours has passed its check."""
    head = json.loads((RESULT.parent / f"{result}.json").read_text())
    assert {"versions", "device", "commit", "date", "limits", "rows"} <= set(head)
    ours = [row for row in head["rows"] if row["provider"] == "lightning_attn"]
    assert {row["op"] for row in ours} == ops
    assert all(row["ok"] and row["median_ms"] > 0 and row["device"] == "cpu" for row in ours)
    assert peers <= {row["provider"] for row in head["rows"]}


def test_public_names_are_mentioned() -> None:
    """Every public name stands in the README."""
    for name in lightning_attn.__all__:
        assert re.search(rf"\b{name}\b", README), name
