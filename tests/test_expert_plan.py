"""Who sends what to whom, and when: plans against a simulation that moves labelled rows about, the order of the exchanges,
and the errors of a call that cannot be.
"""

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from ranks_support import MOST, run_ranks
from test_expert_parallel import Case, D, inputs, mesh_of
from torch.distributed import ProcessGroup, get_rank
from torch.distributed.device_mesh import DeviceMesh

from lightning_attn import SparseMoE, ops
from lightning_attn.distributed import RankError
from lightning_attn.distributed.all_reduce import in_order
from lightning_attn.distributed.balance import load_balancing_share
from lightning_attn.distributed.comm import Pending, Ranks
from lightning_attn.distributed.expert import ExpertParallel
from lightning_attn.distributed.expert_plan import (
    Place,
    arrivals,
    counts_bytes,
    join,
    plan,
    shard,
    token_groups,
)

GRIDS = [(EP, ETP) for EP, ETP in product((1, 2, 3, 4), (1, 2, 3)) if EP * ETP <= 6]


def places(EP: int, ETP: int) -> list[Place]:
    return [Place(EP, ETP, e, t) for e, t in product(range(EP), range(ETP))]


def random_table(EP: int, ETP: int, E: int, seed: int) -> torch.Tensor:
    """Counts, many of them zero."""
    draw = random.Random(seed)
    counts = [draw.choice((0, 0, 1, 2, 5)) for _ in range(EP * ETP * E)]
    return torch.tensor(counts).view(EP, ETP, E)


