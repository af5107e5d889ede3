"""What the compiler makes of every Triton kernel, for GPUs that need not be here: registers, spills, shared memory.

    python -m benchmarks.compile_report                     # every kernel and configuration; exits with 1 on a fault
    python -m benchmarks.compile_report --arch sm_90 --dim 128 --dtype bfloat16 --all-variants

The kernels are to pass with Triton 3.6.0 and 3.7.1; `pytest tests/test_compiled.py` runs this with the one that is
installed. From the root of the repository, once for each:

    python -m venv ../with-3.7 && . ../with-3.7/bin/activate
    pip install -c constraints.txt -e '.[test]' && pytest tests/test_compiled.py

    python -m venv ../with-3.6 && . ../with-3.6/bin/activate
    pip install -c constraints.txt -e '.[test]' && pip install triton==3.6.0 'numpy<2.4'
    pytest tests/test_compiled.py
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
import torch
import triton
from rich.table import Table

from benchmarks import compile_gate as gate
from benchmarks.compile_gate import Row
from benchmarks.traffic import Traffic, traffic
from lightning_attn.backends.triton import moe_catalogue
from lightning_attn.backends.triton.catalogue import Entry, catalogue
from lightning_attn.backends.triton.compiled import compile_launch, specialisation
from lightning_attn.backends.triton.config import ARCHS, KIB
from lightning_attn.cli import report


@dataclass(frozen=True)
class Configuration:
    arch: str
    dim: int
    dtype: str

    @functools.lru_cache(maxsize=8)  # noqa: B019  (a value, of which there are few)
    def entries(self) -> list[Entry]:
        dtype, arch = getattr(torch, self.dtype), ARCHS[self.arch]
        if self.dim == gate.EXPERTS:
            return list(moe_catalogue.catalogue(dtype, arch))
        return list(catalogue(self.dim, dtype, arch))


def configurations(
    archs: tuple[str, ...], dims: tuple[int, ...], dtypes: tuple[str, ...]
) -> Iterator[Configuration]:
    """The ones of the gate, of all or of those archs, dims and dtypes; an arch that is named is taken in full."""
    for arch in archs or gate.MAIN_ARCHS + gate.CONSUMER_ARCHS:
        partial = arch in gate.CONSUMER_ARCHS and not archs
        for dim in [dim for dim in dims if dim != gate.EXPERTS] or (
            () if dims else gate.CONSUMER_DIMS if partial else gate.DIMS
        ):
            for dtype in dtypes or (gate.CONSUMER_DTYPES if partial else gate.DTYPES):
                yield Configuration(arch, dim, dtype)
        if not dims or gate.EXPERTS in dims:
            for dtype in dtypes or gate.EXPERT_DTYPES.get(arch, ("bfloat16",)):
                yield Configuration(arch, gate.EXPERTS, dtype)


def chosen(configuration: Configuration, all_variants: bool) -> list[int]:
    """Which entries of a configuration to compile: one of each kernel, and every variant where no spill may be."""
    everything = all_variants or gate.may_not_spill(
        configuration.arch, configuration.dim, configuration.dtype
    )
    keys, numbers = set(), []
    for number, entry in enumerate(configuration.entries()):
        key: Any = entry.launch.name
        if everything:
            key = specialisation(entry.launch, ARCHS[configuration.arch])
        if key not in keys:
            keys.add(key)
            numbers.append(number)
    return numbers


def compile_rows(
    configurations: list[Configuration], all_variants: bool, jobs: int, progress: Any
) -> list[Row]:
    """A row for each chosen entry of each configuration. What two dtypes share is compiled once."""
    wanted = [(c, number) for c in configurations for number in chosen(c, all_variants)]
    sharers: dict[tuple, list[tuple[Configuration, int]]] = {}
    for configuration, number in wanted:
        launch = configuration.entries()[number].launch
        key = (configuration.arch, *specialisation(launch, ARCHS[configuration.arch]))
        sharers.setdefault(key, []).append((configuration, number))
    figures = {}
    task = progress.add_task("compile", total=len(sharers))
    # Cached binaries would hide a compiler that has changed, or fails.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
            futures = {pool.submit(compile_entry, *shared[0]): shared for shared in sharers.values()}
            for future in as_completed(futures):
                figures.update(dict.fromkeys(futures[future], future.result()))
                progress.advance(task)
    return [_row(configuration, number, figures[configuration, number]) for configuration, number in wanted]


def compile_entry(configuration: Configuration, number: int) -> dict[str, Any]:
    """In a worker: the figures of a row."""
    try:
        made = compile_launch(configuration.entries()[number].launch, ARCHS[configuration.arch])
    except Exception as error:  # noqa: BLE001  (the compiler has many; whichever it is fails the gate)
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {
        "registers": made.registers,
        "spills": made.spills,
        "shared": made.shared,
        "matrix_products": made.matrix_products,
        "async_copies": made.async_copies,
        "descriptor_copies": made.descriptor_copies,
    }


def _row(configuration: Configuration, number: int, figures: dict[str, Any]) -> Row:
    entry = configuration.entries()[number]
    tiles = entry.launch.tiles
    return Row(
        arch=configuration.arch,
        dim=configuration.dim,
        dtype=configuration.dtype,
        operation=entry.operation,
        variant=entry.variant,
        kernel=entry.launch.name,
        tiles=(tiles.block, tiles.key, tiles.value),
        warps=tiles.warps,
        stages=tiles.stages,
        **figures,
    )


def compiled_tables(rows: list[Row]) -> Iterator[Table]:
    """One for each arch and head dim."""
    for (arch, dim), group in itertools.groupby(rows, lambda row: (row.arch, row.dim)):
        table = report.table(
            f"{arch}, {'experts' if dim == gate.EXPERTS else 'd'} = {dim}: what each kernel takes, and its instructions that multiply tiles or copy asynchronously",
            "kernel", "as in", "dtype", "tiles",
            right=("registers", "spills B", "shared KB", "products", "copies"),
        )  # fmt: skip
        for row in group:
            tiles = "x".join(str(side) for side in row.tiles if side)
            products = (f"{kind} {count}" for kind, count in (row.matrix_products or {}).items())
            table.add_row(
                row.kernel,
                f"{row.operation}, {row.variant}",
                row.dtype,
                f"{tiles} {row.warps}w {row.stages}s",
                str(row.registers),
                str(row.spills),
                f"{row.shared / KIB:.1f}",
                " ".join(products) or "-",
                str(row.async_copies),
                style="bold red" if gate.faults([row]) else None,
            )
        yield table


def traffic_table(counts: list[Traffic]) -> Table:
    table = report.table(
        "Bytes and flops of a call, bfloat16; floor: of the bytes but for segment states; again: from the L2 cache", "operation", "shape", "arch", "for a",
        right=("bytes", "segment states", "floor", "again", "flops"),
    )  # fmt: skip
    for count in counts:
        table.add_row(
            count.operation,
            count.shape,
            count.arch,
            count.unit,
            f"{count.bytes:.6g}",
            f"{count.segment_states:.4g}",
            str(count.floor),
            f"{count.again:.6g}",
            f"{count.flops:.6g}",
            style="bold red" if count.fault else None,
        )
    return table


def document(rows: list[Row], counts: list[Traffic]) -> str:
    """JSON, a line for each row."""
    head = {
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    for name, lines in (("rows", rows), ("traffic", counts)):
        body = ",\n".join(json.dumps(asdict(line)) for line in lines)
        parts.append(f"{json.dumps(name)}: [\n{body}\n]")
    return "{" + ",\n".join(parts) + "}\n"


def _known_dims(dims: tuple[int, ...]) -> tuple[int, ...]:
    for dim in dims:
        if 256 < dim != gate.EXPERTS:
            raise click.BadParameter(f"expected a head dim up to 256 or {gate.EXPERTS}, got {dim}")
    return dims


@click.command()
@click.option(
    "--arch", "archs", multiple=True, type=click.Choice(list(ARCHS)), help="In place of all; repeatable."
)
@click.option(
    "--dim",
    "dims",
    multiple=True,
    type=click.IntRange(1, gate.EXPERTS),
    callback=lambda context, option, dims: _known_dims(dims),
    help=f"Head dim, or {gate.EXPERTS}: the mixture of experts at the shape of MiniMax-Text-01; repeatable.",
)
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(gate.DTYPES), help="Repeatable.")
@click.option("--all-variants", is_flag=True, help="Every way to call each kernel, also where it may spill.")
@click.option(
    "--jobs", type=click.IntRange(1), default=os.cpu_count(), help="Processes.  [default: all cores]"
)
@report.json_option
def main(
    archs: tuple[str, ...],
    dims: tuple[int, ...],
    dtypes: tuple[str, ...],
    all_variants: bool,
    jobs: int,
    json_path: Path | None,
) -> None:
    """Compile every Triton kernel and show what it takes, and what each operation moves. Exits with 1 on a fault."""
    if triton.knobs.runtime.interpret:
        raise click.ClickException("TRITON_INTERPRET is set: kernels are Python functions then, not compiled")
    console = report.console()
    wanted = list(configurations(archs, dims, dtypes))
    with report.progress(console) as progress:
        rows = compile_rows(wanted, all_variants, jobs, progress)
    counts = [count for arch in archs or gate.MAIN_ARCHS for count in traffic(ARCHS[arch])]
    for table in compiled_tables(rows):
        console.print(table)
    console.print(traffic_table(counts))
    if json_path:
        json_path.write_text(document(rows, counts))
    faults = gate.faults(rows) + [count.fault for count in counts if count.fault]
    for fault in faults:
        console.print(f"[red]{fault}[/]", highlight=False, soft_wrap=True)
    kernels = len({row.kernel for row in rows})
    console.print(f"Triton {triton.__version__}: {kernels} kernels, {len(rows)} rows, {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
