"""A rank that is called with something else, raises, hangs or is killed: a named error on every other rank, within the timeout of
the group, and no result (row 29 of what must not go wrong).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks_support import Ranks as Pool
from ranks_support import fresh_ranks, run_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lightning_attn import SparseMoE
from lightning_attn.distributed import (
    ExpertParallel,
    RankError,
    comm,
    lasp,
    load_balancing_share,
    ring_attention,
)

SIZE, WRONG = 3, 1  # ranks, and the one that does it
CUTS = [0, 10, 20, 30]
TIMEOUT = 4.0  # seconds


def shard(group: dist.ProcessGroup, changes: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """q, k and v of this rank in one, and what else both kinds of attention take."""
    cuts, rank = changes.get("cuts", CUTS), dist.get_rank(group)
    shape = 1, cuts[rank + 1] - cuts[rank], changes.get("heads", 2), 4
    q = torch.ones(shape, dtype=changes.get("dtype", torch.float32), requires_grad=changes.get("grad", True))
    return q, {"cu_seqlens": torch.tensor(changes.get("documents", [0, 30])), "cuts": cuts, "group": group}


def attention(group: dist.ProcessGroup, **changes: Any) -> tuple[Callable[[], Tensor], Tensor]:
    """A call of `lasp` on this rank, and the input that gets a gradient."""
    q, rest = shard(group, changes)
    decay = torch.full((q.shape[2],), changes.get("rate", 0.1))
    return lambda: lasp(q, q, q, decay, **rest), q  # type: ignore[return-value]


def ring(group: dist.ProcessGroup, **changes: Any) -> tuple[Callable[[], Tensor], Tensor]:
    """The same of `ring_attention`."""
    q, rest = shard(group, changes)
    return lambda: ring_attention(q, q, q, **rest), q


def experts(group: dist.ProcessGroup, **changes: Any) -> tuple[Callable[[], Tensor], Tensor]:
    """The same of `ExpertParallel`."""
    ranks = dist.get_process_group_ranks(group)
    mesh = DeviceMesh.from_group(group, "cpu", mesh=ranks, mesh_dim_names=("ep",))
    dtype = changes.get("dtype", torch.float32)
    moe = SparseMoE(8, 4, num_experts=6, top_k=changes.get("top_k", 2), dtype=dtype)
    parallel = ExpertParallel(moe, mesh)
    x = torch.ones(5, 8, dtype=dtype, requires_grad=changes.get("grad", True))
    return lambda: parallel(x), x


CALLS = {"lasp": attention, "ring_attention": ring, "ExpertParallel": experts}


def told(call: Callable[[], object]) -> tuple[str, str]:
    """The name and the words of what a call raises."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
        return type(error).__name__, str(error)
    return "", "it returned"


# ---- other arguments -------------------------------------------------------------------------------------------------


def mismatched(
    group: dist.ProcessGroup, name: str, changes: dict[str, object]
) -> tuple[tuple[str, str], float]:
    """What this rank is told where one rank has other arguments; then all call it alike, which works again."""
    wrong = dist.get_rank(group) == WRONG
    call, x = CALLS[name](group, **changes if wrong else {})
    error = told(call)
    assert x.grad is None
    call, x = CALLS[name](group)
    y = call()
    y.sum().backward()
    assert y.isfinite().all() and x.grad is not None
    return error, y.sum().item()


MISMATCHES: list[tuple[str, str, dict[str, Any]]] = [
    ("lasp", "cuts", {"cuts": [0, 10, 20, 31], "documents": [0, 31]}),
    ("lasp", "cu_seqlens", {"documents": [0, 15, 30]}),
    ("lasp", "dtype", {"dtype": torch.float64}),
    ("lasp", "heads", {"heads": 3}),
    ("lasp", "decay", {"rate": 0.2}),
    ("lasp", "need of gradients", {"grad": False}),
    ("ring_attention", "cuts", {"cuts": [0, 10, 20, 31], "documents": [0, 31]}),
    ("ring_attention", "cu_seqlens", {"documents": [0, 15, 30]}),
    ("ring_attention", "dtype", {"dtype": torch.float64}),
    ("ring_attention", "[H, G, D, D_v]", {"heads": 3}),
    ("ring_attention", "need of gradients", {"grad": False}),
    ("ExpertParallel", "top_k", {"top_k": 1}),
    ("ExpertParallel", "dtype", {"dtype": torch.float64}),
]


