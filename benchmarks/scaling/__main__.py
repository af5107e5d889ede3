"""The command `python -m benchmarks.scaling`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from lightning_attn.cli import machine, report
from lightning_attn.cli.case import FORWARD, TRAIN
from lightning_attn.cli.suites import DTYPES

from .layer import Layer
from .operations import Row, rows
from .rates import Model, Rates

NOTE = "Counted bytes and flops at assumed rates: nothing of this is measured."
COLUMNS = {
    "received": "bytes that the busiest rank receives from others, and the mean over ranks",
    "sent": "bytes that the rank that sends most sends",
    "messages": "of a rank, one after another: log2 of the ranks in an all-gather of states or counts, the hops of a ring, one for each "
    "other rank in an exchange",
    "compute": "of the busiest rank, the longer of flops at --flops and bytes at --memory: attention (with LASP+ also the state that "
    "a rank leaves and what entering ones add), or the experts' products; projections, norms and routing are left out",
    "comm": "of the rank that waits longest: bytes from its node at --intra, at the same time those from others at --inter, and "
    "--latency for each message",
    "exposed": "max(compute, comm) - compute, with LASP+ of the compute that needs no other rank's state, forward and backward "
    "apart. A head all-to-all hides so only in a pipeline over heads; the two exchanges of experts hide under the same compute",
}
SUFFIXES = {"K": 2**10, "M": 2**20, "G": 2**30}


class Sizes(click.ParamType):
    """8, 64M, 8,32 (a list) or 8..64 (the first, and its doubles up to the last)."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        found = []
        for part in value.split(","):
            first, dots, last = part.partition("..")
            try:
                size, end = _number(first), _number(last if dots else first)
            except ValueError:
                self.fail(f"expected numbers like 8, 64M, 8,32 or 8..64, got {value!r}", param, ctx)
            if not 1 <= size <= end:
                self.fail(f"expected 1 <= first <= last, got {part!r}", param, ctx)
            while size <= end:
                found.append(size)
                size *= 2
        return sorted(set(found))


def _number(text: str) -> int:
    text = text.strip().upper()
    return int(text[:-1]) * SUFFIXES[text[-1]] if text[-1:] in SUFFIXES else int(text)


def _options(function: Any) -> Any:
    """One for each field of Rates and Model."""
    help_ = {
        "flops": "Attainable FLOP/s of a rank.",
        "memory": "Bytes/s of a rank's memory.",
        "intra": "Bytes/s that a rank receives from its own node.",
        "inter": "Bytes/s that a rank receives from other nodes.",
        "node": "Ranks of a node.",
        "latency": "Seconds that each message adds.",
    }
    for cls in (Rates, Model):
        for f in reversed(fields(cls)):
            if f.name == "dtype":
                continue
            kind = (
                click.FloatRange(0, min_open=f.name != "latency")
                if isinstance(f.default, float)
                else click.IntRange(1)
            )
            name = "--" + f.name.replace("_", "-")
            text = help_.get(f.name, "Of the model.")
            function = click.option(name, f.name, type=kind, default=f.default, show_default=True, help=text)(
                function
            )
    return function


