"""ExpertParallel on ranks against the dense module, and against plain PyTorch in the same dtype.

All five ranks of the pool run every function, as all ranks of a world make every mesh; those outside of a mesh skip it.
"""

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from moe_support import plain_mlp
from ranks_support import MOST, Received, run_ranks
from support import assert_close_to_truth, assert_same_bits, error, poisoned_memory
from torch import Tensor
from torch.distributed import ProcessGroup, get_rank
from torch.distributed.device_mesh import DeviceMesh

from lightning_attn import SparseMoE, load_balancing_loss, moe_route
from lightning_attn.distributed.balance import load_balancing_share
from lightning_attn.distributed.expert import ExpertParallel
from lightning_attn.distributed.expert_plan import Place, counts_bytes, plan, token_groups

D = 8
UNEVEN = (7, 3, 6, 4, 5)
Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, int, int]  # EDP, EP, ETP
    groups: int = 1
    tokens: tuple[int, ...] = UNEVEN  # of each rank
    k: int = 2
    E: int = 12
    F: int = 12
    dtype: torch.dtype = torch.float64
    router: str = "normal"  # "ties": all logits are equal; "last": every token likes the last expert best
    order: tuple[int, ...] = (0, 1, 2)  # of the dimensions of the mesh

    @property
    def ranks(self) -> int:
        return self.sizes[0] * self.sizes[1] * self.sizes[2]

    @property
    def mesh(self) -> tuple[tuple[str, int], ...]:
        """Those dimensions that are more than one, or one that is not."""
        dims = [(("edp", "ep", "etp")[i], self.sizes[i]) for i in self.order]
        return tuple(dim for dim in dims if dim[1] > 1) or (("ep", 1),)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        found = dict.fromkeys(("edp", "ep", "etp"), 0)
        for name, size in reversed(self.mesh):
            rank, found[name] = divmod(rank, size)
        return found["edp"], found["ep"], found["etp"]


@functools.cache
def mesh_of(dims: tuple[tuple[str, int], ...]) -> DeviceMesh:
    """Of the first ranks. Made on all ranks of the pool."""
    shape = [size for _, size in dims]
    ranks = torch.arange(torch.tensor(shape).prod()).view(shape)
    return DeviceMesh("cpu", ranks, mesh_dim_names=tuple(name for name, _ in dims))


def inputs(case: Case) -> tuple[SparseMoE, list[Tensor], list[Tensor]]:
    """The dense module, and of each rank x and the gradient of y."""
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=random, dtype=torch.float64)).to(case.dtype)

    moe = SparseMoE(D, case.F, case.E, case.k, dtype=case.dtype)
    with torch.no_grad():
        moe.gate.weight.copy_(normal(case.E, D, scale=D**-0.5))
        moe.gate_up_proj.copy_(normal(case.E, 2 * case.F, D, scale=D**-0.5))
        moe.down_proj.copy_(normal(case.E, D, case.F, scale=case.F**-0.5))
        if case.router == "ties":
            moe.gate.weight.zero_()
        if case.router == "last":
            moe.gate.weight[-1] *= 0
            moe.gate.weight[-1, 0] = 100.0
    xs = [normal(n, D) for n in case.tokens[: case.ranks]]
    if case.router == "last":
        xs = [torch.cat([x[:, :1].abs() + 1, x[:, 1:]], 1) for x in xs]
    return moe, xs, [normal(n, D) for n in case.tokens[: case.ranks]]


def slices(case: Case, rank: int, name: str, whole: Tensor) -> list[tuple[Any, Any]]:
    """Index pairs: what of a rank's gradient is what of the whole one."""
    _, e, t = case.coordinates(rank)
    each, part = case.E // case.sizes[1], case.F // case.sizes[2]
    mine, F = slice(e * each, (e + 1) * each), case.F
    if name == "gate.weight":
        return [(slice(None), slice(None))]
    columns = slice(t * part, (t + 1) * part)
    if name == "down_proj":
        return [((slice(None), slice(None), slice(None)), (mine, slice(None), columns))]
    up = slice(F + t * part, F + (t + 1) * part)
    return [((slice(None), slice(0, part)), (mine, columns)), ((slice(None), slice(part, None)), (mine, up))]


