"""How a small text model is trained on windows of bytes: in one process, or over many (`models.parallel`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from lightning_attn import load_balancing_loss, moe_route
from lightning_attn.distributed import all_reduce, even_cuts, load_balancing_share

from .config import TextConfig
from .context import ContextParallel
from .parallel import World, experts_of, gather, parallelize
from .text import CausalLM

MAX_NORM = 1.0  # of the gradient


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


def random_windows(text: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """[batch, length + 1] int64, each from a random place."""
    starts = torch.randint(len(text) - recipe.length, (recipe.batch,), generator=generator)
    return torch.stack([text[s : s + recipe.length + 1] for s in starts.tolist()]).long()


def even_windows(text: Tensor, length: int, count: int = 128) -> Tensor:
    """[count, length + 1] uint8, spread evenly; fewer of a short text."""
    count = min(count, len(text) // (length + 1))
    starts = torch.linspace(0, len(text) - length - 1, count).long()
    return torch.stack([text[s : s + length + 1] for s in starts.tolist()])


class Side(Protocol):
    """How the batch of a step becomes gradients."""

    model: CausalLM

    def loss(self, batch: Tensor, balance: float) -> tuple[Tensor, Tensor]:
        """(what this process minimises, the cross-entropy in nats of the batch [B, T + 1])."""

    def finish(self) -> None:
        """After the backward: the gradients of the whole batch, clipped."""

    def whole(self) -> CausalLM:
        """The dense model."""


class Alone:
    """One process."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model

    def loss(self, batch: Tensor, balance: float) -> tuple[Tensor, Tensor]:
        logits, router = self.model(batch[:, :-1], return_router_logits=True)
        entropy = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        k = self.model.config.num_experts_per_tok
        uneven = sum(load_balancing_loss(r, moe_route(r.detach(), k)[1]) for r in router)
        return entropy + balance * uneven, entropy

    def finish(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)

    def whole(self) -> CausalLM:
        return self.model


class Across:
    """Many processes, with the same batch on each. A rank's loss is its share of the whole, gradients are sums over the ranks: the
    curve is that of one process, to rounding.
    """

    def __init__(self, model: CausalLM, world: World) -> None:
        self.model, self.world = parallelize(model, world), world
        inside = tuple(f"{name}." for name, _ in experts_of(model))
        parameters = dict(model.named_parameters())
        # The experts sum their gradients, those of their gate too.
        self._to_sum = [p for n, p in parameters.items() if not n.startswith(inside)]
        self._split = [p for n, p in parameters.items() if n.startswith(inside) and ".gate." not in n]
        self._shared = [p for n, p in parameters.items() if not n.startswith(inside) or ".gate." in n]

    def loss(self, batch: Tensor, balance: float) -> tuple[Tensor, Tensor]:
        """Replica d takes an even share of the rows of the batch, each of its ranks an even share of their tokens."""
        B, T = batch.shape[0], batch.shape[1] - 1
        first, stop = even_cuts(B, self.world.dp)[self.world.replica :][:2]
        rows = batch[first:stop]
        cuts = tuple(even_cuts(len(rows) * T, self.world.sizes.cp))
        cu_seqlens = tuple(range(0, len(rows) * T + 1, T))
        context = ContextParallel(cu_seqlens, cuts, self.world.cp)
        own = slice(*context.own)
        ids = rows[:, :-1].reshape(1, -1)[:, own]
        logits, router = self.model(ids, context=context, return_router_logits=True)
        entropy = F.cross_entropy(logits[0], rows[:, 1:].reshape(-1)[own], reduction="sum") / (B * T)
        k = self.model.config.num_experts_per_tok
        uneven = sum(load_balancing_share(r, moe_route(r.detach(), k)[1]) for r in router)
        return entropy + balance * uneven, all_reduce(entropy.detach())

    @torch.no_grad()
    def finish(self) -> None:
        for _, experts in experts_of(self.model):
            experts.reduce_gradients()
        grads = _gradients(self._to_sum)
        flat = all_reduce(torch.cat([g.flatten() for g in grads]))
        for g, total in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            g.copy_(total.view_as(g))
        # The same bits on all ranks, as the parameters that they share must stay the same. Experts count once for each of EDP.
        split, shared = (_squares(_gradients(ps)) for ps in (self._split, self._shared))
        norm = (shared + all_reduce(split) / self.world.edp).sqrt().to(flat.dtype)
        nn.utils.clip_grads_with_norm_(self.model.parameters(), MAX_NORM, norm)

    def whole(self) -> CausalLM:
        return gather(self.model)


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of all squares, in float64."""
    return torch.stack([t.double().square().sum() for t in tensors]).sum()


@dataclass
class Run:
    """A training run after some of its steps: what a training checkpoint holds."""

    side: Side
    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # of the windows
    curve: list[float] = field(default_factory=list)  # bits per byte of each step

    @property
    def model(self) -> CausalLM:
        return self.side.model


def start(config: TextConfig, recipe: Recipe, world: World | None = None) -> Run:
    """A run before its first step; the same numbers in one process and on every rank of many."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = CausalLM(config)
    side: Side = Alone(model) if world is None else Across(model, world)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.95), fused=True)
    return Run(side, optimizer, generator)


def step(run: Run, recipe: Recipe, text: Tensor) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = recipe.rate(len(run.curve))
    total, entropy = run.side.loss(random_windows(text, recipe, run.generator), recipe.balance)
    run.optimizer.zero_grad()
    total.backward()
    run.side.finish()
    run.optimizer.step()
    run.curve.append(entropy.item() / math.log(2))


def train(
    run: Run, recipe: Recipe, text: Tensor, progress: Progress, after: Callable[[Run], None] | None = None
) -> None:
    """The steps that are left, with `after` called after each."""
    task = progress.add_task("training", total=recipe.steps, completed=len(run.curve), bits="")
    while len(run.curve) < recipe.steps:
        step(run, recipe, text)
        if after is not None:
            after(run)
        recent = run.curve[-20:]
        progress.update(task, advance=1, bits=f"{sum(recent) / len(recent):.3f} bits/byte")
