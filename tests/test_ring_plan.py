"""The plan of varlen ring attention: every visible pair once, what travels, and where."""

import itertools
from collections import Counter

import pytest

from lightning_attn.distributed import ring_plan
from lightning_attn.distributed.ring_plan import (
    Layout,
    Plan,
    Ranges,
    contiguous,
    length,
    offset,
    union,
    within,
    zigzag,
)


def positions(ranges: Ranges) -> list[int]:
    return [t for begin, end in ranges for t in range(begin, end)]


def computed(plan: Plan) -> Counter[tuple[int, int]]:
    """The (query, key) pairs of all blocks of all ranks."""
    pairs: Counter[tuple[int, int]] = Counter()
    for r, j in itertools.product(range(plan.size), repeat=2):
        queries, keys = positions(plan.queries[r]), positions(plan.keys[j])
        for block in plan.blocks(r, j):
            assert block.n > 0 and block.m > 0 and (block.n == block.m or not block.causal)
            for c in range(block.times):
                for i in range(block.n):
                    for m in range(i + 1 if block.causal else block.m):
                        pairs[queries[block.q + c * block.n + i], keys[block.k + c * block.m + m]] += 1
    return pairs


def visible(plan: Plan) -> Counter[tuple[int, int]]:
    queries, keys = (sorted(t for ranges in x for t in positions(ranges)) for x in (plan.queries, plan.keys))
    document = {t: d for d, (a, b) in enumerate(itertools.pairwise(plan.offsets)) for t in range(a, b)}
    return Counter((t, s) for t in queries for s in keys if s <= t and document[s] == document[t])


def check(queries: Layout, keys: Layout, offsets: tuple[int, ...]) -> None:
    plan = Plan(queries, keys, offsets)
    pairs = computed(plan)
    assert pairs == visible(plan)
    owners = {t: j for j in range(plan.size) for t in positions(keys[j])}
    seen = {(r, s) for r in range(plan.size) for t, s in pairs if t in set(positions(queries[r]))}
    for j, r in itertools.product(range(plan.size), repeat=2):
        rows = positions(plan.keys[j])
        needed = {rows[i] for i in positions(plan.needs[j][r])}
        assert needed == {s for rank, s in seen if rank == r and owners[s] == j}  # and no key more
        for block in plan.blocks(r, j):  # keys of a block lie together in what comes
            end = block.k + block.times * block.m
            assert any(a <= block.k and end <= b for a, b in plan.needs[j][r])
    for j in range(plan.size):
        needs = [set(positions(plan.needs[j][(j + h) % plan.size])) for h in range(plan.size)]
        for h in range(1, plan.hops[j] + 1):
            assert set(positions(plan.travels(j, h))) == set().union(*needs[h : plan.hops[j] + 1])
            assert set(positions(plan.carried(j, h))) == set().union(*needs[1 : h + 1])
        assert not any(needs[plan.hops[j] + 1 :]) and plan.travels(j, plan.hops[j] + 1) == ()
        assert plan.hops[j] == 0 or needs[plan.hops[j]]


def sequences(total: int, count: int) -> list[tuple[int, ...]]:
    """All of `count` + 1 numbers from 0 to total that do not decrease."""
    inner = itertools.combinations_with_replacement(range(total + 1), count - 1)
    return [(0, *numbers, total) for numbers in inner]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_visible_pair_once(ranks: int) -> None:
    """All packings of 5 tokens in 3 documents, empty ones among them, under all cuts."""
    for offsets in sequences(5, 3):
        for cuts in sequences(5, ranks):
            layout = contiguous(cuts)
            check(layout, layout, offsets)


@pytest.mark.parametrize("total, ranks", [(6, 1), (5, 2), (3, 3)])
def test_every_visible_pair_once_in_zigzag(total: int, ranks: int) -> None:
    for offsets in sequences(total, 2):
        for cuts in sequences(total, 2 * ranks):
            layout = zigzag(cuts)
            check(layout, layout, offsets)


