"""What the commands share of talking to the user: options, console, names, files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_attn import available_backends, dispatch
from lightning_attn.backends import supports

from .case import Case, Shape

WIDTH = 140  # columns, where the output is not a terminal


def _writable(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Makes the file or directory now: before a long run one wants to know that it cannot be written."""
    try:
        if path and option.name == "json_path":
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a directory")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        elif path:
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(str(error), context, option) from error
    return path


json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=_writable,
    help="Also write every row to this file.",
)
plot_option = click.option(
    "--plot",
    "plot_dir",
    type=click.Path(file_okay=False, path_type=Path),
    callback=_writable,
    help="Leave a PNG per op in this directory.",
)


def backends(named: str | None) -> list[str]:
    """All the available backends, or the named one; a click error if that is not there."""
    reasons = available_backends()
    if named is None:
        return [name for name, reason in reasons.items() if reason == "ok"]
    if named not in reasons:
        raise click.BadParameter(f"{named!r} is not one of {', '.join(reasons)}", param_hint="--backend")
    if reasons[named] != "ok":
        raise click.ClickException(f"backend {named!r} is not available: {reasons[named]}")
    return [named]


def one_backend(named: str | None) -> str:
    """The named backend, else that of the environment, else "auto"."""
    named = asked_for(named or "auto")
    return named if named == "auto" else backends(named)[0]


def asked_for(backend: str) -> str:
    """A backend, or what the environment says that "auto" means."""
    return (os.environ.get("LIGHTNING_ATTN_BACKEND") or backend) if backend == "auto" else backend


def runs_on(case: Case, backend: str, device: torch.device) -> str:
    """The backend that runs a case; several, joined by "+", where "auto" takes one for one op and another for
    another; what was asked for, if none can.
    """
    backend = asked_for(backend)
    try:
        found = [dispatch.resolve(backend, spec, supports) for spec in case.specs(device)]
    except ValueError:
        return backend
    return "+".join(dict.fromkeys(found))


def takes(backend: str, case: Case, device: torch.device) -> bool:
    """Whether a backend is available and runs every op of a case."""
    return not any(supports(backend, spec) for spec in case.specs(device))


def device(named: str | None, backend: str) -> torch.device:
    """The named device; without a name the GPU, if there is one and the backend is not made for the CPU."""
    if named == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("PyTorch finds no CUDA device here", param_hint="--device")
    if (named, backend) == ("cuda", "cpu"):
        raise click.BadParameter("backend 'cpu' runs on the CPU only", param_hint="--device")
    on_gpu = torch.cuda.is_available() and backend != "cpu"
    return torch.device(named or ("cuda" if on_gpu else "cpu"))


def console() -> Console:
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH)


def progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def table(title: str, *left: str, right: tuple[str, ...] = ()) -> Table:
    """A table of text columns, then columns of figures."""
    made = Table(*left, title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in right:
        made.add_column(name, justify="right", no_wrap=True)
    return made


def shape_name(shape: Shape) -> str:
    return " ".join(f"{name}={size}" for name, size in shape.items())


def three_digits(x: float) -> str:
    """At least three, without an exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def rate(per_second: float, unit: str) -> str:
    """In giga or, if that is much, in tera units: "980 GFLOP/s", "712 TFLOP/s"."""
    prefix, scale = ("T", 1e12) if unit == "FLOP/s" and per_second >= 1e13 else ("G", 1e9)
    return f"{three_digits(per_second / scale)} {prefix}{unit}"


def exponent(x: float | None) -> str:
    return "-" if x is None else f"{x:.1e}"


def tick(ok: bool) -> str:
    return "[green]yes[/]" if ok else "[bold red]NO[/]"


def write_json(path: Path, data: object) -> None:
    """JSON has no NaN and no infinity: they become null."""
    path.write_text(json.dumps(finite(data), indent=1) + "\n")


def finite(data: Any) -> Any:
    """The same without NaN and infinities: None in their stead."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