# ---- on the ranks ---------------------------------------------------------------------------------------------------


class ReceivedFrom(Received):
    """As its base, for exchanges in several groups."""

    def _bytes(self, name: str, args: Any) -> int:
        if name == "alltoall_base_":
            self.rank = ProcessGroup.unbox(args[2]).rank()
        return super()._bytes(name, args)


def run_cases(group: ProcessGroup, cases: list[Case], repeats: int = 1) -> list[Result | None]:
    return [run_case(group, case, repeats) for case in cases]


def run_case(group: ProcessGroup, case: Case, repeats: int) -> Result | None:
    mesh, rank = mesh_of(case.mesh), get_rank(group)
    if rank >= case.ranks:
        return None
    moe, xs, dys = inputs(case)
    module = ExpertParallel(moe, mesh, groups=case.groups)
    results = []
    for i in range(repeats):
        module.zero_grad()
        x = xs[rank].clone().requires_grad_()
        with poisoned_memory() if i % 2 else nullcontext():
            with ReceivedFrom(group) as forward:
                y, logits = module(x, return_router_logits=True)
            with ReceivedFrom(group) as backward:
                y.backward(dys[rank])
            module.reduce_gradients()
        gradients = {name: p.grad for name, p in module.named_parameters()}
        experts = moe_route(logits.detach(), case.k)[1]
        results.append({"y": y.detach(), "x": x.grad, "experts": experts, **gradients})
        results[-1] |= {"forward": forward.bytes, "backward": backward.bytes}
    for again in results[1:]:
        for name, value in results[0].items():
            if isinstance(value, Tensor):
                assert_same_bits(again[name], value, name)
    return results[0]


# ---- what they must give ----------------------------------------------------------------------------------------------

NAMES = ("gate.weight", "gate_up_proj", "down_proj")


def dense(case: Case) -> Result:
    """The dense module on the tokens of all ranks."""
    moe, xs, dys = inputs(case)
    x = torch.cat(xs).requires_grad_()
    y, logits = moe(x, return_router_logits=True)
    y.backward(torch.cat(dys))
    gradients = {name: p.grad for name, p in moe.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "experts": moe_route(logits.detach(), case.k)[1], **gradients}


def plain(case: Case, experts: Tensor, dtype: torch.dtype) -> Result:
    """Plain PyTorch in `dtype`, the experts given: which are best is not a matter of accuracy."""
    moe, xs, dys = inputs(case)
    moe, x = moe.to(dtype), torch.cat(xs).to(dtype).requires_grad_()
    logits = torch.nn.functional.linear(x, moe.gate.weight)
    chosen = logits.gather(1, experts.long())
    weights = chosen.softmax(-1, dtype=torch.promote_types(dtype, torch.float32))
    y = plain_mlp(x, moe.gate_up_proj, moe.down_proj, weights, experts, "concatenated")
    y.backward(torch.cat(dys).to(dtype))
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in moe.named_parameters()}}


def whole(case: Case, results: list[Result]) -> list[Result]:
    """The results of the ranks put together, once for each rank of EDP: so every rank's part counts."""
    shapes = {name: p.shape for name, p in inputs(case)[0].named_parameters()}
    tokens = {name: torch.cat([r[name] for r in results]) for name in ("y", "x", "experts")}
    found = []
    for d in range(case.sizes[0]):
        one = {name: torch.full(shape, float("nan"), dtype=case.dtype) for name, shape in shapes.items()}
        for rank, result in enumerate(results):
            assert_same_bits(result["gate.weight"], results[0]["gate.weight"], "the gate's gradient")
            if case.coordinates(rank)[0] == d:
                for name in NAMES:
                    for own, of_all in slices(case, rank, name, one[name]):
                        one[name][of_all] = result[name][own]
        found.append(tokens | one)
    return found