@click.command()
@click.option("--ranks", type=Sizes(), default="8..4096", show_default=True, help="That share a sequence.")
@click.option(
    "--tokens", type=Sizes(), default="1M..64M", show_default=True, help="Of the sequence; 1M is 2**20."
)
@click.option("--documents", type=Sizes(), help="Tokens of each packed document.  [default: one document]")
@click.option("--ep", type=click.IntRange(1), default=32, show_default=True, help="Ranks of EP, at most.")
@click.option("--etp", type=click.IntRange(1), default=8, show_default=True, help="Ranks of ETP, at most.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@_options
@report.json_option
@click.option(
    "--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Bytes and time, as a PNG."
)
def main(
    ranks: list[int],
    tokens: list[int],
    documents: list[int] | None,
    ep: int,
    etp: int,
    dtype: str,
    json_path: Path | None,
    plot_path: Path | None,
    **assumed: Any,
) -> None:
    """Count what each parallel algorithm sends on many ranks, and what that takes at assumed rates.

    One layer of each kind, the shapes of MiniMax-Text-01 unless changed. The table is of the most tokens; the JSON has all.
    """
    if plot_path and not importlib.util.find_spec("matplotlib"):
        raise click.UsageError("--plot needs matplotlib: pip install 'lightning-attn-kernels[bench]'")
    if documents and len(documents) > 1:
        raise click.BadParameter("expected one length", param_hint="--documents")
    model = Model(
        **{f.name: assumed[f.name] for f in fields(Model) if f.name != "dtype"}, dtype=DTYPES[dtype]
    )
    rates = Rates(**{f.name: assumed[f.name] for f in fields(Rates)})
    if model.heads % model.kv_heads:
        raise click.BadParameter("expected --kv-heads to divide --heads", param_hint="--kv-heads")
    if min(tokens) < 2 * max(ranks):
        raise click.BadParameter("expected two tokens a rank or more", param_hint="--tokens")
    document = documents[0] if documents else None
    found = [
        row
        for T in tokens
        for R in ranks
        for row in rows(Layer(model, rates, R, T, document=document, ep=ep, etp=etp))
    ]
    console = report.console()
    assumptions = asdict(model) | {"dtype": dtype} | asdict(rates)
    assumptions |= {"ep": ep, "etp": etp, "tokens_of_a_document": document}
    for table in tables(found, max(tokens)):
        console.print(table)
    for name, text in COLUMNS.items():
        console.print(f"{name}: {text}", markup=False, highlight=False)
    stated = ", ".join(f"{name} {_short(value)}" for name, value in assumptions.items() if value is not None)
    console.print(f"\n{NOTE} {stated}", markup=False, highlight=False)
    if json_path:
        head = {
            "note": NOTE,
            "assumptions": assumptions,
            "columns": COLUMNS,
            "versions": machine.versions(),
            "commit": machine.commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        report.write_json(json_path, head | {"rows": [row.as_json() for row in found]})
    if plot_path:
        from .plot import save_plot  # only now: matplotlib is slow to import

        save_plot(found, plot_path, NOTE)
        console.print(f"Plot: {plot_path}", highlight=False)


def tables(found: list[Row], tokens: int) -> Iterator[Table]:
    """Of one number of tokens, one for each operation: a line for each number of ranks."""
    chosen = [row for row in found if row.tokens == tokens]
    both = {(row.operation, row.ranks): row for row in chosen if row.pass_ == TRAIN}
    for name in dict.fromkeys(row.operation for row in chosen):
        made = report.table(
            f"{name}: {tokens:,} tokens, the forward, and with the backward; times in ms",
            right=("ranks", "received", "mean", "sent", "messages", "compute", "comm", "exposed",
                   "with backward:\nreceived", "\ncompute", "\ncomm", "\nexposed"),
        )  # fmt: skip
        for row in chosen:
            if (row.operation, row.pass_) != (name, FORWARD):
                continue
            if row.impossible:
                made.add_row(str(row.ranks), f"({row.impossible})")
                continue
            more = both[name, row.ranks]
            made.add_row(
                str(row.ranks),
                size(row.received_max), size(row.received_mean), size(row.sent_max), str(row.messages),
                *(_ms(x) for x in (row.compute, row.communication, row.exposed)),
                size(more.received_max),
                *(_ms(x) for x in (more.compute, more.communication, more.exposed)),
            )  # fmt: skip
        yield made


def size(bytes_: float | None) -> str:
    """In binary units, three digits."""
    amount, units = bytes_ or 0.0, ["TiB", "GiB", "MiB", "KiB", "B"]
    while amount >= 1000 and len(units) > 1:
        amount, _ = amount / 1024, units.pop()
    return f"{report.three_digits(amount)} {units[-1]}"


def _ms(seconds: float | None) -> str:
    return report.three_digits(1e3 * (seconds or 0.0))


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
