"""`lightning-attn info`: what is installed, on what machine, and which backends run."""

from __future__ import annotations

import json
from collections.abc import Mapping

import click
import torch

import lightning_attn

from . import machine, report


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def info(as_json: bool) -> None:
    """Show versions, this machine, and each backend or why it is not available."""
    facts: dict[str, Mapping[str, object]] = {
        "versions": machine.versions(),
        "device": machine.device(),
        "backends": lightning_attn.available_backends(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = machine.device(torch.device("cuda"))
    commit = machine.commit()
    if as_json:
        click.echo(json.dumps(facts | {"commit": commit}, indent=2))
        return
    console = report.console()
    for title, values in facts.items():
        table = report.table(title, "", "")
        table.show_header = False
        for name, value in values.items():
            table.add_row(name, "-" if value is None else str(value))
        console.print(table)
    if commit:
        console.print(f"commit {commit}", highlight=False)