def test_every_visible_pair_once_in_any_layout() -> None:
    """Each of 5 tokens on one of 2 ranks or on none, queries and keys each in their own way."""
    owners = list(itertools.product(range(3), repeat=5))
    layouts = [tuple(union([(t, t + 1) for t in range(5) if of[t] == r]) for r in range(2)) for of in owners]
    for i, queries in enumerate(layouts):
        for keys in layouts[i % 7 :: 7]:
            check(queries, keys, (0, 2, 5))


def test_layouts() -> None:
    assert contiguous([0, 3, 3, 7]) == (((0, 3),), (), ((3, 7),))
    assert zigzag([0, 1, 2, 3, 5]) == (((0, 1), (3, 5)), ((1, 3),))
    assert zigzag([0, 2, 4]) == (((0, 4),),)


def test_ranges() -> None:
    assert union([(5, 7), (3, 3)], [(0, 2), (2, 4)], [(6, 9)]) == ((0, 4), (5, 9))
    assert length(((0, 4), (5, 9))) == 8
    assert [offset(((2, 4), (6, 9)), x) for x in (0, 2, 3, 5, 6, 8, 9)] == [0, 0, 1, 2, 2, 4, 5]
    assert within(((2, 4), (6, 9)), ((3, 4), (6, 7), (8, 9))) == ((1, 3), (4, 5))


def test_equal_documents_are_one_block() -> None:
    plan = Plan(contiguous([0, 12]), contiguous([0, 12]), (0, 3, 3, 6, 9, 10, 12))
    assert [(block.n, block.times) for block in plan.blocks(0, 0)] == [(3, 3), (1, 1), (2, 1)]


def test_nothing_travels_between_documents() -> None:
    """Cuts on document starts: no step."""
    layout = contiguous([0, 4, 8, 12])
    plan = Plan(layout, layout, (0, 4, 6, 8, 12))
    assert plan.steps == 0
    for rank, method in itertools.product(range(3), ("ring", "all_gather")):
        assert plan.received(rank, method, width=8, itemsize=4, grad_itemsize=4) == (0, 0)


def test_only_the_last_fragment_travels_and_only_as_far_as_it_is_seen() -> None:
    layout = contiguous([0, 10, 20, 30, 40])
    plan = Plan(layout, layout, (0, 7, 25, 40))
    assert plan.hops == [2, 1, 1, 0]
    assert plan.travels(0, 1) == plan.travels(0, 2) == ((7, 10),)
    assert plan.travels(2, 1) == ((5, 10),)
    # Rank 2: from 1 in one hop and from 0 in two; its own gradients come home, those of 0 pass by.
    found = plan.received(2, "ring", width=3, itemsize=2, grad_itemsize=4)
    assert found == ((10 + 3) * 3 * 2, (10 + 3) * 3 * 2 + (3 + 5) * 3 * 4)
    found = plan.received(2, "all_gather", width=3, itemsize=2, grad_itemsize=4)
    assert found == ((10 + 3) * 3 * 2, (10 + 3) * 3 * 2 + 5 * 3 * 4)


def test_one_document_of_a_million() -> None:
    """R = 8: in a ring each rank but the first r hands on r pieces; the last receives T - T / 8 rows."""
    total, ranks = 2**20, 8
    layout = contiguous([total // ranks * r for r in range(ranks + 1)])
    plan = Plan(layout, layout, (0, total))
    rows = [plan.received(r, "ring", width=1, itemsize=1, grad_itemsize=1).forward for r in range(ranks)]
    assert rows == [total // ranks * r for r in range(ranks)]


def test_plans_are_shared() -> None:
    layout = contiguous([0, 2, 4])
    assert ring_plan.plan(layout, layout, (0, 4)) is ring_plan.plan(contiguous((0, 2, 4)), layout, (0, 4))
