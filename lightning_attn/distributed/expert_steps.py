"""The steps of `ExpertParallel` between routing and result, group of tokens by group, forward and backward.

A group is a generator that pauses whenever it has started an exchange. `pipelined` lets the groups take turns, the youngest
first: so the exchange that a group started flies while the experts of an older one compute.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import ops
from ..backends import Expert, Routing
from ..dispatch import accumulation_dtype
from ..ops.once import once_differentiable
from ..ops.registry import kernels_of
from .all_reduce import in_order
from .comm import RankError, Ranks, call
from .expert_plan import Place, Plan, arrivals, plan, token_groups

Paused = Generator[None, None, Tensor]
LEAVES = ("x", "gate_up_proj", "down_proj", "weights")
_DONE = object()


class Lines:
    """The ranks of a mesh during one call, as the groups of those of its dimensions that this rank is in."""

    def __init__(self, lines: list[Ranks]) -> None:
        self.lines = lines

    def agree(
        self, facts: Mapping[str, object], device: torch.device, forward: Sequence[Ranks] | None = None
    ) -> None:
        """`Ranks.agree`, of a backward that of its `forward`, for all of them: along one dimension after the other. Who fails along
        one tells the next.
        """
        for i, ranks in enumerate(self.lines):
            number = {} if forward is None or device.type != "cpu" else {"forward": forward[i].number}
            try:
                ranks.agree({**facts, **number}, device)
            except RankError as error:
                for later in self.lines[i + 1 :]:
                    later.raised(error)
                raise


@contextmanager
def call_along(function: str, groups: Iterable[ProcessGroup]) -> Iterator[Lines]:
    """`comm.call` for several groups: no group of all these ranks is needed, which only the whole world could make."""
    with ExitStack() as stack:
        yield Lines([stack.enter_context(call(function, group)) for group in groups])


class Exchange(NamedTuple):
    """Who exchanges rows with whom. A dimension of one rank exchanges nothing and is None."""

    place: Place
    ep: Ranks | None
    etp: Ranks | None

    @property
    def lines(self) -> list[Ranks]:
        return [line for line in (self.ep, self.etp) if line is not None]

    def tables(self, counts: Tensor) -> Tensor:
        """counts [G, E] of this rank's pairs -> those of all ranks [G, EP, ETP, E], int32: the global router."""
        every = counts[None] if self.ep is None else self.ep.all_gather(counts).wait()
        every = every[None] if self.etp is None else self.etp.all_gather(every).wait()
        return every.permute(2, 1, 0, 3)  # [ETP, EP, G, E] so far

    def bring(self, rows: Tensor, plan: Plan) -> Paused:
        """Rows of this rank's pairs, by expert -> the rows that its experts compute."""
        if self.ep is not None:
            pending = self.ep.all_to_all(rows, plan.send, plan.receive)
            yield
            rows = pending.wait()
        if self.etp is not None:
            every = rows.new_empty(plan.rows, rows.shape[1])
            parts = list(every.split(plan.gathered))
            mine = parts[self.place.t].copy_(rows)
            others = [t for t in range(self.place.etp) if t != self.place.t]
            # Point to point, as an all-to-all would want a copy of the rows for each peer.
            pending = self.etp.pass_on([(t, mine) for t in others], [(t, parts[t]) for t in others])
            yield
            pending.wait()
            rows = every
        return rows

    def take_back(self, rows: Tensor, plan: Plan) -> Paused:
        """What the slices of the experts made of the rows that `bring` brought -> their sums, rows as `bring` took them."""
        D = rows.shape[1]
        if self.etp is not None:
            mine = plan.gathered[self.place.t]
            pending = self.etp.all_to_all(rows, plan.gathered, [mine] * self.place.etp)
            yield
            parts = pending.wait().view(self.place.etp, mine, D)
            rows = in_order(parts).to(rows.dtype)
        if self.ep is not None:
            pending = self.ep.all_to_all(rows, plan.receive, plan.send)
            yield
            rows = pending.wait()
        return rows


