"""The README keeps its promises: two commands, examples that run, figures that are those of the committed
result."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import plain_environment

import lightning_attn

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULT = ROOT / "benchmarks" / "results" / "cpu.json"
COMMANDS = {
    "Run": "pip install -c constraints.txt '.[bench]' && lightning-attn bench",
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


def test_table_is_up_to_date() -> None:
    """The table of measurements is what benchmarks/readme_table.py makes of the committed result, never
    typed."""
    process = python("benchmarks/readme_table.py", "--check", cwd=ROOT)
    assert process.returncode == 0, process.stderr
    table = README.partition("<!-- bench:begin -->")[2].partition("<!-- bench:end -->")[0]
    assert table.count("\n|") > 6, "the table is empty"


def test_a_stale_table_is_found(tmp_path: Path) -> None:
    """The check itself: one changed figure in the result, or in the README, and it fails; without --check it
    repairs."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "readme_table.py", tmp_path / "benchmarks")
    readme, result = tmp_path / "README.md", tmp_path / "result.json"
    data = json.loads(RESULT.read_text())
    script = "benchmarks/readme_table.py"

    readme.write_text(README, encoding="utf-8")
    result.write_text(json.dumps(data))
    assert python(script, str(result), "--check", cwd=tmp_path).returncode == 0
    for row in data["rows"]:
        row["median_ms"] = row["median_ms"] and 3 * row["median_ms"]
    result.write_text(json.dumps(data))
    stale = python(script, str(result), "--check", cwd=tmp_path)
    assert stale.returncode == 1 and "stale" in stale.stderr
    assert readme.read_text(encoding="utf-8") == README
    assert python(script, str(result), cwd=tmp_path).returncode == 0
    assert python(script, str(result), "--check", cwd=tmp_path).returncode == 0
    assert readme.read_text(encoding="utf-8") != README


def test_committed_result() -> None:
    """It is a run of `bench --compare` on a CPU whose every row of ours has passed its check."""
    head = json.loads(RESULT.read_text())
    assert {"versions", "device", "commit", "date", "limits", "rows"} <= set(head)
    ours = [row for row in head["rows"] if row["provider"] == "lightning_attn"]
    assert {row["op"] for row in ours} == {"attention", "decode", "gated_rms_norm", "module"}
    assert all(row["ok"] and row["median_ms"] > 0 and row["device"] == "cpu" for row in ours)
    assert "eager-256" in {row["provider"] for row in head["rows"]}


def test_public_names_are_mentioned() -> None:
    """Every public name stands in the README."""
    for name in lightning_attn.__all__:
        assert re.search(rf"\b{name}\b", README), name