def check_exact(case: Case, results: list[Result]) -> None:
    """Against the dense module in float64."""
    expected = dense(case)
    for one in whole(case, results):
        assert torch.equal(one["experts"], expected["experts"])
        for name in ("y", "x", *NAMES):
            assert one[name].shape == expected[name].shape and one[name].dtype == case.dtype
            assert error(one[name], expected[name]) <= 1e-12, (case, name, error(one[name], expected[name]))
        idle = set(range(case.E)) - set(expected["experts"].flatten().tolist())
        for name in ("gate_up_proj", "down_proj"):
            assert not one[name][sorted(idle)].any(), (case, name)


def check_bytes(case: Case, results: list[Result]) -> None:
    """What PyTorch received is what the formulas say, by operator."""
    size = torch.empty(0, dtype=case.dtype).itemsize
    _, EP, ETP = case.sizes
    for rank, result in enumerate(results):
        d, e, t = case.coordinates(rank)
        place = Place(EP, ETP, e, t)
        parts = {"alltoall_base_": 0, "recv_": 0}
        for i in range(case.groups):
            table = torch.zeros(EP, ETP, case.E, dtype=torch.int64)
            for other, answer in enumerate(results):
                d_, e_, t_ = case.coordinates(other)
                begin, end = token_groups(len(answer["experts"]), case.groups)[i]
                if d_ == d:
                    table[e_, t_] = torch.bincount(answer["experts"][begin:end].flatten(), minlength=case.E)
            own = plan(table, place)
            there_and_back = own.dispatch_bytes(D, size) + own.combine_bytes(D, size)
            parts["alltoall_base_"] += there_and_back + own.reduce_scatter_bytes(D, size)
            parts["recv_"] += own.all_gather_bytes(D, size)
        forward, backward = dict(result["forward"]), dict(result["backward"])
        if EP * ETP == 1:
            assert forward == backward == {}, "nothing is sent"
            continue
        assert forward.pop("_allgather_base_", 0) == counts_bytes(place, case.groups, case.E)
        for found in (forward, backward):
            assert {name: n for name, n in found.items() if n} == {name: n for name, n in parts.items() if n}


def run_on(cases: list[Case], repeats: int = 1) -> list[list[Result]]:
    """The results of each case by rank."""
    answers = run_ranks(MOST, run_cases, cases, repeats)
    by_case = zip(*answers, strict=True)
    return [list(one[: case.ranks]) for case, one in zip(cases, by_case, strict=True)]


def grids(n: int) -> list[tuple[int, int, int]]:
    counts = range(1, n + 1)
    return [sizes for sizes in product(counts, repeat=3) if sizes[0] * sizes[1] * sizes[2] == n]


# ---- the dense module's results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_equals_the_dense_module(groups: int) -> None:
    """EDP x EP x ETP over all factorisations of 1 to 5 ranks, and the bytes that travel."""
    orders = [(0, 1, 2), (2, 1, 0), (1, 2, 0)]
    cases = []
    for n in range(1, MOST + 1):
        E = F = 10 if n == 5 else 12
        for i, sizes in enumerate(grids(n)):
            cases.append(Case(sizes, groups, k=1 + (i + groups) % 3, E=E, F=F, order=orders[i % 3]))
    for case, results in zip(cases, run_on(cases), strict=True):
        check_exact(case, results)
        check_bytes(case, results)


