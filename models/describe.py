"""What a model is made of, without making it: python -m models.describe text-01|vl-01|PATH [--tensors]"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from .config import SOFTMAX, TextConfig, VLConfig, from_file
from .placement import size
from .tensors import Entry, entries, skeleton
from .text import CausalLM, DecoderLayer

RELEASED = {"text-01": TextConfig, "vl-01": VLConfig}
WIDTH = 110  # where standard output is no terminal


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.option("--tensors", is_flag=True, help="Print the tensors of the checkpoint instead.")
def main(model: str, tensors: bool) -> None:
    """The components of MODEL: their parameters, and the bytes in bfloat16 and in int8 as this package quantises.

    MODEL is text-01 (MiniMax-Text-01), vl-01 (MiniMax-VL-01), or a config.json or the directory of one.

    With --tensors a line for each tensor, name<TAB>shape<TAB>dtype, and nothing else: the shape as JSON, [6144, 8192], the
    dtype BF16, as the release stores every tensor.
    """
    try:
        config = RELEASED[model]() if model in RELEASED else _from_file(model)
    except (TypeError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    network = skeleton(config, dtype=torch.bfloat16)
    places = entries(network)
    if tensors:
        lines = [f"{e.name}\t{json.dumps(e.shape)}\tBF16" for e in places.values()]
        click.echo("\n".join(lines))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(_table(network, places, model))
    for line in _activated(config if isinstance(config, TextConfig) else config.text, places):
        console.print(line)


def components(network: nn.Module, places: Mapping[str, Entry]) -> dict[str, tuple[int, list[Entry]]]:
    """By name, how many there are of a component and its tensors."""
    kinds = {
        f"{path}.self_attn.": "lightning attention" if module.lightning else "softmax attention"
        for path, module in network.named_modules()
        if isinstance(module, DecoderLayer)
    }
    found: dict[str, list[Entry]] = {}
    for name, entry in places.items():
        attention = name[: name.find(".self_attn.") + len(".self_attn.")]
        found.setdefault(kinds.get(attention) or _kind(name), []).append(entry)
    config = next(m.config for m in network.modules() if isinstance(m, CausalLM))
    softmax = config.attn_type_list.count(SOFTMAX)
    L, E = config.num_hidden_layers, config.num_local_experts
    counts = {
        "embeddings, head": 2,
        "lightning attention": L - softmax,
        "softmax attention": softmax,
        "experts": L * E,
        "routers": L,
        "norms": 2 * L + 1,
    }
    ordered = {name: (n, found.pop(name)) for name, n in counts.items() if name in found}
    return {**ordered, **{name: (1, held) for name, held in found.items()}}


def _kind(name: str) -> str:
    for part, kind in (
        ("vision_tower.", "vision tower"),
        ("multi_modal_projector.", "projector"),
        ("image_newline", "image_newline"),
        (".experts.", "experts"),
        (".block_sparse_moe.gate.", "routers"),
        ("norm.weight", "norms"),
    ):
        if part in name:
            return kind
    return "embeddings, head"


def _count(held: list[Entry]) -> int:
    return sum(math.prod(entry.shape) for entry in held)


def _table(network: nn.Module, places: Mapping[str, Entry], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("component", no_wrap=True)
    for column in ("count", "each", "parameters", "bfloat16", "int8"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, (n, held) in components(network, places).items():
        each = f"{_count(held) // n:,}"
        table.add_row(name, f"{n:,}", each, f"{_count(held):,}", *_bytes(held))
    everything = list(places.values())
    table.add_section()
    table.add_row("total", "", "", f"{_count(everything):,}", *_bytes(everything))
    return table


def _bytes(held: list[Entry]) -> tuple[str, str]:
    return size(sum(e.nbytes() for e in held)), size(sum(e.nbytes(int8=True) for e in held))


def _activated(config: TextConfig, places: Mapping[str, Entry]) -> list[str]:
    """The parameters of the text model that a token meets."""
    embedding = config.vocab_size * config.hidden_size
    text = [
        e
        for name, e in places.items()
        if not name.startswith(("vision_tower.", "multi_modal_projector.", "image_newline"))
    ]
    experts = _count([e for e in text if ".experts." in e.name])
    idle = experts // config.num_local_experts * (config.num_local_experts - config.num_experts_per_tok)
    inner = _count(text) - 2 * embedding - idle
    return [
        f"Activated per token, {words}: {inner + n * embedding:,}"
        for n, words in enumerate(("without embeddings and head", "with the head", "with both"))
    ]


def _from_file(path: str) -> TextConfig | VLConfig:
    if not Path(path).exists():
        raise ValueError(
            f"MODEL: expected {', '.join(RELEASED)}, or a config.json or its directory, got {path!r}"
        )
    return from_file(path)


if __name__ == "__main__":
    main(prog_name="python -m models.describe")
