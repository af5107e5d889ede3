"""What the commands share of talking to the user: options, console, names, files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import click
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_attn import available_backends, dispatch
from lightning_attn.backends import supports

from .cases import Shape

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


def one_backend(named: str | None, device: torch.device) -> str:
    """The named backend, or what "auto" means on this device."""
    named = named or os.environ.get("LIGHTNING_ATTN_BACKEND") or "auto"
    if named != "auto":
        return backends(named)[0]
    spec = dispatch.Spec("attention", device.type, torch.float32, torch.float32, K=128, V=128)
    return dispatch.resolve("auto", spec, supports)


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


def exponent(x: float) -> str:
    return f"{x:.1e}"


def tick(ok: bool) -> str:
    return "[green]yes[/]" if ok else "[bold red]NO[/]"


def write_json(path: Path, data: object) -> None:
    """JSON has no NaN and no infinity: they become null."""
    path.write_text(json.dumps(_finite(data), indent=1) + "\n")


def _finite(data: object) -> object:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
