"""Rules of the source tree that no compiler checks."""

import ast
import re
from pathlib import Path

import lightning_attn

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh"))
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
PROJECT = (ROOT / "pyproject.toml").read_text()


def includes(path: Path) -> list[str]:
    return INCLUDE.findall(path.read_text())


def test_kernels_know_no_torch() -> None:
    """One build serves every torch: no source includes one of its headers, or Python's."""
    assert SOURCES
    for path in SOURCES:
        for header in includes(path):
            assert not re.match(r"(torch|ATen|c10|caffe2|at)/|Python\.h|numpy/", header), (path.name, header)


def test_only_the_bindings_know_python() -> None:
    """pybind11 is included in bindings.cpp alone."""
    binders = [
        path.name for path in SOURCES if any(header.startswith("pybind11") for header in includes(path))
    ]
    assert binders == ["bindings.cpp"]


def test_sources_are_included_by_their_own_names() -> None:
    """Every quoted include is a file of csrc, so a build needs no search path."""
    for path in SOURCES:
        for header in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
            assert (path.parent / header).is_file(), (path.name, header)


def test_size_of_sources() -> None:
    """A kernel per file, about 400 lines at most."""
    for path in SOURCES:
        lines = path.read_text().count("\n")
        assert lines <= 420, f"{path.name} has {lines} lines"


def test_the_build_needs_no_torch() -> None:
    """setup.py is short, and imports nothing but the standard library, setuptools and pybind11."""
    source = (ROOT / "setup.py").read_text()
    assert source.count("\n") < 120
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    tops = {name.partition(".")[0] for name in modules}
    assert not tops & {"torch", "numpy"}
    requires = re.search(r"^requires = \[(.*)\]$", PROJECT, re.MULTILINE)
    assert requires and {*re.findall(r'"([A-Za-z0-9_-]+)', requires[1])} == {"setuptools", "pybind11"}


def test_one_package_is_installed() -> None:
    """Nothing but lightning_attn: no top-level tests, models or benchmarks in site-packages."""
    assert 'include = ["lightning_attn*"]' in PROJECT
    assert (ROOT / "lightning_attn" / "py.typed").is_file()


def test_models_use_public_names() -> None:
    """models/ is built from what any user has: the names that `lightning_attn` and `lightning_attn.distributed` export, and no
    module below them.
    """
    public = {m.__name__: set(m.__all__) for m in (lightning_attn, lightning_attn.distributed)}
    files = sorted((ROOT / "models").glob("*.py"))
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("lightning_attn.") for alias in node.names), path.name
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_attn"):
                names = {alias.name for alias in node.names}
                assert names <= public.get(node.module or "", set()), (path.name, names)


def test_size_of_models() -> None:
    """A file is read in one sitting."""
    for path in (ROOT / "models").glob("*.py"):
        lines = path.read_text().count("\n")
        assert lines <= 280, f"{path.name} has {lines} lines"


def test_constraints() -> None:
    """Every line pins one version; torch, triton, transformers and all that a user installs are among
    them."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = {}
    for line in filter(None, lines):
        pin = re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)( *;.+)?", line)
        assert pin, line
        pins.setdefault(pin[1], pin[2])
    wanted = {"torch": "2.13.0", "triton": "3.7.1", "transformers": "5.17.0"}
    assert {name: pins.get(name) for name in wanted} == wanted
    lists = re.findall(r"^(dependencies|test|bench|models) = \[(.*)\]$", PROJECT, re.MULTILINE)
    assert [name for name, _ in lists] == ["dependencies", "test", "bench", "models"]
    for _, packages in lists:
        for name in re.findall(r'"([A-Za-z0-9-]+)', packages):
            assert name in pins, f"{name} is not pinned"


def test_licence_and_changelog() -> None:
    """MIT, and an entry for this version."""
    licence = (ROOT / "LICENSE").read_text()
    assert licence.startswith("MIT License") and "WITHOUT WARRANTY OF ANY KIND" in licence
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## .*{re.escape(lightning_attn.__version__)}", changes, re.MULTILINE)