def test_uneven_tokens() -> None:
    """Ranks without tokens, all of them without, one token, fewer tokens than groups, all on one expert, ties."""
    cases = []
    for sizes in [(1, 2, 2), (1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2)]:
        for tokens in [(0, 6, 0, 5), (0, 0, 0, 0), (0, 1, 0, 0), (2, 1, 9, 0)]:
            cases.append(Case(sizes, 2, tokens))
        cases += [Case(sizes, 3, router="ties", k=k) for k in (1, 3)]
        cases += [Case(sizes, 2, (4, 0, 9, 1), router="last", k=1), Case(sizes, router="last", k=1)]
    for case, results in zip(cases, run_on(cases), strict=True):
        check_exact(case, results)
        check_bytes(case, results)
        experts = torch.cat([r["experts"] for r in results])
        if case.router == "ties":
            assert torch.equal(experts, torch.arange(case.k, dtype=torch.int32).expand_as(experts))
        if case.router == "last":
            assert (experts == case.E - 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_as_accurate_as_plain_pytorch(dtype: torch.dtype) -> None:
    """The rule of the suite, and three runs give the same bits, in whatever memory."""
    tokens = (70, 41, 0, 64, 33)
    grids_ = [(1, 2, 2), (1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (4, 1, 1), (1, 3, 1), (1, 1, 2)]
    cases = [Case(sizes, 1 + i % 3, tokens, dtype=dtype) for i, sizes in enumerate(grids_)]
    for case, results in zip(cases, run_on(cases, 3), strict=True):
        for one in whole(case, results):
            truth, baseline = (plain(case, one["experts"], dt) for dt in (torch.float64, dtype))
            for name in ("y", "x", *NAMES):
                assert_close_to_truth(one[name], truth[name], baseline[name], name=f"{case}: {name}")
        check_bytes(case, results)


# ---- what else a module does ------------------------------------------------------------------------------------------


def mine(case: Case, mesh: DeviceMesh, rank: int) -> tuple[ExpertParallel, SparseMoE, list[Tensor], slice]:
    """The module, the dense one, x of each rank, and where this rank's tokens are among all."""
    moe, xs, _ = inputs(case)
    begin = sum(map(len, xs[:rank]))
    return (
        ExpertParallel(moe, mesh, groups=case.groups),
        moe,
        xs,
        slice(begin, begin + len(xs[rank])),
    )


def some_gradients(group: ProcessGroup, case: Case) -> None:
    """Any part of x, gate, gate_up and down may need none; the others are as before, and nothing useless is sent."""
    mesh, rank = mesh_of(case.mesh), get_rank(group)
    if rank >= case.ranks:
        return
    for need_x, *needs in product((False, True), repeat=4):
        module, moe, xs, here = mine(case, mesh, rank)
        for model in (module, moe):
            for name, need in zip(NAMES, needs, strict=True):
                model.get_parameter(name).requires_grad_(need)
        x, every = xs[rank].clone().requires_grad_(need_x), torch.cat(xs).requires_grad_(need_x)
        with ReceivedFrom(group) as forward:
            y = module(x)
        expected = moe(every)
        assert y.requires_grad == any((need_x, *needs))
        if y.requires_grad:
            with ReceivedFrom(group) as backward:
                y.sum().backward()
            expected.sum().backward()
            sent = sum(forward.bytes.values()) - forward.bytes["_allgather_base_"]
            if need_x:
                assert error(x.grad, every.grad[here]) <= 1e-12
            if not (need_x or needs[1] or needs[2]):
                assert backward.total == 0
            elif not need_x:
                assert 0 < backward.total < sent
            else:
                assert backward.total == sent
        module.reduce_gradients()
        for name in NAMES:
            found, whole_one = module.get_parameter(name).grad, moe.get_parameter(name).grad
            assert (found is None) == (whole_one is None), name
            for own, of_all in [] if found is None else slices(case, rank, name, whole_one):
                assert error(found[own], whole_one[of_all]) <= 1e-12, (name, need_x, needs)


def test_gradients_that_are_not_needed() -> None:
    run_ranks(MOST, some_gradients, Case((1, 2, 2), 2))


def module_state(group: ProcessGroup, case: Case) -> None:
    """dense -> parallel -> dense is the same bits, by every way there."""
    mesh, rank = mesh_of(case.mesh), get_rank(group)
    if rank >= case.ranks:
        return
    module, moe, xs, here = mine(case, mesh, rank)
    expected = dict(moe.state_dict())

    def same(other: ExpertParallel) -> None:
        found = other.gather_dense()
        assert found.keys() == expected.keys()
        for name, w in expected.items():
            assert_same_bits(found[name], w, name)

    same(module)
    saved = {name: w.clone() for name, w in module.state_dict().items()}
    assert list(saved) == list(expected)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    module.load_dense(moe)
    same(module)
    with torch.device("meta"):
        empty = SparseMoE(D, case.F, case.E, case.k, dtype=case.dtype)
    for load in (
        lambda m: m.load_dense(moe),
        lambda m: m.load_state_dict(saved, assign=True),
        lambda m: m.to_empty(device="cpu").load_state_dict(saved),
    ):
        other = ExpertParallel(empty, mesh, groups=case.groups)
        assert all(p.is_meta for p in other.parameters())
        load(other)
        same(other)
        assert torch.equal(other(xs[rank]), module(xs[rank]))
    # int8, its scales in float32 whatever the module is cast to
    moe.quantize()
    shrunk = ExpertParallel(moe, mesh, groups=case.groups)
    expected = dict(moe.state_dict())
    same(shrunk)
    with torch.no_grad():
        assert error(shrunk(xs[rank]), moe(torch.cat(xs))[here]) <= 1e-12
        assert shrunk.bfloat16().gate_up_scale.dtype == torch.float32
    with pytest.raises(ValueError, match="load_dense: expected int8 experts, got floating-point"):
        shrunk.load_dense(inputs(case)[0])
    with pytest.raises(ValueError, match="expected x without requires_grad"):
        shrunk.to(case.dtype)(xs[rank].clone().requires_grad_())


def test_state() -> None:
    run_ranks(MOST, module_state, Case((1, 2, 2), 2))


def calls(group: ProcessGroup, case: Case) -> Result | None:
    """Shapes, autocast, torch.compile, a second derivative."""
    mesh, rank = mesh_of(case.mesh), get_rank(group)
    if rank >= case.ranks:
        return None
    module, _, xs, _ = mine(case, mesh, rank)
    x = xs[rank]
    y, logits = module(x, return_router_logits=True)
    assert not module(x.detach()).isnan().any() and logits.shape == (len(x), case.E)
    strided = torch.stack([x, x], 2)[:, :, 0]
    assert torch.equal(module(strided[None])[0], y)
    assert torch.equal(torch.compile(module, backend="eager")(x), y)
    with torch.no_grad():
        assert torch.equal(module(x), y)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(module(leaf).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="expected gradients to be taken once"):
        dx.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        y, logits = module(x, return_router_logits=True)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and module.down_proj.grad.dtype == torch.float32
    return {"y": y.detach(), "experts": moe_route(logits.detach(), case.k)[1]}


def test_calls() -> None:
    case = Case((1, 2, 2), 2, (30, 20, 0, 25), dtype=torch.float32)
    results = [r for r in run_ranks(MOST, calls, case) if r is not None]
    y, experts = (torch.cat([r[name] for r in results]) for name in ("y", "experts"))
    truth = plain(case, experts, torch.float64)["y"]
    with torch.autocast("cpu", torch.bfloat16):
        baseline = plain(case, experts, torch.float32)["y"]
    assert_close_to_truth(y, truth, baseline.bfloat16(), name="under autocast")


# ---- the auxiliary loss ----------------------------------------------------------------------------------------------


def shares(group: ProcessGroup, tokens: tuple[int, ...], k: int) -> tuple[Tensor, Tensor]:
    logits = all_logits(tokens)[get_rank(group)].requires_grad_()
    share = load_balancing_share(logits, moe_route(logits.detach(), k)[1], group)
    share.backward()
    return share.detach(), logits.grad


def all_logits(tokens: tuple[int, ...]) -> list[Tensor]:
    random = torch.Generator().manual_seed(2)
    return [torch.randn(n, 6, generator=random, dtype=torch.float64) for n in tokens]


@pytest.mark.parametrize("tokens", [UNEVEN, (0, 9, 0, 1, 2), (0, 0, 0, 0, 0), (5,), (3, 4)])
def test_shares_sum_to_the_load_balancing_loss(tokens: tuple[int, ...]) -> None:
    """With the gradients of the whole."""
    answers = run_ranks(len(tokens), shares, tokens, 2)
    logits = torch.cat(all_logits(tokens)).requires_grad_()
    loss = load_balancing_loss(logits, moe_route(logits.detach(), 2)[1])
    loss.backward()
    assert error(sum(share for share, _ in answers), loss.detach()) <= 1e-14
    assert error(torch.cat([gradient for _, gradient in answers]), logits.grad) <= 1e-14
