"""Trains a byte-level hybrid of a few million parameters on a CPU. `python -m models.train_tiny --help`."""

from __future__ import annotations

import json
import math
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lightning_attn import load_balancing_loss, moe_route

from . import checkpoint
from .byte_tokenizer import byte_tokenizer
from .config import LIGHTNING, SOFTMAX, TextConfig
from .saving import replaced
from .text import CausalLM

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


@dataclass(frozen=True)
class Recipe:
    steps: int = 600
    batch: int = 8
    length: int = 256  # bytes
    peak_rate: float = 4e-3
    warmup: int = 40
    weight_decay: float = 0.05
    balance: float = 0.02  # weight of the experts' load-balancing loss
    seed: int = 0

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to a tenth."""
        if step < self.warmup:
            return self.peak_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        return self.peak_rate * (0.55 + 0.45 * math.cos(math.pi * done))


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


def bits_per_byte(model: CausalLM, windows: Tensor) -> float:
    """Of windows [N, T + 1] of bytes: the mean over the last T of each of -log2 p."""
    total = 0.0
    with torch.no_grad():
        for batch in windows.split(8):
            logits = model(batch[:, :-1].long())
            total += F.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].long().flatten(), reduction="sum"
            ).item()
    return total / math.log(2) / windows[:, 1:].numel()


def loss(model: CausalLM, batch: Tensor, balance: float) -> tuple[Tensor, Tensor]:
    """(what is minimised, its cross-entropy in nats) of batch [B, T + 1]."""
    logits, router = model(batch[:, :-1], return_router_logits=True)
    entropy = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    k = model.config.num_experts_per_tok
    uneven = sum(load_balancing_loss(r, moe_route(r.detach(), k)[1]) for r in router)
    return entropy + balance * uneven, entropy


def random_windows(text: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """[batch, length + 1] int64, each from a random place."""
    starts = torch.randint(len(text) - recipe.length, (recipe.batch,), generator=generator)
    return torch.stack([text[s : s + recipe.length + 1] for s in starts.tolist()]).long()


def even_windows(text: Tensor, length: int, count: int = 128) -> Tensor:
    """[count, length + 1] uint8, spread evenly; fewer of a short text."""
    count = min(count, len(text) // (length + 1))
    starts = torch.linspace(0, len(text) - length - 1, count).long()
    return torch.stack([text[s : s + length + 1] for s in starts.tolist()])


def train(
    config: TextConfig, recipe: Recipe, text: Tensor, progress: Progress
) -> tuple[CausalLM, list[float]]:
    """(model, bits per byte of each step)."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = CausalLM(config)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.95), fused=True)
    task = progress.add_task("training", total=recipe.steps, bits="")
    curve: list[float] = []
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        total, entropy = loss(model, random_windows(text, recipe, generator), recipe.balance)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(entropy.item() / math.log(2))
        progress.update(task, advance=1, bits=f"{sum(curve[-20:]) / len(curve[-20:]):.3f} bits/byte")
    return model, curve


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
    "--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Draw the curve (PNG)."
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the curve.")
def main(
    text: Path | None, out: Path, steps: int, seed: int, plot_path: Path | None, json_path: Path | None
) -> None:
    """Trains a byte-level hybrid of lightning and softmax attention with a mixture of experts on a CPU.

    On the Python standard library's sources, or on --text. The checkpoint has the released format:
    `python -m models.generate --checkpoint tiny --prompt "def "` continues it.
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
    parameters = sum(p.numel() for p in shape.parameters())
    click.echo(
        f"{parameters:,} parameters, {len(training):,} bytes, {recipe.batch * recipe.length:,} of them a step"
    )
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    bits = TextColumn("{task.fields[bits]}")
    with Progress(*columns, bits, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        model, curve = train(CONFIG, recipe, training, progress)
    seconds = time.perf_counter() - start
    click.echo("reading the held-out text", err=True)
    result = bits_per_byte(model.eval(), even_windows(held_out, recipe.length))
    click.echo(f"{result:.3f} bits per byte on held-out text; trained in {seconds:.0f} s")
    checkpoint.save(model, out)
    byte_tokenizer().save(str(out / "tokenizer.json"))
    click.echo(f"saved in {out}")
    record = {
        "recipe": asdict(recipe),
        "parameters": parameters,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "held_out_bits_per_byte": round(result, 4),
        "bits_per_byte": [round(b, 4) for b in curve],
    }
    if json_path is not None:
        json_path.write_text(json.dumps(record, indent=1) + "\n")
    if plot_path is not None:
        plot(curve, result, plot_path)


if __name__ == "__main__":
    main()