@pytest.mark.parametrize("name, fact, changes", MISMATCHES, ids=[f"{n}-{f}" for n, f, _ in MISMATCHES])
def test_mismatch(name: str, fact: str, changes: dict[str, Any]) -> None:
    """Every rank says who differs, and in what; nothing was sent, so the group goes on."""
    for (kind, words), _ in run_ranks(SIZE, mismatched, name, changes):
        assert kind == "RankError" and words.startswith(f"{name}: expected the same "), words
        assert fact in words and f"on all {SIZE} ranks" in words
        assert f"on rank {WRONG}" in words and "on rank 0" in words


def raising(group: dist.ProcessGroup, name: str) -> tuple[str, str]:
    """One rank's own arguments are wrong."""
    if dist.get_rank(group) != WRONG:
        return told(CALLS[name](group)[0])
    if name == "ExpertParallel":
        call, _ = experts(group)
        parallel = call.__closure__[0].cell_contents  # type: ignore[index]
        return told(lambda: parallel(torch.ones(5, 7)))
    half = torch.ones(1, 10, 2, 4, dtype=torch.int32)
    if name == "lasp":
        return told(lambda: lasp(half, half, half, torch.ones(2), cu_seqlens=None, cuts=CUTS, group=group))
    return told(lambda: ring_attention(half, half, half, cu_seqlens=None, cuts=CUTS, group=group))


@pytest.mark.parametrize("name", CALLS)
def test_a_rank_raises(name: str) -> None:
    """Its own error there, and what it was on the others, at once."""
    start = time.monotonic()
    answers = run_ranks(SIZE, raising, name)
    assert time.monotonic() - start < 60, "nobody waits for the timeout of 300 s"
    kind, words = answers[WRONG]
    assert kind in ("TypeError", "ValueError") and words.startswith(f"{name}: expected ")
    for rank in range(SIZE):
        if rank != WRONG:
            assert (
                answers[rank][0] == "RankError" and f"got {kind}: {words} on rank {WRONG}" in answers[rank][1]
            )


def another(group: dist.ProcessGroup) -> tuple[str, str]:
    name = "ring_attention" if dist.get_rank(group) == WRONG else "lasp"
    return told(CALLS[name](group, grad=False)[0])


def test_another_function() -> None:
    for rank, (kind, words) in enumerate(run_ranks(SIZE, another)):
        assert kind == "RankError" and "the same call" in words, rank
        assert f"a call of lasp on rank 0 and of ring_attention on rank {WRONG}" in words


def of_other_sizes(group: dist.ProcessGroup) -> tuple[str, str]:
    E = 5 if dist.get_rank(group) == WRONG else 4
    return told(lambda: load_balancing_share(torch.zeros(3, E), torch.zeros(3, 2, dtype=torch.int32), group))


def test_another_number_of_experts() -> None:
    for kind, words in run_ranks(SIZE, of_other_sizes):
        assert kind == "RankError" and "expected the same E" in words


def out_of_range(group: dist.ProcessGroup, expert: int) -> tuple[str, str]:
    wrong = dist.get_rank(group) == WRONG
    experts = torch.full((3, 2), expert if wrong else 0, dtype=torch.int32)
    return told(lambda: load_balancing_share(torch.zeros(3, 4), experts, group))


@pytest.mark.parametrize("expert", [-1, 4, 5])
def test_an_expert_that_is_none(expert: int) -> None:
    answers = run_ranks(SIZE, out_of_range, expert)
    for rank, (kind, words) in enumerate(answers):
        assert kind == ("ValueError" if rank == WRONG else "RankError")
        assert f"load_balancing_share: expected experts in [0, 4), got {expert}" in words


# ---- ranks that are gone ---------------------------------------------------------------------------------------------


@pytest.fixture
def doomed() -> Iterator[Pool]:
    with fresh_ranks(SIZE, TIMEOUT) as ranks:
        yield ranks


def together(group: dist.ProcessGroup) -> None:
    """A barrier with more patience than the group has: processes take time to start."""
    store = dist.PrefixStore("together", comm._group(group).store)
    store.set(str(dist.get_rank(group)), "here")
    store.wait([str(rank) for rank in range(dist.get_world_size(group))], timedelta(seconds=100))


