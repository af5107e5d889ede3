"""`lightning-attn ranks`: what it takes to share a sequence among processes of this machine, beside one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from . import report

OPS = ("lasp", "ring_attention")
DTYPES = ("float32", "bfloat16", "float16")


@click.command()
@click.argument("ops", nargs=-1, type=click.Choice(OPS), metavar="[OP]...")
@click.option(
    "--ranks",
    "size",
    type=click.IntRange(2),
    default=2,
    show_default=True,
    help="Processes that share a sequence.",
)
@click.option(
    "--tokens", type=click.IntRange(64), default=65536, show_default=True, help="Of the whole sequence."
)
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of all tensors."
)
@report.json_option
@report.plot_option
def ranks(
    ops: tuple[str, ...], size: int, tokens: int, dtype: str, json_path: Path | None, plot_dir: Path | None
) -> None:
    """Time lasp and ring_attention on several processes of this machine against one process.  [default: both]

    The one process has all threads (OMP_NUM_THREADS says how many) and runs lightning_attention, or ring_attention on a group of
    itself; the ranks share the same threads and talk through gloo. They take turns on the same cores. The time of the ranks goes from
    their common start to the end of the last, and the ratio is the medians' (1: the ranks lose nothing by what they send).

    Each case is checked before it is timed: at 2048 tokens against float64, at all tokens the ranks against the one process, and the
    bytes that each rank received against their formula. Exits with 1 if a result does not pass.
    """
    if plot_dir and not importlib.util.find_spec("matplotlib"):
        raise click.UsageError("--plot needs matplotlib: pip install 'lightning-attn-kernels[bench]'")
    from . import ranks_run  # only now: the other commands need none of it

    console = report.console()
    document = ranks_run.measure(ops or OPS, size, tokens, dtype, console)
    for table in ranks_run.tables(document):
        console.print(table)
    if json_path:
        report.write_json(json_path, document)
    if plot_dir:
        from .ranks_plot import save_plots

        for path in save_plots(document, plot_dir):
            console.print(f"Plot: {path}", highlight=False)
    if not all(row["ok"] for row in document["rows"]):
        raise click.ClickException("a result failed its check or raised an error, and was not timed")
