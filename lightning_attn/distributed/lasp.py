"""LASP+: lightning attention of one sequence over many ranks, with packed documents (arXiv 2501.08313, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import ops, validation
from ..autocast import autocast
from ..dispatch import accumulation_dtype
from ..ops.once import once_differentiable
from ..ops.registry import kernels_of
from .comm import Ranks, call
from .lasp_plan import Fragment, Shard
from .lasp_plan import shard as plan_of


@torch.compiler.disable
def lasp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    cu_seqlens: Tensor | None,
    cuts: Sequence[int],
    group: ProcessGroup | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`lightning_attention` of a packed sequence that lies on the ranks of a group, each of which calls this with its part.

        S_t = e^{-s} S_{t-1} + k_t v_t^T        o_t = scale * S_t^T q_t        within each document

    One all-gather of a state per rank while the rank's own tokens are computed (float16 waits for it), and one in the backward: each rank receives
    (R - 1) H K V elements of the states' dtype, however many tokens there are. Differentiable once in q, k, v and initial_state, through o and the
    state; nothing but the inputs and the state that enters the rank is kept for the backward. Then every rank must
    call the backward, so the output of a rank without tokens takes part in the loss too (`o.sum()`). A document's result
    does not depend on the contents of any other.

    Args:
        q, k: [1, L, H, K], the tokens from cuts[r] to cuts[r + 1] of the sequence on rank r; dtypes, strides and backends as for
            `lightning_attention`.
        v: [1, L, H, V].
        decay: [H] float32, finite and >= 0, equal on all ranks.
        cu_seqlens: [N + 1] int32 or int64: the offsets of the N documents in the whole sequence, from 0 to its length, equal on all
            ranks; None is one document. Its values are read: on a CPU, whatever device q is on, nothing waits for that.
        cuts: R + 1 ints from 0 to the length of the sequence, not decreasing, equal on all ranks. Any: they need not divide, nor
            fall on documents; a rank may have no tokens.
        group: the ranks; None is the default group.
        scale: a finite number.
        initial_state: [N, H, K, V] float32 (float64 with float64 inputs), of all documents. Rank r reads the rows of those
            that start on it, and its gradient has these rows, the others zero: a sum over the ranks is the whole.
        return_state: also return the states.

    Returns:
        o [1, L, H, V] in v's dtype (where a document enters the rank it is rounded twice in 16 bits); with return_state, (o, state) with state [N, H, K, V], where the state of a document is on
        the rank that has its last token, and zero elsewhere: a sum over the ranks is the whole.

    Raises:
        TypeError, ValueError: as `lightning_attention`; cuts or cu_seqlens that are none. The other ranks raise RankError.
        RankError: a rank called with other arguments, raised, was killed or did not come in the group's timeout.
    """
    with call("lasp", group) as ranks:
        validation.types("lasp", backend, q=q, k=k, v=v, decay=decay)
        q, k, v = autocast(q, k, v)
        documents = validation.lasp(
            q, k, v, decay, cu_seqlens, cuts, scale, initial_state, ranks.rank, ranks.size
        )
        kernels_of(backend, "attention_forward", q, accumulation_dtype(q.dtype), v.shape[3])  # or it raises
        tensors = (q, k, v) if initial_state is None else (q, k, v, initial_state)
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        facts = {
            "cuts": list(cuts),
            "cu_seqlens": list(documents),
            "dtype": q.dtype,
            "heads": q.shape[2],
            "head dims [K, V]": [q.shape[3], v.shape[3]],
            "scale": float(scale),
            "need of gradients": differentiable,
        }
        if decay.is_cpu:
            facts["decay"] = decay.tolist()
        ranks.agree(facts, q.device)
    plan = plan_of(documents, tuple(cuts), ranks.rank)
    task = _Task(ranks, plan, len(documents) - 1, float(scale), return_state, backend)
    if differentiable:
        o, state = _Lasp.apply(q, k, v, decay, initial_state, task)
    else:
        o, state, _ = _forward(q, k, v, decay, initial_state, task)
    return (o, state) if return_state else o


@dataclass(frozen=True)
class _Task:
    """What is not a tensor."""

    ranks: Ranks
    plan: Shard
    documents: int
    scale: float
    return_state: bool
    backend: str


class _Lasp(torch.autograd.Function):
    """Saves its inputs and the state that enters the rank."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, task: _Task
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        o, state, entering = _forward(q, k, v, decay, initial_state, task)
        ctx.save_for_backward(q, k, v, decay, initial_state, entering)
        ctx.task = task
        return o, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, decay, initial_state, entering = ctx.saved_tensors
        if not ctx.task.return_state:
            dstate = None
        do = v.new_zeros(v.shape) if do is None else do
        dq, dk, dv, dinitial = _backward(do, dstate, q, k, v, decay, initial_state, entering, ctx.task)
        return dq, dk, dv, None, dinitial, None


def _forward(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor | None, task: _Task
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(o, state or an empty stand-in, the state [H, K, V] that enters or None)."""
    plan, fragments = task.plan, task.plan.fragments
    like = q.new_empty(0, dtype=accumulation_dtype(q.dtype))
    size = q.shape[2], q.shape[3], v.shape[3]
    if plan.leaving:
        last = fragments[-1]
        initial = initial_state[last.document, None] if initial_state is not None and last.starts else None
        tokens = slice(last.begin, last.end)
        left = ops.attention_state(k[:, tokens], v[:, tokens], decay, 1.0, initial, False, task.backend)[0]
    else:
        left = like.new_zeros(size)
    gathered = task.ranks.all_gather(left)

    entering = _fold(gathered.wait(), plan.entering, decay) if _waits(q) else None
    initial = _initial(initial_state, entering, fragments, like, size)
    o, states = ops.attention_forward(
        q, k, v, decay, task.scale, initial, _offsets(plan, q), task.return_state, task.backend
    )

    added = None if _waits(q) else _fold(gathered.wait(), plan.entering, decay)
    entering = entering if added is None else added
    if added is not None:
        tokens = slice(0, fragments[0].end)
        _add_history(q[:, tokens], added, decay, task.scale, False, o[:, tokens], task)
    if not task.return_state:
        return o, like, entering
    state = like.new_zeros(task.documents, *size)
    for fragment, row in zip(fragments, states, strict=True):
        if fragment.ends:
            state[fragment.document] = row
            if not fragment.starts and added is not None:
                state[fragment.document] += _decayed(added, decay, fragment.end)
    return o, state, entering