class Kept(NamedTuple):
    """What the backward of a token group wants: tensors only."""

    pair_order: Tensor  # [n * k] the pairs by expert
    pair_position: Tensor  # [n, k] where each stands there
    z: Tensor  # [n * k, D] what the experts made of each, or nothing if the router's weights need no gradient
    rows: Tensor  # [N, D] that the experts computed
    h: Tensor  # and what they keep for their backward: the pre-activation and the order of the rows
    order: Tensor
    position: Tensor
    offs: Tensor


def pipelined(groups: Iterable[Generator[None, None, object]]) -> None:
    """Runs the generators, the next of them starting whenever each of the others has gone on from one pause to the next."""
    waiting = iter(groups)
    running: list[Generator[None, None, object]] = []
    while True:
        running[:0] = [group for group in [next(waiting, None)] if group is not None]
        if not running:
            return
        running = [group for group in running if next(group, _DONE) is not _DONE]


def forward(
    x: Tensor,
    gate_up: Expert,
    down: Expert,
    weights: Tensor,
    experts: Tensor,
    exchange: Exchange,
    groups: int,
    backend: str,
    save: bool = False,
    save_z: bool = False,
) -> tuple[Tensor, list[Kept], list[Plan]]:
    """y [T, D], and with `save` what the backward wants of each token group."""
    place, E = exchange.place, down.weight.shape[0] * exchange.place.ep
    parts = token_groups(len(x), groups)
    pairs = [_sorted(experts[begin:end], weights, E, backend) for begin, end in parts]
    offs = torch.stack([pair.offs for pair in pairs])  # [G, E]
    tables = exchange.tables(offs.diff(dim=1, prepend=offs.new_zeros(groups, 1)))
    on_host = tables.cpu().long()
    plans = [plan(table, place) for table in on_host]
    y, kept = x.new_empty(x.shape), dict[int, Kept]()

    def group(i: int) -> Generator[None, None, None]:
        (begin, end), routing = parts[i], pairs[i]
        part, k = x[begin:end], experts.shape[1]
        rows = yield from exchange.bring(part.index_select(0, routing.order // k), plans[i])
        ids = arrivals(tables[i], place, len(rows))[:, None]
        one = weights.new_ones(ids.shape)
        z, *rest = ops.moe_mlp_forward(
            rows, gate_up.weight, gate_up.scale, down.weight, down.scale, one, ids, False, save, backend
        )
        z = yield from exchange.take_back(z, plans[i])
        y[begin:end] = _gather_sum(z, routing.position, weights[begin:end])
        if save:
            kept[i] = Kept(routing.order, routing.position, z if save_z else z.new_empty(0), rows, *rest)

    pipelined(group(i) for i in range(groups))
    return y, [kept[i] for i in sorted(kept)], plans


def backward(
    dy: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    exchange: Exchange,
    plans: list[Plan],
    kept: list[Kept],
    needs: tuple[bool, bool, bool, bool],
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, gate_up, down and weights that are needed, from the last token group to the first."""
    need_x, need_gate_up, need_down, need_weights = needs
    acc, k = accumulation_dtype(dy.dtype), weights.shape[1]
    dx = dy.new_empty(dy.shape) if need_x else None
    dweights = torch.empty_like(weights) if need_weights else None
    dgate_up, ddown = _Sum(gate_up), _Sum(down)

    def group(i: int, begin: int, end: int) -> Generator[None, None, None]:
        own = kept[i]
        rows = dy[begin:end].index_select(0, own.pair_order // k).to(acc)  # [n * k, D]
        if dweights is not None:
            each = (rows * own.z).sum(1)  # <dy_t, z> of each pair, by expert
            dweights[begin:end] = each[own.pair_position.long()]
        if need_x or need_gate_up or need_down:
            share = weights[begin:end].reshape(-1).index_select(0, own.pair_order)
            rows = (rows * share[:, None]).to(dy.dtype)
            dz = yield from exchange.bring(rows, plans[i])
            one = weights.new_ones(len(dz), 1)
            rows, *dw, _ = ops.moe_mlp_backward(
                dz, own.rows, gate_up, down, one, own.h, own.order, own.position, own.offs,
                False, need_x, need_gate_up, need_down, False, backend,
            )  # fmt: skip
            for total, term, need in zip((dgate_up, ddown), dw, (need_gate_up, need_down), strict=True):
                if need:
                    total.add(term)
            if dx is not None:
                rows = yield from exchange.take_back(rows, plans[i])
                dx[begin:end] = _gather_sum(rows, own.pair_position)

    parts = token_groups(len(dy), len(plans))
    pipelined(group(i, *parts[i]) for i in reversed(range(len(parts))))
    return dx, dgate_up.value, ddown.value, dweights


class ExpertsFunction(torch.autograd.Function):
    """forward, differentiable in x, gate_up, down and weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor,
        exchange: Exchange, groups: int, backend: str,
    ) -> Tensor:  # fmt: skip
        matrices, save_z = (Expert(gate_up), Expert(down)), ctx.needs_input_grad[3]
        y, kept, ctx.plans = forward(x, *matrices, weights, experts, exchange, groups, backend, True, save_z)
        # x is not read again, but without it a second derivative in it would not be noticed.
        ctx.save_for_backward(x, gate_up, down, weights, *(t for group in kept for t in group))
        ctx.exchange, ctx.backend = exchange, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, weights, *tensors = ctx.saved_tensors
        needs, each = ctx.needs_input_grad[:4], len(Kept._fields)
        kept = [Kept(*tensors[i : i + each]) for i in range(0, len(tensors), each)]
        lines = ctx.exchange.lines
        with call_along(f"{lines[0].function} backward", [line.group for line in lines]) as ranks:
            wanted = [name for name, need in zip(LEAVES, needs, strict=True) if need]
            facts = {"dtype": x.dtype, "groups": len(kept), "need of gradients": wanted}
            ranks.agree(facts, x.device, lines)
        grads = backward(dy, gate_up, down, weights, ctx.exchange, ctx.plans, kept, needs, ctx.backend)
        return *grads, None, None, None, None


class _Sum:
    """The gradient of w over the token groups, summed in the accumulation dtype. One product over all groups would be more exact
    in 16 bits, but would want the gradients of all rows at once, and could not begin before the last group has come.
    """

    def __init__(self, w: Tensor) -> None:
        self._dtype = w.dtype
        self._first: Tensor | None = None
        self._total: Tensor | None = None

    def add(self, term: Tensor) -> None:
        if self._first is None:
            self._first = term
        elif self._total is None:
            self._total = self._first.to(accumulation_dtype(self._dtype)).add_(term)
        else:
            self._total += term

    @property
    def value(self) -> Tensor | None:
        return self._first if self._total is None else self._total.to(self._dtype)


def _sorted(experts: Tensor, weights: Tensor, E: int, backend: str) -> Routing:
    experts = experts.contiguous()
    return Routing(*kernels_of(backend, "moe_sort", experts, weights.dtype, E).moe_sort(experts, E))


def _gather_sum(z: Tensor, position: Tensor, weights: Tensor | None = None) -> Tensor:
    """y_t = sum_j weights_tj z[position_tj] (weights of one if None), summed in the order of j in the accumulation dtype."""
    acc = accumulation_dtype(z.dtype)
    y = z.new_zeros(len(position), z.shape[1], dtype=acc)
    for j in range(position.shape[1]):
        row = z.index_select(0, position[:, j]).to(acc)
        y += row if weights is None else row * weights[:, j, None]
    return y.to(z.dtype)
