"""Chunked prefill of prompts whose tokens lie on the ranks of a group, and what the ranks then hold of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_attn.distributed import all_reduce, even_cuts

from .cache import Cache
from .config import TextConfig
from .context import ContextParallel
from .parallel import experts_of
from .text import CausalLM


class ShardedCache:
    """Of N packed documents that are fed chunk by chunk. A document's lightning states are on the rank that had its last token,
    its keys and values on the ranks of its tokens: no rank holds the whole, until `collect`.

    chunks: the cuts of each chunk that will come, R + 1 positions of the packed sequence.
    """

    def __init__(
        self,
        config: TextConfig,
        cu_seqlens: tuple[int, ...],
        chunks: Sequence[tuple[int, ...]],
        group: dist.ProcessGroup,
    ) -> None:
        self.config, self.cu_seqlens, self.chunks, self.group = config, cu_seqlens, list(chunks), group
        self.fed = 0  # chunks
        self.states: dict[int, Tensor] = {}  # by layer, [N, H, D, D]; zero where another rank has it
        self.carried: dict[
            int, Tensor
        ] = {}  # by layer, [H, D, D] on every rank: of the document that goes on
        self.rows: dict[int, Tensor] = {}  # by layer, [tokens of this rank, 2, G, D]: keys and values

    def layout(self, chunks: int) -> list[list[tuple[int, int]]]:
        """The positions that each rank has of the first chunks."""
        ranks = range(dist.get_world_size(self.group))
        return [[(c[r], c[r + 1]) for c in self.chunks[:chunks] if c[r] < c[r + 1]] for r in ranks]

    def held(self, chunks: int) -> int:
        """How many tokens this rank has of the first chunks."""
        return sum(end - begin for begin, end in self.layout(chunks)[dist.get_rank(self.group)])

    def entering(self, layer: int, context: ContextParallel, like: Tensor) -> Tensor:
        """The states [n, H, D, D] before the chunk of the documents in it."""
        H, D = self.config.num_attention_heads, self.config.head_dim
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        N = len(self.cu_seqlens) - 1
        if layer not in self.states:
            self.states[layer] = torch.zeros(N, H, D, D, dtype=dtype, device=like.device)
        held = context.documents
        initial = torch.zeros(len(held), H, D, D, dtype=dtype, device=like.device)
        if held and self.cu_seqlens[held.start] < context.cuts[0]:
            initial[0] = self.carried[layer]
        return initial

    def leave(self, layer: int, context: ContextParallel, states: Tensor) -> None:
        """Takes the states [n, H, D, D] after the chunk; that of a document that goes on is told to all ranks."""
        for n, state in zip(context.documents, states, strict=True):
            if self.cu_seqlens[n + 1] <= context.cuts[-1]:
                self.states[layer][n] = state
            else:
                self.carried[layer] = all_reduce(state, self.group)

    def keys_and_values(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Takes those of this rank's tokens of the chunk, [1, L, G, D] -> all so far, [1, M, G, D]."""
        if layer not in self.rows:
            self.rows[layer] = k.new_zeros(self.held(len(self.chunks)), 2, *k.shape[2:])
        rows, begin, end = self.rows[layer], self.held(self.fed), self.held(self.fed + 1)
        rows[begin:end, 0], rows[begin:end, 1] = k[0], v[0]
        return rows[None, :end, 0], rows[None, :end, 1]

    def collect(self) -> Cache:
        """Everything on every rank, as `models.generate` takes it, without rollback: what a decode step needs. Collective."""
        N = len(self.cu_seqlens) - 1
        cache = Cache(self.config, N, rollback=False)
        lengths = [end - begin for begin, end in pairwise(self.cu_seqlens)]
        cache.stored = lengths
        for layer, states in self.states.items():
            cache.states[layer] = all_reduce(states, self.group)
        mine = self.layout(self.fed)[dist.get_rank(self.group)]
        for layer, rows in self.rows.items():
            whole = rows.new_zeros(self.cu_seqlens[-1], *rows.shape[1:])
            place = torch.cat([torch.arange(*pair) for pair in mine] or [torch.empty(0, dtype=torch.int64)])
            whole[place.to(rows.device)] = rows
            whole = all_reduce(whole, self.group)
            buffer = rows.new_zeros(N, max(lengths, default=0), *rows.shape[1:])
            for row, (begin, end) in zip(buffer, pairwise(self.cu_seqlens), strict=True):
                row[: end - begin] = whole[begin:end]
            cache.softmax[layer].buffer = buffer
        return cache


@torch.no_grad()
def prefill(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    group: dist.ProcessGroup,
    *,
    chunk: int = 65536,
    method: str = "ring",
    backend: str = "auto",
) -> tuple[Tensor, ShardedCache]:
    """Feeds prompts to a model, packed one after the other, `chunk` tokens of all ranks at a time. Every rank of the group calls it
    with the same prompts. With parallel experts every rank of their mesh calls it too; a group whose prompts are shorter
    than another's feeds empty chunks to the end.

    Args:
        model: as `models.parallel.parallelize` makes it, or a dense one, the same on every rank.
        prompts: N lists of token ids, none empty.
        group: the ranks that share each chunk evenly (context parallelism).
        chunk: tokens; what a rank needs beside the cache does not grow with the length of the prompts.
        method, backend: as for `ContextParallel` and `lightning_attn.lightning_attention`.

    Returns:
        (logits [N, vocab] after each prompt, the same on every rank; the cache).
    """
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"prefill: expected chunk an int >= 1, got {chunk!r}")
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("prefill: expected a token at least in each prompt, got an empty one")
    cu_seqlens = tuple(accumulate(map(len, prompts), initial=0))
    ids = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int64)[None]
    T, R = cu_seqlens[-1], dist.get_world_size(group)
    most = torch.tensor(-(-T // chunk), device=model.lm_head.weight.device)
    shared = any(True for _ in experts_of(model))  # with the whole world
    dist.all_reduce(most, dist.ReduceOp.MAX, group=None if shared else group)
    bounds = [(min(i * chunk, T), min((i + 1) * chunk, T)) for i in range(int(most))]
    chunks = [tuple(begin + cut for cut in even_cuts(end - begin, R)) for begin, end in bounds]
    cache = ShardedCache(model.config, cu_seqlens, chunks, group)
    hidden = model.lm_head.weight.new_zeros(len(prompts), model.config.hidden_size)
    for cuts in chunks:
        context = ContextParallel(cu_seqlens, cuts, group, method, cache)
        begin, end = context.own
        out, _ = model.model(ids[:, begin:end], context=context, backend=backend)
        cache.fed += 1
        for n, last in enumerate(cu_seqlens[1:]):
            if begin < last <= end:
                hidden[n] = out[0, last - 1 - begin]
    return model.lm_head(all_reduce(hidden, group)), cache