def _backward(
    do: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    entering: Tensor | None,
    task: _Task,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    plan, fragments = task.plan, task.plan.fragments
    ranks = task.ranks.backward({}, q.device)
    like = q.new_empty(0, dtype=accumulation_dtype(q.dtype))
    size = q.shape[2], q.shape[3], v.shape[3]
    if plan.entering:
        first = fragments[0]
        seed = dstate[first.document, None] if dstate is not None and first.ends else None
        tokens = slice(first.begin, first.end)
        back = ops.attention_state(q[:, tokens], do[:, tokens], decay, task.scale, seed, True, task.backend)[
            0
        ]
    else:
        back = like.new_zeros(size)
    gathered = ranks.all_gather(back)

    initial = _initial(initial_state, entering, fragments, like, size)
    leaving = _fold(gathered.wait(), plan.leaving, decay) if _waits(q) else None
    dstates = None
    if dstate is not None or leaving is not None:
        seeds = [dstate[f.document] if f.ends and dstate is not None else None for f in fragments]
        if leaving is not None:
            seeds[-1] = leaving
        dstates = _stacked(seeds, like, size)
    dq, dk, dv, dinitials = ops.attention_backward(
        do, dstates, q, k, v, decay, task.scale, initial, _offsets(plan, q), task.backend
    )

    added = None if _waits(q) else _fold(gathered.wait(), plan.leaving, decay)
    if added is not None:
        tokens = slice(fragments[-1].begin, fragments[-1].end)
        _add_history(k[:, tokens], added, decay, 1.0, True, dv[:, tokens], task)
        _add_history(v[:, tokens], added.mT, decay, 1.0, True, dk[:, tokens], task)
    if initial_state is None:
        return dq, dk, dv, None
    dinitial = torch.zeros_like(initial_state, memory_format=torch.contiguous_format)
    for fragment, row in zip(fragments, dinitials, strict=True):
        if fragment.starts:
            dinitial[fragment.document] = row
            if not fragment.ends and added is not None:
                dinitial[fragment.document] += _decayed(added, decay, fragment.end - fragment.begin)
    return dq, dk, dv, dinitial


def _initial(
    initial_state: Tensor | None,
    entering: Tensor | None,
    fragments: Sequence[Fragment],
    like: Tensor,
    size: Sequence[int],
) -> Tensor | None:
    """The states [fragments, H, K, V] before the fragments, as far as this rank knows them; None: all zero."""
    if initial_state is None and entering is None:
        return None
    known: list[Tensor | None] = []
    for fragment in fragments:
        if fragment.starts:
            known.append(None if initial_state is None else initial_state[fragment.document])
        else:
            known.append(entering)
    return _stacked(known, like, size)


def _stacked(states: Sequence[Tensor | None], like: Tensor, size: Sequence[int]) -> Tensor:
    """[fragments, H, K, V]; None is zero."""
    rows = [like.new_zeros(size) if state is None else state for state in states]
    return torch.stack(rows) if rows else like.new_zeros(0, *size)


def _waits(x: Tensor) -> bool:
    """Whether the kernels wait for the states of the other ranks. A rank's own part of a result may be beyond float16 where the
    whole is not.
    """
    return x.dtype == torch.float16


def _add_history(
    x: Tensor, state: Tensor, decay: Tensor, scale: float, reverse: bool, out: Tensor, task: _Task
) -> None:
    """What a state [H, K, V] adds to the tokens of `out` [1, L, H, V] after it; `reverse`: its gradient to those before."""
    ops.attention_history(x, state[None], decay, scale, reverse, out, task.backend)


def _fold(states: Tensor, terms: Sequence[tuple[int, int]], decay: Tensor) -> Tensor | None:
    """The sum over (rank, distance) of lambda^distance times the state [H, K, V] of the rank."""
    total = None
    for rank, distance in terms:
        term = _decayed(states[rank], decay, distance)
        total = term if total is None else total + term
    return total


def _decayed(state: Tensor, decay: Tensor, distance: int) -> Tensor:
    return state * torch.exp(-decay.double() * distance).to(state.dtype)[:, None, None]


def _offsets(plan: Shard, q: Tensor) -> Tensor:
    return torch.tensor(plan.offsets, dtype=torch.int32, pin_memory=q.is_cuda).to(q.device, non_blocking=True)
