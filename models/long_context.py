"""A prompt of millions of tokens in bounded memory. `python -m models.long_context --help`."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_attn import LightningAttention

from . import checkpoint
from .cache import Cache
from .generate import prefill
from .softmax import SoftmaxAttention
from .text import CausalLM
from .train_tiny import CONFIG, read_bytes


@dataclass
class Witness:
    """A lightning layer's states for some heads by the recurrence in float64, from the same keys and values.

    S <- e^{-s n} S + sum_j e^{-s (n - 1 - j)} k_j v_j^T        for n tokens at a time
    """

    layer: LightningAttention
    heads: tuple[int, ...]
    block: int = 256

    def __post_init__(self) -> None:
        D = self.layer.head_dim
        self.rate = self.layer.decay[list(self.heads)].double()  # [h]
        self.state = torch.zeros(len(self.heads), D, D, dtype=torch.float64)  # [h, D, D]
        self.layer.qkv_proj.register_forward_hook(self._take)

    @torch.no_grad()
    def _take(self, module: nn.Module, inputs: tuple[Tensor, ...], qkv: Tensor) -> None:
        D = self.layer.head_dim
        _, k, v = (
            F.silu(qkv)[0].view(-1, self.layer.num_heads, 3 * D)[:, list(self.heads)].double().split(D, -1)
        )
        for k_block, v_block in zip(k.split(self.block), v.split(self.block), strict=True):
            n = len(k_block)
            age = torch.arange(n - 1, -1, -1, dtype=torch.float64)[:, None]  # [n, 1]
            weighed = k_block * torch.exp(-self.rate * age)[..., None]  # [n, h, D]
            self.state *= torch.exp(-self.rate * n)[:, None, None]
            self.state += torch.einsum("nhk,nhv->hkv", weighed, v_block)

    def error(self, state: Tensor) -> list[float]:
        """Of the state [H, D, D], for each head: the largest difference over the largest value."""
        ours = state[list(self.heads)].double()
        difference, scale = (x.abs().amax((1, 2)) for x in (ours - self.state, self.state))
        return (difference / scale).tolist()


def with_window(model: CausalLM, window: int) -> CausalLM:
    """The model with its softmax layers confined to a sliding window, in place."""
    model.config = model.model.config = replace(model.config, sliding_window=window)
    for module in model.modules():
        if isinstance(module, SoftmaxAttention):
            module.window = window
    return model


def chunks(tokens: int, chunk: int) -> Iterator[Tensor]:
    """The standard library's bytes, over and over: [1, chunk] at a time, never the whole prompt."""
    text, _ = read_bytes(None)
    for start in range(0, tokens, chunk):
        places = torch.arange(start, min(start + chunk, tokens)) % len(text)
        yield text[places].long()[None]


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(model: CausalLM, tokens: int, chunk: int, every: int) -> Cache:
    """Streams the prompt and reports along the way."""
    cache = model.new_cache(1, rollback=False)
    click.echo(f"{'tokens':>10} {'tokens/s':>10} {'cache MB':>10} {'peak MB':>10}")
    start = last = time.perf_counter()
    done = reported = 0
    for ids in chunks(tokens, chunk):
        prefill(model, cache, ids, chunk=chunk)
        done += ids.shape[1]
        if done - reported >= every or done == tokens:
            now = time.perf_counter()
            rate = (done - reported) / (now - last)
            click.echo(f"{done:>10} {rate:>10.0f} {cache.nbytes / 1e6:>10.2f} {peak_megabytes():>10.0f}")
            last, reported = now, done
    click.echo(f"{done / (time.perf_counter() - start):.0f} tokens per second in all")
    return cache


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--tokens", type=click.IntRange(1), default=1 << 20, show_default=True, help="Of the prompt.")
@click.option("--chunk", type=click.IntRange(1), default=8192, show_default=True, help="Tokens at a time.")
@click.option(
    "--window", type=click.IntRange(1), default=1024, show_default=True, help="Of the softmax layers."
)
@click.option(
    "--checkpoint", "path", type=click.Path(path_type=Path), help="Directory that train_tiny wrote."
)
def main(tokens: int, chunk: int, window: int, path: Path | None) -> None:
    """Streams a long prompt through the tiny hybrid, and checks its lightning states against float64.

    Lightning layers see the whole prompt. Softmax layers see a sliding window, so that their memory is bounded too. Without
    --checkpoint the weights are random.
    """
    torch.manual_seed(0)
    try:
        given = CausalLM(CONFIG) if path is None else checkpoint.load(path)
    except (TypeError, ValueError, OSError) as wrong:
        raise click.BadParameter(str(wrong), param_hint="--checkpoint") from None
    if not isinstance(given, CausalLM):
        raise click.BadParameter(
            f"expected a language model, got {type(given).__name__}", param_hint="--checkpoint"
        )
    model = with_window(given, window).eval()
    layers = [m for m in model.modules() if isinstance(m, LightningAttention)]
    sampled = (layers[0], layers[len(layers) // 2], layers[-1])
    witnesses = [
        Witness(layer, (0, layer.num_heads - 1)) for layer in sampled
    ]  # the fastest decay and the slowest
    click.echo(
        f"{len(layers)} lightning layers over the whole prompt, softmax layers over windows of {window} tokens"
    )
    cache = run(model, tokens, chunk, every=max(tokens // 16, 1))
    worst = 0.0
    for witness in witnesses:
        errors = witness.error(cache.states[witness.layer.layer_idx][0])
        worst = max(worst, *errors)
        for head, error in zip(witness.heads, errors, strict=True):
            click.echo(f"layer {witness.layer.layer_idx}, head {head}: state within {error:.1e} of float64")
    if not worst < 1e-5:
        raise click.ClickException(f"expected states within 1e-5 of the float64 recurrence, got {worst:.1e}")


if __name__ == "__main__":
    main()
