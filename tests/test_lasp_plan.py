"""The plan of LASP+, against what its words say, token by token."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import pytest

from lightning_attn.distributed.lasp_plan import even_cuts, shard


def sequences(T: int, inner: int) -> list[tuple[int, ...]]:
    """All sequences from 0 to T that do not decrease, with so many entries between."""
    return [(0, *middle, T) for middle in combinations_with_replacement(range(T + 1), inner)]


@pytest.mark.parametrize("T", [0, 1, 3, 5])
@pytest.mark.parametrize("documents", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_small_case(T: int, documents: int, ranks: int) -> None:
    """Tokens lie in the fragments of their documents; each document starts once and ends once; the sums S and G reach the
    tokens of the crossing document on the other ranks, at their distances.
    """
    for cu_seqlens in sequences(T, documents - 1):
        for cuts in sequences(T, ranks - 1):
            plans = [shard(cu_seqlens, cuts, r) for r in range(ranks)]
            owner = {t: n for n, (s, e) in enumerate(pairwise(cu_seqlens)) for t in range(s, e)}
            starts, ends = [], []
            for r, plan in enumerate(plans):
                begin, end = cuts[r], cuts[r + 1]
                found = {begin + t: f.document for f in plan.fragments for t in range(f.begin, f.end)}
                assert found == {t: owner[t] for t in range(begin, end)}
                assert plan.offsets == [0, *(f.end for f in plan.fragments)]
                assert all(f.begin == p for f, p in zip(plan.fragments, plan.offsets, strict=False))
                starts += [f.document for f in plan.fragments if f.starts]
                ends += [f.document for f in plan.fragments if f.ends]
                before = [
                    t for t in range(begin) if begin in owner and owner[t] == owner[begin] and begin < end
                ]
                holders = [j for j in range(ranks) if any(cuts[j] <= t < cuts[j + 1] for t in before)]
                assert plan.entering == tuple((j, begin - cuts[j + 1]) for j in holders)
                last = end - 1
                after = [t for t in range(end, T) if begin < end and owner[t] == owner[last]]
                holders = [j for j in range(ranks) if any(cuts[j] <= t < cuts[j + 1] for t in after)]
                assert plan.leaving == tuple((j, cuts[j] - end) for j in holders)
            assert sorted(starts) == sorted(ends) == list(range(documents))


def test_even_cuts() -> None:
    assert even_cuts(10, 4) == [0, 3, 6, 8, 10]
    assert even_cuts(2, 3) == [0, 1, 2, 2]
    assert even_cuts(0, 2) == [0, 0, 0]
