"""Generation: chunked prefill, then a decode step a token. `python -m models.generate --help`."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from .beam import Beams, search
from .cache import Cache
from .sampling import GREEDY, Sampling
from .text import CausalLM

Prompts = Tensor | Sequence[Sequence[int]]


def pad(prompts: Sequence[Sequence[int]], *, side: str = "left", token: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as input_ids [B, T] int64 and attention_mask [B, T] bool. The side changes no result."""
    if side not in ("left", "right"):
        raise ValueError(f"pad: expected side 'left' or 'right', got {side!r}")
    T = max((len(p) for p in prompts), default=0)
    ids = torch.full((len(prompts), T), token)
    mask = torch.zeros(len(prompts), T, dtype=torch.bool)
    for row, real, prompt in zip(ids, mask, prompts, strict=True):
        part = slice(T - len(prompt), T) if side == "left" else slice(len(prompt))
        row[part], real[part] = torch.tensor(prompt, dtype=torch.int64), True
    return ids, mask


@torch.no_grad()
def prefill(
    model: CausalLM,
    cache: Cache,
    input_ids: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    chunk: int = 4096,
    on_chunk: Callable[[int], None] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Feeds prompts to the cache, `chunk` columns at a time, so memory beside the cache does not grow with their length.

    Args:
        input_ids: [B, T]; or inputs_embeds: [B, T, hidden].
        attention_mask: [B, T], nonzero for real tokens; each row has one at least.
        on_chunk: called with the number of columns that are done, for a progress bar.

    Returns:
        logits [B, vocab] after each row's last real token.
    """
    source = input_ids if inputs_embeds is None else inputs_embeds
    if source is None or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(
            f"prefill: expected input_ids or inputs_embeds, and chunk an int >= 1, got {chunk!r}"
        )
    B, T = source.shape[:2]
    empty = "prefill: expected a token at least in each prompt, got an empty one"
    if T == 0:
        raise ValueError(empty)
    last = torch.full((B,), T - 1)
    if attention_mask is not None:
        if attention_mask.shape != (B, T):
            raise ValueError(f"prefill: expected attention_mask {[B, T]}, got {list(attention_mask.shape)}")
        real = attention_mask.cpu() != 0
        last = torch.where(real.any(1), (torch.arange(T) * real).argmax(1), -1)
    if int(last.min()) < 0:
        raise ValueError(empty)
    hidden = None
    for start in range(0, T, chunk):
        columns = slice(start, start + chunk)
        out, _ = model.model(
            None if input_ids is None else input_ids[:, columns],
            inputs_embeds=None if inputs_embeds is None else inputs_embeds[:, columns],
            attention_mask=None if attention_mask is None else attention_mask[:, columns],
            cache=cache,
            backend=backend,
        )
        hidden = out.new_empty(B, out.shape[-1]) if hidden is None else hidden
        ends = ((last >= start) & (last < start + chunk)).nonzero()[:, 0]
        hidden[ends] = out[ends, last[ends] - start]
        if on_chunk is not None:
            on_chunk(min(start + chunk, T))
    assert hidden is not None
    return model.lm_head(hidden.to(model.lm_head.weight.device))


def generate(
    model: CausalLM,
    prompts: Prompts | None = None,
    *,
    max_new_tokens: int,
    method: Sampling | Beams = GREEDY,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    eos: Iterable[int] | None = None,
    cache: Cache | None = None,
    generator: torch.Generator | None = None,
    on_tokens: Callable[[list[int | None]], None] | None = None,
    chunk: int = 4096,
    on_chunk: Callable[[int], None] | None = None,
    backend: str = "auto",
) -> list[list[int]]:
    """Continues prompts.

    Args:
        prompts: lists of token ids of any lengths, or input_ids [B, T] with attention_mask [B, T], padded on either side;
            or inputs_embeds [B, T, hidden], of prompts with images.
        max_new_tokens: at most so many for each prompt.
        method: `Sampling`, greedy by default, or `Beams`.
        eos: what ends a continuation, which includes it; the config's eos_token_id without it.
        cache: of what came before, B rows. It takes all tokens but the last of each row that is returned; with Beams
            the prompts alone.
        generator: the random numbers of Sampling.
        on_tokens: called with the next token of each prompt as it comes, [B] ints, None for those that have ended; not
            with Beams.
        chunk, on_chunk: see `prefill`.
        backend: as for `lightning_attn.lightning_attention`.

    Returns:
        The new tokens of each prompt.

    Raises:
        TypeError, ValueError: an empty prompt, ids outside the vocabulary, arguments that contradict each other.
    """
    if not isinstance(model, CausalLM):
        hint = "of MiniMax-VL-01 take language_model, with inputs_embeds from embed"
        raise TypeError(f"generate: expected a CausalLM, got {type(model).__name__}: {hint}")
    if not isinstance(method, (Sampling, Beams)):
        raise TypeError(f"generate: expected method Sampling(...) or Beams(...), got {method!r}")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"generate: expected max_new_tokens an int >= 0, got {max_new_tokens!r}")
    ids, embeds, mask = _prompts(prompts, inputs_embeds, attention_mask)
    stop = {int(token) for token in (model.config.eos_token_ids if eos is None else eos)}
    B = len(cast(Tensor, ids if embeds is None else embeds))
    if max_new_tokens == 0 or B == 0:
        return [[] for _ in range(B)]
    used = model.new_cache(B, rollback=False) if cache is None else cache
    logits = prefill(
        model,
        used,
        ids,
        inputs_embeds=embeds,
        attention_mask=mask,
        chunk=chunk,
        on_chunk=on_chunk,
        backend=backend,
    )
    if isinstance(method, Beams):
        beams = copy.deepcopy(cache) if used is cache else used

        def follow(rows: Tensor, tokens: Tensor) -> Tensor:
            beams.select(rows)
            return advance(model, beams, tokens, backend=backend)

        return search(logits, follow, method, max_new_tokens=max_new_tokens, eos=stop)
    results: list[list[int]] = [[] for _ in range(B)]
    running = torch.ones(B, dtype=torch.bool)
    while True:
        tokens = method.choose(logits, generator).cpu()
        step = [t if on else None for t, on in zip(tokens.tolist(), running.tolist(), strict=True)]
        for result, token in zip(results, step, strict=True):
            result += [] if token is None else [token]
        if on_tokens is not None:
            on_tokens(step)
        running &= torch.tensor([t not in stop for t in tokens.tolist()])
        if max(map(len, results)) == max_new_tokens or not running.any():
            return results
        logits = advance(model, used, tokens, None if running.all() else running, backend)


@torch.no_grad()
def advance(
    model: CausalLM, cache: Cache, tokens: Tensor, running: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """A decode step: tokens [B] -> logits [B, vocab]; rows that are not running [B] bool keep their state."""
    mask = None if running is None else running[:, None]
    return model(tokens[:, None], attention_mask=mask, cache=cache, backend=backend)[:, -1]


def _prompts(
    prompts: Prompts | None, embeds: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(input_ids, inputs_embeds, attention_mask), one of the first two None."""
    if (prompts is None) == (embeds is None):
        raise ValueError("generate: expected prompts or inputs_embeds, got both or neither")
    if prompts is None or isinstance(prompts, Tensor):
        given = embeds if prompts is None else prompts
        if not isinstance(given, Tensor) or given.dim() != (3 if prompts is None else 2):
            raise ValueError(
                "generate: expected prompts [B, T] or inputs_embeds [B, T, hidden], got another shape"
            )
        return prompts, embeds, mask
    for prompt in prompts:
        if not isinstance(prompt, Sequence) or not all(type(token) is int for token in prompt):
            raise TypeError(f"generate: expected prompts as lists of token ids (int), got {prompt!r}")
    if mask is not None:
        raise ValueError("generate: expected attention_mask with a tensor of input_ids, got lists of tokens")
    ids, mask = pad(prompts)
    return ids, None, mask


if __name__ == "__main__":
    runpy.run_module("models.console", run_name="__main__")
