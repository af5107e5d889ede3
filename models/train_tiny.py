"""Trains a byte-level hybrid of a few million parameters on CPUs. `python -m models.train_tiny --help`."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from . import checkpoint
from .byte_tokenizer import byte_tokenizer
from .config import LIGHTNING, SOFTMAX, TextConfig
from .parallel import Sizes, World
from .resume import Checkpoints, is_first
from .saving import replaced
from .text import CausalLM
from .training import Recipe, bits_per_byte, even_windows, start, train

CONFIG = TextConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rotary_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    attn_type_list=(LIGHTNING,) * 7 + (SOFTMAX,),
    rope_theta=1e4,
    max_position_embeddings=8192,
    layernorm_full_attention_alpha=2.0,  # (2 layers)^(1/4)
    layernorm_linear_attention_alpha=2.0,
    layernorm_mlp_alpha=2.0,
)


def read_bytes(path: Path | None) -> tuple[Tensor, Tensor]:
    """(training, held-out) bytes as uint8: of the file, whose last tenth is held out; or without one of the Python
    standard library's sources, every tenth of which is.
    """
    if path is not None:
        text = path.read_bytes()
        cut = len(text) - len(text) // 10
        parts = text[:cut], text[cut:]
    else:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        files += sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*/*.py"))
        files = [file for file in files if "packages" not in file.parent.name]
        texts = [file.read_bytes() for file in files]
        parts = b"".join(t for i, t in enumerate(texts) if i % 10), b"".join(texts[::10])
    train, held_out = (torch.tensor(bytearray(part), dtype=torch.uint8) for part in parts)
    return train, held_out


def plot(curve: list[float], held_out: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve, color="#adb5bd", linewidth=0.8, label="each step")
    mean = [sum(curve[max(i - 19, 0) : i + 1]) / min(i + 1, 20) for i in range(len(curve))]
    axes.plot(mean, color="#d9480f", label="mean of 20")
    axes.axhline(held_out, color="#4c6ef5", linestyle="--", label=f"held out: {held_out:.2f}")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--text", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Train on this file."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("tiny"),
    show_default=True,
    help="Directory of the checkpoint.",
)
@click.option("--steps", type=click.IntRange(1), default=Recipe.steps, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--parallel",
    metavar="cp=N,ep=N,etp=N",
    help="Train in the processes that torchrun starts: so many ranks for a sequence (cp), the experts (ep), an expert (etp). What "
    "is left over shares the batch.",
)
@click.option(
    "--checkpoint-every",
    "every",
    type=click.IntRange(0),
    default=0,
    metavar="STEPS",
    help="Write training checkpoints under OUT/training, and go on from the last one that is there. They are deleted at the end.",
)
@click.option(
    "--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curve (PNG)."
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the curve.")
def main(
    text: Path | None,
    out: Path,
    steps: int,
    seed: int,
    parallel: str | None,
    every: int,
    plot_path: Path | None,
    json_path: Path | None,
) -> None:
    """Trains a byte-level hybrid of lightning and softmax attention with a mixture of experts on CPUs.

    On the Python standard library's sources, or on --text. The checkpoint has the released format:
    `python -m models.generate --checkpoint tiny --prompt "def "` continues it. In four processes, with the same curve:
    `torchrun --nproc-per-node 4 -m models.train_tiny --parallel cp=2,ep=2`.
    """
    recipe = Recipe(steps=steps, seed=seed)
    training, held_out = read_bytes(text)
    shortest = min(len(training), len(held_out))
    if shortest <= recipe.length + 1:
        raise click.BadParameter(f"expected {10 * recipe.length + 20} bytes at least", param_hint="--text")
    shape = CausalLM(CONFIG, device="meta")
    try:  # now, not after minutes of training
        replaced(out, shape)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--out") from None
    for hint, path in (("--json", json_path), ("--plot", plot_path)):
        if path is not None and not path.parent.is_dir():
            raise click.BadParameter(f"expected a directory that exists, got {path.parent}", param_hint=hint)
    world = _world(parallel)
    parameters = sum(p.numel() for p in shape.parameters())
    _say(
        f"{parameters:,} parameters, {len(training):,} bytes, {recipe.batch * recipe.length:,} of them a step"
    )
    begin = time.perf_counter()
    try:
        run = start(CONFIG, recipe, world)
    except ValueError as error:  # experts that cannot be shared out so
        raise click.BadParameter(str(error), param_hint="--parallel") from None
    facts = {
        "recipe": asdict(recipe),
        "config": CONFIG.to_dict(),
        "text": hashlib.sha256(training.numpy().tobytes()).hexdigest(),
        "ranks": None if world is None else {"world": world.ranks, **asdict(world.sizes)},
    }
    checkpoints = Checkpoints(out / "training", every, facts)
    try:
        if every and checkpoints.load(run):
            _say(f"going on after step {len(run.curve)}")
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--out") from None
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    bits = TextColumn("{task.fields[bits]}")
    console = Console(stderr=True)
    with Progress(*columns, bits, TimeRemainingColumn(), console=console, disable=not is_first()) as progress:
        train(run, recipe, training, progress, checkpoints)
    seconds = time.perf_counter() - begin
    model = run.side.whole()
    if is_first():
        click.echo("reading the held-out text", err=True)
        result = bits_per_byte(model.eval(), even_windows(held_out, recipe.length))
        click.echo(f"{result:.3f} bits per byte on held-out text; trained in {seconds:.0f} s")
        checkpoint.save(model, out)
        byte_tokenizer().save(str(out / "tokenizer.json"))
        if every:
            checkpoints.clear()
        click.echo(f"saved in {out}")
        record: dict[str, Any] = {
            "recipe": asdict(recipe),
            "parameters": parameters,
            "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "held_out_bits_per_byte": round(result, 4),
            "bits_per_byte": [round(b, 4) for b in run.curve],
        }
        if world is not None:
            record["ranks"] = facts["ranks"]
        if json_path is not None:
            json_path.write_text(json.dumps(record, indent=1) + "\n")
        if plot_path is not None:
            plot(run.curve, result, plot_path)
    if world is not None:
        dist.destroy_process_group()


def _world(parallel: str | None) -> World | None:
    """The ranks that torchrun has started, joined; None without --parallel."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if parallel is None:
        if launched:
            raise click.UsageError(
                "torchrun started several processes: say how they are shared out (--parallel)"
            )
        return None
    if not dist.is_torchelastic_launched():
        raise click.UsageError(
            "--parallel wants processes: torchrun --nproc-per-node N -m models.train_tiny ..."
        )
    try:
        sizes = Sizes.parse(parallel)
        store, rank, ranks = next(dist.rendezvous("env://"))
        # torchrun's store outlives its workers: those that are started again must not find what the ones before left in it.
        store = dist.PrefixStore(f"restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
        return World(sizes)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--parallel") from None


def _say(text: str) -> None:
    if is_first():
        click.echo(text)


if __name__ == "__main__":
    main()
