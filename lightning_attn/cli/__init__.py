"""The console script `lightning-attn`: info, check, bench, ranks."""

from __future__ import annotations

import click

from .bench import bench
from .check import check
from .info import info
from .ranks import ranks


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Lightning attention kernels: what runs here, whether it is right, and how fast it is."""


for command in (info, check, bench, ranks):
    main.add_command(command)