@pytest.mark.parametrize("EP, ETP", GRIDS)
def test_rows_arrive_where_their_expert_is(EP: int, ETP: int) -> None:
    """Row by row: who sends it, who gets it, of which expert it is, and what comes from others."""
    E, D, itemsize = 2 * EP, 3, 8
    for seed in range(4):
        table = random_table(EP, ETP, E, seed)
        plans = {(p.e, p.t): plan(table, p) for p in places(EP, ETP)}
        # (source e, source t, expert) of each row that a rank has after the dispatch
        after = {(e, t): [] for e, t in plans}
        for (e, t), own in plans.items():
            rows = [(e, t, x) for x in range(E) for _ in range(table[e, t, x])]
            assert len(rows) == sum(own.send)
            for to in range(EP):
                sent, rows = rows[: own.send[to]], rows[own.send[to] :]
                after[to, t] += sent
                assert plans[to, t].receive[e] == len(sent)
        for (e, t), own in plans.items():
            computed = [row for u in range(ETP) for row in after[e, u]]
            assert own.rows == len(computed)
            assert own.gathered == [len(after[e, u]) for u in range(ETP)]
            assert all(x // (E // EP) == e for _, _, x in computed)
            ids = arrivals(table.int(), own.place, own.rows)
            assert ids.dtype == torch.int32 and ids.tolist() == [x - e * (E // EP) for _, _, x in computed]
            each = D * itemsize
            assert own.dispatch_bytes(D, itemsize) == each * sum(s != e for s, _, _ in after[e, t])
            assert own.all_gather_bytes(D, itemsize) == each * sum(u != t for _, u, _ in computed)
            assert own.reduce_scatter_bytes(D, itemsize) == each * (ETP - 1) * len(after[e, t])
            away = sum(x // (E // EP) != e for x in range(E) for _ in range(table[e, t, x]))
            assert own.combine_bytes(D, itemsize) == each * away
            parts = own.dispatch_bytes(D, itemsize) + own.all_gather_bytes(D, itemsize)
            both = parts + own.reduce_scatter_bytes(D, itemsize) + own.combine_bytes(D, itemsize)
            assert own.forward_bytes(D, itemsize) == own.backward_bytes(D, itemsize) == both
            assert own.backward_bytes(D, itemsize, need_x=False) == parts
            assert own.backward_bytes(D, itemsize, need_x=False, need_experts=False) == 0


def test_bytes_by_hand() -> None:
    """EP 2 x ETP 2, E = 2, 10 bytes a row."""
    table = torch.tensor([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    own = plan(table, Place(2, 2, 1, 0))  # holds expert 1
    assert own.send == [5, 6] and own.receive == [2, 6] and own.gathered == [8, 12]
    assert own.dispatch_bytes(5, 2) == 20 and own.all_gather_bytes(5, 2) == 120
    assert own.reduce_scatter_bytes(5, 2) == 80 and own.combine_bytes(5, 2) == 50
    assert counts_bytes(own.place, 3, 2) == 3 * 3 * 2 * 4
    assert counts_bytes(Place(1, 1, 0, 0), 3, 2) == 0


def test_token_groups() -> None:
    """Contiguous, complete, and none more than one larger than another."""
    for tokens, groups in product(range(9), range(1, 5)):
        parts = token_groups(tokens, groups)
        assert [t for begin, end in parts for t in range(begin, end)] == list(range(tokens))
        sizes = [end - begin for begin, end in parts]
        assert len(parts) == groups and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("EP, ETP", GRIDS)
def test_shards_are_joined_to_the_whole(EP: int, ETP: int) -> None:
    """By index: the gate's rows and the up projection's are cut apart; copies, also of a transposed matrix."""
    E, F, D = 2 * EP, 2 * ETP, 3
    gate_up, down = torch.randn(E, D, 2 * F).mT, torch.randn(E, D, F)
    wholes = {"gate_up_proj": gate_up, "down_proj": down}
    wholes |= {"gate_up_scale": torch.randn(E, 2 * F), "down_scale": torch.randn(E, D)}
    for name, whole in wholes.items():
        parts = {(p.e, p.t): shard(name, whole, p) for p in places(EP, ETP)}
        assert all(part.is_contiguous() and part.data_ptr() != whole.data_ptr() for part in parts.values())
        joined = [join(name, torch.stack([parts[e, t] for t in range(ETP)])) for e in range(EP)]
        assert torch.equal(torch.cat(joined), whole)
    for p in places(EP, ETP):
        part = shard("gate_up_proj", gate_up, p)
        assert torch.equal(part[1, 0], gate_up[2 * p.e + 1, 2 * p.t])
        assert torch.equal(part[1, 3], gate_up[2 * p.e + 1, F + 2 * p.t + 1])
        assert torch.equal(shard("down_proj", down, p)[0, :, 1], down[2 * p.e, :, 2 * p.t + 1])


def test_sums_are_in_order() -> None:
    """1e8 + 1 - 1e8 in float32 depends on it."""
    parts = torch.tensor([[1e8], [1.0], [-1e8]])
    assert in_order(parts).item() == 0
    assert in_order(parts[[0, 2, 1]]).item() == 1
    assert in_order(parts.bfloat16()).dtype == torch.float32
    assert parts[0].item() == 1e8, "the parts are not written to"


# ---- order ------------------------------------------------------------------------------------------------------------


@contextmanager
def spied(module: ExpertParallel) -> Iterator[list[str]]:
    """The exchanges that are started, by dimension, the waits for them, and the experts' products, as they happen."""
    events, starts, names = list[str](), dict[int, str](), dict[str, str]()
    for name in module.mesh.mesh_dim_names:
        names[module.mesh.get_group(name).group_name] = name
    mlps = {name: getattr(ops, name) for name in ("moe_mlp_forward", "moe_mlp_backward")}
    exchanges, wait = {name: getattr(Ranks, name) for name in ("all_to_all", "pass_on")}, Pending.wait

    def start(method: Callable) -> Callable:
        def run(ranks: Ranks, *args: object) -> Pending:
            pending = method(ranks, *args)
            name = names[ranks.group.group_name]
            starts[id(pending)] = f"{name}{sum(e.startswith(name) for e in events)}"
            events.append(starts[id(pending)])
            keep.append(pending)
            return pending

        return run

    def multiply(function: Callable) -> Callable:
        def run(*args: object) -> object:
            events.append("mlp")
            return function(*args)

        return run

    def waited(pending: Pending) -> object:
        if id(pending) in starts:
            events.append("wait " + starts[id(pending)])
        return wait(pending)

    keep: list[Pending] = []  # so that no two have the same id
    for name, function in mlps.items():
        setattr(ops, name, multiply(function))
    for name, method in exchanges.items():
        setattr(Ranks, name, start(method))
    Pending.wait = waited
    try:
        yield events
    finally:
        for owner, functions in ((ops, mlps), (Ranks, exchanges)):
            for name, function in functions.items():
                setattr(owner, name, function)
        Pending.wait = wait


def order_of_events(group: ProcessGroup, cases: list[Case]) -> list[tuple[list[str], list[str]]]:
    found = []
    for case in cases:
        mesh, rank = mesh_of(case.mesh), get_rank(group)
        if rank < case.ranks:
            moe, xs, dys = inputs(case)
            module = ExpertParallel(moe, mesh, groups=case.groups)
            with spied(module) as forward:
                y = module(xs[rank].requires_grad_())
            with spied(module) as backward:
                y.backward(dys[rank])
            found.append((forward, backward))
    return found


def test_exchanges_fly_while_experts_compute() -> None:
    """Three groups. The exchanges of the next are under way when the experts of one begin, and nothing that they sent is
    waited for before those of the next are done: the order of the paper's pipeline, in reverse in the backward too.
    """
    starts = {
        (1, 2, 1): "ep ep mlp ep ep mlp ep mlp ep",
        (1, 1, 2): "etp etp mlp etp etp mlp etp mlp etp",
        (1, 2, 2): "ep ep etp ep etp mlp etp etp mlp etp ep mlp etp ep ep",
    }
    cases = [Case(sizes, 3) for sizes in starts]
    answers = run_ranks(MOST, order_of_events, cases)
    for rank, found in enumerate(answers):
        for case, both in zip([case for case in cases if rank < case.ranks], found, strict=True):
            for events in both:
                begun = [e.rstrip("0123456789") for e in events if not e.startswith("wait")]
                assert " ".join(begun) == starts[case.sizes], (case, rank)
                mlps = [i for i, e in enumerate(events) if e == "mlp"]
                for i, event in enumerate(events[mlps[0] : mlps[-1]], mlps[0]):
                    if not event.startswith("wait"):
                        continue
                    flown = events[events.index(event.removeprefix("wait ")) : i]
                    assert "mlp" in flown, f"{event} is waited for with nothing between: {events}"


# ---- errors -----------------------------------------------------------------------------------------------------------


def bad_constructions(group: ProcessGroup) -> None:
    named, alone = mesh_of((("ep", 2), ("etp", 2))), mesh_of((("ep", 1),))
    other = DeviceMesh("cpu", torch.arange(2), mesh_dim_names=("tp",))
    nameless = DeviceMesh("cpu", torch.arange(2))
    falling = DeviceMesh("cpu", torch.tensor([1, 0]), mesh_dim_names=("ep",))
    moe = SparseMoE(D, 12, 12, 2)
    if get_rank(group) > 1:
        return
    for error, message, arguments in [
        (TypeError, "expected moe to be a SparseMoE, got Linear", (torch.nn.Linear(2, 2), named)),
        (TypeError, "expected mesh to be a DeviceMesh, got ProcessGroup", (moe, group)),
        (TypeError, "expected groups to be an int, got float", (moe, named, 2.0)),
        (ValueError, "expected groups >= 1, got 0", (moe, named, 0)),
        (ValueError, "expected mesh dimensions named among edp, ep, etp, got ('tp',)", (moe, other)),
        (ValueError, "expected mesh dimensions named among edp, ep, etp, got no names", (moe, nameless)),
        (ValueError, "expected a mesh whose ranks rise along ep, got [1, 0]", (moe, falling)),
        (ValueError, "experts divisible by ep = 2, got 5", (SparseMoE(D, 12, 5, 2), named)),
        (ValueError, "an intermediate size divisible by etp = 2, got 3", (SparseMoE(D, 3, 4, 2), named)),
        *([(ValueError, "expected a mesh that this rank is in", (moe, alone))] if get_rank(group) else []),
    ]:
        moe_, mesh, *groups = arguments
        with pytest.raises(error, match="^ExpertParallel: .*" + re.escape(message)):
            ExpertParallel(moe_, mesh, groups=groups[0] if groups else 1)
    module = ExpertParallel(moe, named)
    with pytest.raises(TypeError, match="load_dense: expected moe to be a SparseMoE, got dict"):
        module.load_dense({})
    with pytest.raises(
        ValueError, match=re.escape("expected a moe of D, F, E = (8, 12, 12), got (8, 12, 4)")
    ):
        module.load_dense(SparseMoE(D, 12, 4, 2))


def test_bad_constructions() -> None:
    run_ranks(MOST, bad_constructions)


def disagreements(group: ProcessGroup, sizes: tuple[int, int, int]) -> None:
    """Whatever one rank does otherwise, all raise; and the next call is as good as ever."""
    case = Case(sizes, dtype=torch.float32)
    mesh, rank = mesh_of(case.mesh), get_rank(group)
    if rank >= case.ranks:
        return
    moe, xs, _ = inputs(case)
    x, odd = xs[rank], rank == case.ranks - 1

    def make(k: int = 2, groups: int = 1, dtype: torch.dtype = torch.float32) -> ExpertParallel:
        moe.top_k = k
        return ExpertParallel(moe.to(dtype), mesh, groups=groups)

    def all_raise(message: str, run: Callable[[], object]) -> None:
        with pytest.raises(RankError, match=message):
            run()
        make()(x).sum().backward()

    def raises(error: type[Exception], message: str, run: Callable[[], object]) -> None:
        """On the odd rank, and RankError on the others."""
        expected = (error, "^ExpertParallel: " + re.escape(message)) if odd else (RankError, error.__name__)
        with pytest.raises(expected[0], match=expected[1]):
            run()
        make()(x).sum().backward()

    module = make()
    for p in module.parameters():
        p.grad = None if odd else torch.ones_like(p)
    all_raise("reduce_gradients: .*(same gradients|RankError)", module.reduce_gradients)
    if sizes[0] > 1:  # ranks of other tokens call forward as they like
        return
    all_raise("same top_k|RankError", lambda: make(k=3 if odd else 2)(x))
    all_raise("same groups|RankError", lambda: make(groups=2 if odd else 1)(x))
    half = torch.bfloat16 if odd else torch.float32
    all_raise("same dtype|RankError", lambda: make(dtype=half)(x.to(half)))
    moe.float()
    all_raise("same need of gradients|RankError", lambda: make()(x.clone().requires_grad_(odd)))
    y = module(x)
    all_raise("got a call of|RankError", lambda: module(x) if odd else y.sum().backward())
    raises(
        ValueError, "expected x of shape [..., 8], got [2, 9]", lambda: make()(torch.ones(2, 9) if odd else x)
    )
    raises(TypeError, "expected x to be a torch.Tensor, got list", lambda: make()([1.0] if odd else x))
    raises(
        TypeError, "expected backend to be a str, got int", lambda: make()(x, backend=1 if odd else "auto")
    )
    raises(TypeError, "expected x of dtype float32", lambda: make()(x.long() if odd else x))
    got = "expected x of the dtype of gate.weight, torch.float32, got torch.float64"
    raises(TypeError, got, lambda: make()(x.double() if odd else x))
    got = "expected x on gate.weight's device cpu, got meta"
    raises(ValueError, got, lambda: make()(x.to("meta") if odd else x))


@pytest.mark.parametrize("sizes", [(1, 2, 2), (1, 1, 3), (1, 4, 1), (2, 1, 2)])
def test_disagreements(sizes: tuple[int, int, int]) -> None:
    run_ranks(MOST, disagreements, sizes)


def bad_share(group: ProcessGroup) -> None:
    experts = torch.zeros(3, 2, dtype=torch.int32)
    for error, message, logits in [
        (TypeError, "expected logits to be a torch.Tensor, got int", 1),
        (TypeError, "expected logits of dtype float32", torch.zeros(3, 4, dtype=torch.int32)),
        (ValueError, "expected logits of shape [T, E], got [3]", torch.zeros(3)),
        (ValueError, "expected experts of shape [T, k] = [4, k], got [3, 2]", torch.zeros(4, 4)),
    ]:
        odd = get_rank(group) == 1
        with pytest.raises(error if odd else RankError, match=re.escape(message)):
            load_balancing_share(logits if odd else torch.zeros(3, 4), experts, group)
        load_balancing_share(torch.zeros(3, 4), experts, group)  # which is as good as ever
    with pytest.raises(RankError, match="same E"):
        load_balancing_share(torch.zeros(3, 4 + get_rank(group)), experts, group)


def test_bad_shares() -> None:
    run_ranks(2, bad_share)