def gone(group: dist.ProcessGroup, name: str, when: str, how: str) -> tuple[str, str, float, bool]:
    """What a rank is told, after how long, and whether it has a gradient, when another one stops: before it comes ("call"),
    when tensors are exchanged ("exchange"), or before its backward ("backward").
    """

    def stop(*_: object, **__: object) -> None:
        if how == "killed":
            os._exit(1)
        time.sleep(20 * TIMEOUT)

    call, x = CALLS[name](group)
    together(group)
    wrong = dist.get_rank(group) == WRONG
    if wrong and when == "call":
        stop()
    if wrong and when == "exchange":
        for exchange in ("all_gather", "all_to_all", "pass_on"):
            setattr(comm.Ranks, exchange, stop)
    start = time.monotonic()

    def run() -> None:
        y = call()
        if wrong and when == "backward":
            stop()
        y.sum().backward()

    kind, words = told(run)
    return kind, words, time.monotonic() - start, x.grad is not None


WHEN = ("call", "exchange", "backward")


@pytest.mark.parametrize(
    "name, when, how",
    [
        *((name, when, "killed") for name in CALLS for when in WHEN),
        *(("lasp", when, "hung") for when in WHEN),
    ],
)
def test_a_rank_is_gone(doomed: Pool, name: str, when: str, how: str) -> None:
    """Every survivor raises RankError in the group's timeout, with no gradient of anything; if the rank did not come, its number
    is told.
    """
    answers = doomed.outcomes(gone, name, when, how, size=SIZE, lost=[WRONG])
    for rank, (ok, what) in enumerate(answers):
        if rank == WRONG:
            continue
        assert ok, what
        kind, words, seconds, differentiated = what
        assert kind == "RankError" and words.startswith(name), words
        assert seconds < 2 * TIMEOUT and not differentiated
        if when != "exchange":  # whose failure is told in the words of the backend
            assert f"rank {WRONG}" in words, words


# ---- the agreement itself --------------------------------------------------------------------------------------------


def on_an_accelerator(group: dist.ProcessGroup) -> list[int]:
    """How many agreements calls on a GPU take."""
    device, found = torch.device("cuda"), []

    def agree(**facts: object) -> None:
        with comm.call("f", group) as ranks:
            ranks.agree(facts, device)
        found.append(comm._group(group).calls)

    before = comm._group(group).calls
    comm._group(group).joined = True  # there is no GPU to join them on
    for x in (1, 1, 2, 1, 2):
        agree(x=x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_ATTN_CHECK", "1")
        agree(x=1)
    return [n - before for n in found]


def test_agreement_costs_a_gpu_nothing() -> None:
    """Arguments are compared when they come for the first time, and always with LIGHTNING_ATTN_CHECK=1."""
    assert run_ranks(SIZE, on_an_accelerator) == [[1, 1, 2, 2, 2, 3]] * SIZE


def many(group: dist.ProcessGroup) -> int:
    store = comm._group(group).store
    with comm.call("f", group) as ranks:
        ranks.agree({}, torch.device("cpu"))
    dist.barrier(group)
    before = store.num_keys()
    dist.barrier(group)
    for n in range(300):
        with comm.call("f", group) as ranks:
            ranks.agree({"n": n}, torch.device("cpu"))
    dist.barrier(group)
    more = store.num_keys() - before
    dist.barrier(group)
    return more


def test_store_does_not_grow() -> None:
    """Row 26: what was told is forgotten."""
    assert max(run_ranks(SIZE, many)) <= 4 * SIZE


def test_without_a_group() -> None:
    q = torch.ones(1, 4, 2, 4)
    with pytest.raises(ValueError, match="^lasp: expected torch.distributed to be initialised"):
        lasp(q, q, q, torch.ones(2), cu_seqlens=None, cuts=[0, 4])
    assert issubclass(RankError, RuntimeError)


def not_mine(group: dist.ProcessGroup) -> list[tuple[str, str]]:
    """The group of rank 0 alone, and what is no group."""
    first = dist.new_group([0])
    q = torch.ones(1, 4, 2, 4)
    others: list[object] = [] if dist.get_rank() == 0 else [first]
    call = functools.partial(lasp, q, q, q, torch.ones(2), cu_seqlens=None, cuts=[0, 4])
    return [told(functools.partial(call, group=g)) for g in [*others, "world"]]


def test_groups_that_are_none() -> None:
    answers = run_ranks(5, not_mine)  # new_group is a matter of all
    for rank, errors in enumerate(answers):
        assert errors[-1] == ("TypeError", "lasp: expected group to be a ProcessGroup, got str")
        if rank:
            assert errors[0][0] in ("ValueError", "TypeError")
