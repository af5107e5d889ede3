"""What nvcc makes of csrc/cuda: registers, spills and the width of accesses of each kernel and architecture.

python -m benchmarks.nvcc_report [--json FILE]    # exits with 1 if a kernel spills, has a stack or is not 16 bytes wide
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from lightning_attn.backends.cuda import launch
from lightning_attn.cli import report

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "csrc" / "cuda"
PRELUDE, SOURCES = FOLDER / "prelude.cuh", sorted(FOLDER.glob("*.cu"))
ARCHS = ("sm_80", "sm_90a", "sm_100a")
KERNEL = re.compile(r"Compiling entry function '(\w+)' for '\w+'\n(.*?)(?=Compiling|\Z)", re.DOTALL)
FIGURES = {
    "registers": r"Used (\d+) registers",
    "stack": r"(\d+) bytes stack frame",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
}


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture; bytes, and how many loads and stores of 16 bytes of global memory it has, None if
    there is no disassembler.
    """

    kernel: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    wide_loads: int | None
    wide_stores: int | None

    @property
    def fault(self) -> str | None:
        if self.stack or self.spill_stores or self.spill_loads:
            return f"{self.kernel} spills on {self.arch}"
        if self.kernel.endswith("_aligned") and 0 in (self.wide_loads, self.wide_stores):
            return f"{self.kernel} does not move 16 bytes at a time on {self.arch}"
        return None


def compile_rows(arch: str, source: Path) -> Iterator[Row]:
    """Compiles a source for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        code = f"-gencode=arch=compute_{arch.removeprefix('sm_')},code={arch}"
        command = ["nvcc", "-cubin", "-O3", *launch.OPTIONS, "-Xptxas=-v", code, "-include", str(PRELUDE)]
        command += [str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc failed for {arch}:\n{done.stderr}")
        wide = _wide_accesses(cubin)
    for name, text in KERNEL.findall(done.stderr):
        found = {key: re.search(pattern, text) for key, pattern in FIGURES.items()}
        figures = {key: int(match[1]) for key, match in found.items() if match}
        loads, stores = wide[name] if wide else (None, None)
        yield Row(name, arch, **figures, wide_loads=loads, wide_stores=stores)


def _wide_accesses(cubin: Path) -> dict[str, tuple[int, int]]:
    """By kernel, its loads and stores of 128 bits; empty if there is no disassembler."""
    if not (tool := _cuobjdump()):
        return {}
    text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"Function : (\w+)\n", text)[1:]
    return {
        name: (len(re.findall(r"\bLDG\.E\.128", sass)), len(re.findall(r"\bSTG\.E\.128", sass)))
        for name, sass in zip(functions[::2], functions[1::2], strict=True)
    }


def _cuobjdump() -> str | None:
    """The one on the path, or that of Triton's package."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    packaged = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(packaged) if packaged.exists() else None


@click.command()
@report.json_option
def main(json_path: Path | None) -> None:
    """Compile csrc/cuda with nvcc for every architecture and show what each kernel takes."""
    if not shutil.which("nvcc"):
        raise click.ClickException("there is no nvcc")
    rows = [row for arch in ARCHS for source in SOURCES for row in compile_rows(arch, source)]
    figures = ("registers", "stack B", "spilled B", "16-byte loads", "stores")
    table = report.table("csrc/cuda by nvcc", "kernel", "arch", right=figures)
    for row in rows:
        spilled = row.spill_stores + row.spill_loads
        values = (row.registers, row.stack, spilled, row.wide_loads, row.wide_stores)
        table.add_row(row.kernel, row.arch, *map(str, values), style="bold red" if row.fault else None)
    report.console().print(table)
    if json_path:
        head = {"nvcc": nvcc_version(), "source_sha256": digests()}
        report.write_json(json_path, head | {"rows": [asdict(row) for row in rows]})
    faults = [row.fault for row in rows if row.fault]
    for fault in faults:
        click.echo(fault, err=True)
    sys.exit(bool(faults))


def nvcc_version() -> str | None:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release [\d.]+, V[\d.]+", text)
    return release[0] if release else None


def digests() -> dict[str, str]:
    """Of the sources that the figures are of."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (PRELUDE, *SOURCES)}


if __name__ == "__main__":
    main()
