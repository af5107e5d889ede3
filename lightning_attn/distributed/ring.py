"""Softmax attention over sequences that lie in pieces on the ranks of a group (ring attention, context parallelism)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..autocast import autocast
from ..dispatch import accumulation_dtype
from ..ops.once import once_differentiable
from ..validation import ring as validation
from . import ring_plan
from .comm import Ranks, call
from .ring_exchange import pieces, returns
from .ring_plan import Layout, Plan, Ranges, length, offset
from .softmax import attend, attend_backward


@torch.compiler.disable
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None,
    cuts: Sequence[int],
    group: ProcessGroup | None = None,
    scale: float | None = None,
    zigzag: bool = False,
    method: str = "ring",
) -> Tensor:
    """Causal softmax attention over packed documents whose tokens lie on the ranks of a group.

        o_t = sum_{s <= t, same document} softmax_s(scale * q_t . k_s) v_s

    As ring attention (arXiv 2310.01889), with documents of any length, as in the varlen ring attention of MiniMax-01 (arXiv
    2501.08313, section 2.2): a rank computes, and is sent, only what its queries see. A document's result does not depend on
    the others by one bit. Every rank calls it, with equal arguments but for q, k and v.

    Args:
        q: [1, L, H, D], float32, bfloat16, float16 or float64: the tokens of this rank.
        k: [1, L, G, D], of q's dtype; query head h reads head h // (H // G).
        v: [1, L, G, D_v], of q's dtype.
        cu_seqlens: [N + 1] int32 or int64: where the documents begin and end in the whole sequence of T tokens, from 0 to T and
            not decreasing (equal offsets: an empty document). It is read on the host: on a CPU it costs no wait for
            a device. None: one document.
        cuts: positions in the whole sequence, from 0 to T and not decreasing, on document starts or not. R + 1 of them: rank r
            holds [cuts[r], cuts[r + 1]). With zigzag 2R + 1: rank r holds piece r and, behind it, piece 2R - 1 - r, so
            that all ranks have as much to do where documents are long. Pieces may be empty.
        group: None is the default group.
        scale: a finite number; None is D^-0.5.
        method: "ring": keys and values go from rank to rank, as far as they are needed, while the ones before are at work, and
            a rank holds two pieces at a time. "all_gather": all that a rank needs comes in one exchange, while it is at
            work on its own.

    Returns:
        o [1, L, H, D_v] of q's dtype: the sums in float32 (float64 for float64), rounded once.

    Differentiable once in q, k and v; nothing is kept but these, o and a number per token and head. The backward is a call
    of all ranks too: the output of every rank, an empty one included, must take part in its loss. On a CPU equal calls
    give equal bits; on a GPU so does the forward, and the backward under torch.use_deterministic_algorithms.
    Under autocast q, k and v are cast to its dtype (float64 is left alone).

    Raises:
        TypeError, ValueError: an argument of a wrong type, dtype, shape, device or value, before anything is sent.
        RankError: a rank was called with other arguments, raised, or does not come.
    """
    with call("ring_attention", group) as ranks:
        validation.ring_types(ranks.function, q, k, v)
        cuts = validation.ring_cuts(ranks.function, cuts, zigzag, ranks.size)
        offsets = validation.ring_documents(ranks.function, cu_seqlens, cuts[-1], q)
        validation.ring_end(ranks.function, "cuts", cuts[-1], offsets[-1], exact=True)
        layout = ring_plan.zigzag(cuts) if zigzag else ring_plan.contiguous(cuts)
        facts: dict[str, object] = {"zigzag": zigzag, "cuts": cuts}
        job, q, k, v = _prepare(ranks, q, k, v, offsets, layout, layout, scale, method, facts)
    return _run(job, q, k, v)


@torch.compiler.disable
def ring_attention_layout(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None,
    queries: Sequence[Sequence[tuple[int, int]]],
    keys: Sequence[Sequence[tuple[int, int]]],
    group: ProcessGroup | None = None,
    scale: float | None = None,
    method: str = "ring",
) -> Tensor:
    """`ring_attention` for queries and keys that lie differently, as in chunked prefill with a KV cache on several ranks: the
    queries are one chunk, the keys those of all chunks so far.

    Args:
        q: [1, L, H, D]: the queries of this rank.
        k, v: [1, M, G, D] and [1, M, G, D_v]: its keys and values.
        queries, keys: for every rank the (begin, end) of the positions that it holds, in the order in which they lie in q,
            or in k and v: ascending, within [0, T], and no position on two ranks. A key that nobody holds does not exist. A
            query that sees none has the output zero.
        cu_seqlens, group, scale, method: as for `ring_attention`. Without cu_seqlens T is where the last of them ends.

    Returns, raises: as `ring_attention`.
    """
    with call("ring_attention_layout", group) as ranks:
        validation.ring_types(ranks.function, q, k, v)
        layouts: list[Layout] = []
        for name, layout in (("queries", queries), ("keys", keys)):
            checked = validation.ring_layout(ranks.function, name, layout, ranks.size)
            layouts.append(tuple(ring_plan.union(ranges) for ranges in checked))
        ends = [max((ranges[-1][1] for ranges in layout if ranges), default=0) for layout in layouts]
        offsets = validation.ring_documents(ranks.function, cu_seqlens, max(ends), q)
        for name, end in zip(("queries", "keys"), ends, strict=True):
            validation.ring_end(ranks.function, name, end, offsets[-1], exact=False)
        facts: dict[str, object] = {"queries": layouts[0], "keys": layouts[1]}
        job, q, k, v = _prepare(ranks, q, k, v, offsets, layouts[0], layouts[1], scale, method, facts)
    return _run(job, q, k, v)


@dataclass(frozen=True)
class _Job:
    """One call, as the rank sees it."""

    ranks: Ranks
    plan: Plan
    scale: float
    method: str
    facts: dict[str, object]  # that the ranks have agreed on


def _prepare(
    ranks: Ranks, q: Tensor, k: Tensor, v: Tensor, offsets: tuple[int, ...], queries: Layout, keys: Layout,
    scale: float | None, method: str, facts: dict[str, object],
) -> tuple[_Job, Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = autocast(q, k, v)
    validation.ring_tensors(ranks.function, q, k, v, scale, method)
    validation.ring_rows(ranks.function, "q", q, ranks.rank, length(queries[ranks.rank]))
    validation.ring_rows(ranks.function, "k", k, ranks.rank, length(keys[ranks.rank]))
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    facts = {
        **facts,
        "cu_seqlens": offsets,
        "dtype": q.dtype,
        "[H, G, D, D_v]": [q.shape[2], *k.shape[2:], v.shape[3]],
        "scale": scale,
        "method": method,
        "need of gradients": torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
    }
    ranks.agree(facts, q.device)
    return _Job(ranks, ring_plan.plan(queries, keys, offsets), scale, method, facts), q, k, v


def _run(job: _Job, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if job.facts["need of gradients"]:
        return _RingAttention.apply(job, q, k, v)
    return _forward(job, q[0], k[0], v[0])[0]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = _forward(job, q[0], k[0], v[0])
        ctx.job = job
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        job = ctx.job
        q, k, v, o, lse = ctx.saved_tensors
        ranks = job.ranks.backward(job.facts, q.device)
        grads = _backward(
            _Job(ranks, job.plan, job.scale, job.method, job.facts),
            do[0].contiguous(), q[0], k[0], v[0], o[0], lse,
        )  # fmt: skip
        return None, *(grad.to(x.dtype)[None] for grad, x in zip(grads, (q, k, v), strict=True))


def _forward(job: _Job, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [L, H, D], k [M, G, D], v [M, G, D_v] -> o [1, L, H, D_v], lse [L, H] in the dtype of accumulation."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    dtype = accumulation_dtype(q.dtype)
    whole = q.new_zeros(
        1, *q.shape[:2], v.shape[2], dtype=dtype
    )  # not a view, which could not be changed in place
    o = whole[0]
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=dtype)
    for piece in pieces(job.method, job.ranks, job.plan, k, v):
        for block, queries, keys in _blocks(job, piece.owner, piece.rows):
            attend(
                o[queries], lse[queries], q[queries], piece.k[keys], piece.v[keys],
                block.causal, job.scale, block.times,
            )  # fmt: skip
    return whole.to(q.dtype), lse


def _backward(
    job: _Job, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in the dtype of accumulation."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    dtype = accumulation_dtype(q.dtype)
    dq = q.new_zeros(q.shape, dtype=dtype)
    like = (x.new_empty(0, *x.shape[1:], dtype=dtype) for x in (k, v))
    home = returns(job.method, job.ranks, job.plan, *like)
    for step, piece in enumerate(pieces(job.method, job.ranks, job.plan, k, v)):
        made = home.begin(step, piece.owner)
        for block, queries, keys in _blocks(job, piece.owner, piece.rows):
            at = offset(made.rows, block.k)
            there = slice(at, at + keys.stop - keys.start)
            attend_backward(
                dq[queries], made.k[there], made.v[there], do[queries], q[queries], piece.k[keys], piece.v[keys],
                o[queries], lse[queries], block.causal, job.scale, block.times,
            )  # fmt: skip
        home.end()
    own = home.finish()
    return dq, own.k, own.v


def _blocks(job: _Job, owner: int, rows: Ranges) -> Iterator[tuple[ring_plan.Block, slice, slice]]:
    """The blocks of a piece, with where their queries stand, and their keys among the `rows` of the owner."""
    for block in job.plan.blocks(job.ranks.rank, owner):
        at = offset(rows, block.k)
        yield block, slice(block.q, block.q + block.times * block.n), slice(at, at + block.times * block.m)
