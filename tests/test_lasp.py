"""LASP+ over gloo ranks against one process, on every rank: random packings and cuts, dtypes, bytes, bits, and its order."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from ranks_support import Received, run_ranks
from support import (
    BACKENDS,
    HALF,
    HEAD_DIM,
    ON_CPU,
    Inputs,
    Result,
    assert_same_bits,
    baseline,
    check,
    differentiate,
    dtype_id,
    error,
    make_inputs,
    poisoned_memory,
    truth,
)
from torch import Tensor

from lightning_attn import lightning_attention
from lightning_attn.distributed import lasp
from lightning_attn.distributed.comm import Pending, Ranks
from lightning_attn.distributed.lasp_plan import even_cuts, lasp_bytes

SIZES = (2, 3, 4, 5)
CASES = 90  # of each number of ranks
# Slow ones, so that what came long ago matters; one that nothing survives.
RATES = ((0.01, 0.0), (0.3, 1e-4), (0.05, 2.0), (1e4, 0.02))
LENGTHS = (0, 1, 2, 3, 7, 23, 64, 97, 150)


def packing(choose: random.Random) -> tuple[int, ...]:
    """Lengths of the documents, some of which may be empty."""
    T = choose.choice(LENGTHS)
    places = [0, T, *(choose.randint(0, T) for _ in range(4))]
    bounds = sorted([0, *(choose.choice(places) for _ in range(choose.choice((0, 0, 1, 2, 5)))), T])
    return tuple(b - a for a, b in pairwise(bounds))


def cutting(choose: random.Random, lengths: Sequence[int], R: int) -> list[int]:
    """R + 1 cuts: even, on starts of documents, anywhere, or with empty shards."""
    T = sum(lengths)
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    places = choose.choice((None, starts, range(T + 1), (0, T // 2, T)))
    return (
        even_cuts(T, R) if places is None else sorted([0, *(choose.choice(places) for _ in range(R - 1)), T])
    )


def across(group: dist.ProcessGroup, x: Inputs, cuts: list[int], backend: str) -> Result:
    """This rank's part of the outputs and gradients; of the states, all rows."""
    rank = dist.get_rank(group)
    mine = slice(cuts[rank], cuts[rank + 1])
    parts = {n: t[:, mine] for n, t in vars(x).items() if n in ("q", "k", "v", "do")}
    part = Inputs(**{**vars(x), **parts})
    return differentiate(
        functools.partial(lasp, cuts=cuts, group=group, return_state=True, backend=backend), part
    )


def own(name: str, whole: Tensor, x: Inputs, cuts: Sequence[int], rank: int) -> Tensor:
    """What a rank should have of a result of one process."""
    if name not in ("state", "dinitial_state"):
        return whole[:, cuts[rank] : cuts[rank + 1]]
    assert x.cu_seqlens is not None
    rows = torch.zeros_like(whole)
    for n, (s, e) in enumerate(pairwise(x.cu_seqlens.tolist())):
        token = e - 1 if name == "state" and e > s else s
        holders = [r for r, (a, b) in enumerate(pairwise(cuts)) if a <= token < b]
        if rank == (holders or [len(cuts) - 2])[0]:
            rows[n] = whole[n]
    return rows


def random_cases(R: int, dtype: torch.dtype) -> Iterator[tuple[Inputs, list[int], str]]:
    """(inputs, cuts, what they are), the same on all ranks."""
    choose = random.Random(R)
    for case in range(CASES):
        lengths, rates, states = packing(choose), choose.choice(RATES), case % 3 > 0
        cuts = cutting(choose, lengths, R)
        x = make_inputs(H=2, K=5, V=6, dtype=dtype, lengths=lengths, rates=rates, state=states, seed=case)
        yield x, cuts, f"{lengths=} {cuts=} {rates=}"


def compare(group: dist.ProcessGroup, backend: str) -> tuple[float, str]:
    """The largest distance of this rank's outputs and gradients from those of one process, over random cases."""
    R, rank, worst = dist.get_world_size(group), dist.get_rank(group), (0.0, "")
    one_process = functools.partial(lightning_attention, return_state=True, backend="reference")
    for x, cuts, what in random_cases(R, torch.float64):
        one = differentiate(one_process, x)
        for name, found in across(group, x, cuts, backend).items():
            want = own(name, one[name], x, cuts, rank)
            assert found.shape == want.shape and found.isfinite().all(), name
            if want.numel():
                away = ((found - want).abs().max() / one[name].abs().max().clamp(min=1e-30)).item()
                worst = max(worst, (away, f"{name} of {what}"))
    return worst


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("size", SIZES)
def test_random_packings(size: int, backend: str) -> None:
    """Row 27: float64, every output and gradient on every rank; 360 packings and cuts on each backend."""
    for away, where in run_ranks(size, compare, backend):
        assert away < 1e-12, where


def results(group: dist.ProcessGroup) -> list[Result]:
    return [
        across(group, x, cuts, "cpu")
        for x, cuts, _ in random_cases(dist.get_world_size(group), torch.float32)
    ]


@pytest.mark.parametrize("size", SIZES)
def test_random_packings_in_float32(size: int) -> None:
    """The same packings and cuts: the largest error over all of them is at most twice that of plain PyTorch, plus epsilon."""
    ours, plain = ({name: 0.0 for name in HEAD_DIM} for _ in range(2))
    for (x, _, what), *parts in zip(
        random_cases(size, torch.float32), *run_ranks(size, results), strict=True
    ):
        if not x.q.shape[1]:  # which plain PyTorch cannot differentiate
            continue
        expected, usual, found = truth(x), baseline(x), whole(parts)
        assert found.keys() == expected.keys(), what
        for name, y in found.items():
            assert y.dtype == torch.float32 and y.shape == expected[name].shape, what
            ours[name] = max(ours[name], error(y, expected[name], HEAD_DIM[name]))
            plain[name] = max(plain[name], error(usual[name], expected[name], HEAD_DIM[name]))
    for name, largest in ours.items():
        assert largest <= 2 * plain[name] + torch.finfo(torch.float32).eps, name


# ---- the suite's rule ---------------------------------------------------------------------------------------------

CUTS = [0, 300, 300, 1100, 1500]
PACKED = (250, 0, 900, 50, 300)


def whole(parts: Sequence[Result]) -> Result:
    """The results of all ranks as one: tokens one after the other, states summed."""
    return {
        name: sum((p[name] for p in parts[1:]), parts[0][name])
        if name in ("state", "dinitial_state")
        else torch.cat([p[name] for p in parts], 1)
        for name in parts[0]
    }


def poisoned(group: dist.ProcessGroup, x: Inputs, cuts: list[int], backend: str) -> Result:
    with poisoned_memory():
        return across(group, x, cuts, backend)


@pytest.mark.parametrize("rates", [(0.02, 0.0, 1.5), (1e-4, 0.3, 40.0)], ids=["slow", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
def test_dtypes(dtype: torch.dtype, rates: tuple[float, ...]) -> None:
    """The rule of the suite, with memory that is full of NaN."""
    x = make_inputs(H=3, K=32, V=48, dtype=dtype, lengths=PACKED, rates=rates)
    check(whole(run_ranks(4, poisoned, x, CUTS, "cpu")), x)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "triton"])
def test_triton(backend: str) -> None:
    """In the interpreter."""
    x = make_inputs(H=2, K=16, V=16, lengths=(20, 130, 10), rates=(0.02, 0.5))
    check(whole(run_ranks(3, across, x, [0, 50, 90, 160], backend)), x)


def test_one_long_document() -> None:
    """Heads whose history ends long before the shard does, and some whose does not; the truth is one process in float64."""
    x = make_inputs(H=4, K=16, V=16, lengths=(9000,), rates=(0.9, 0.05, 0.004, 1e-6), state=False)
    check(whole(run_ranks(3, across, x, [0, 2500, 6100, 9000], "cpu")), x)


def only(group: dist.ProcessGroup, x: Inputs, cuts: list[int], name: str) -> dict[str, Tensor]:
    """Gradients through o alone, or through the state alone."""
    rank = dist.get_rank(group)
    q, k, v = (t[:, cuts[rank] : cuts[rank + 1]].clone().requires_grad_() for t in (x.q, x.k, x.v))
    out = lasp(q, k, v, x.decay, cu_seqlens=x.cu_seqlens, cuts=cuts, group=group, return_state=True)
    leaf, grad = (out[0], x.do[:, cuts[rank] : cuts[rank + 1]]) if name == "o" else (out[1], x.dstate)
    found = torch.autograd.grad(leaf, (q, k, v), grad, retain_graph=True)
    again = torch.autograd.grad(leaf, (q, k, v), grad)
    for a, b in zip(found, again, strict=True):
        assert_same_bits(a, b)
    return dict(zip(("dq", "dk", "dv"), found, strict=True))


@pytest.mark.parametrize("name", ["o", "state"])
def test_one_output_used(name: str) -> None:
    """Row 19, and that a retained graph gives the same bits again."""
    x = make_inputs(H=2, dtype=torch.float64, lengths=(40, 30), state=False, scale=1.0)
    found = whole(run_ranks(3, only, x, [0, 20, 55, 70], name))
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
    o, state = lightning_attention(
        *leaves, x.decay, cu_seqlens=x.cu_seqlens, return_state=True, backend="reference"
    )
    truths = torch.autograd.grad(*((o, leaves, x.do) if name == "o" else (state, leaves, x.dstate)))
    for got, want in zip(found.values(), truths, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


# ---- documents know nothing of each other ----------------------------------------------------------------------------


def spoiled(
    group: dist.ProcessGroup, x: Inputs, cuts: list[int], document: int, value: float, backend: str
) -> Result:
    """The results with everything of one document replaced."""
    assert x.cu_seqlens is not None
    s, e = x.cu_seqlens[document], x.cu_seqlens[document + 1]
    other = {n: t.clone() for n, t in vars(x).items() if isinstance(t, Tensor)}
    for n in ("q", "k", "v", "do"):
        other[n][:, s:e] = value
    for n in ("initial_state", "dstate"):
        other[n][document] = value
    return across(group, Inputs(**{**vars(x), **other}), cuts, backend)


@pytest.mark.parametrize("value", [3.0, float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_no_leak(dtype: torch.dtype, backend: str, value: float) -> None:
    """Row 27: not one bit of a document changes when another one does, on whatever ranks they lie."""
    lengths, cuts = (70, 100, 40, 90), [0, 60, 100, 230, 300]
    x = make_inputs(H=2, K=8, V=8, dtype=dtype, lengths=lengths, rates=(0.001, 0.1))
    before = whole(run_ranks(4, across, x, cuts, backend))
    for document in (0, 1, 2):
        after = whole(run_ranks(4, spoiled, x, cuts, document, value, backend))
        s = sum(lengths[:document])
        for name, y in after.items():
            keep = [n for n in range(len(lengths)) if n != document]
            if name not in ("state", "dinitial_state"):
                keep = [t for t in range(sum(lengths)) if not s <= t < s + lengths[document]]
                assert_same_bits(y[:, keep], before[name][:, keep], name)
            else:
                assert_same_bits(y[keep], before[name][keep], name)


# ---- traffic, and its order ------------------------------------------------------------------------------------------


def traffic(group: dist.ProcessGroup, x: Inputs, cuts: list[int]) -> tuple[dict[str, int], dict[str, int]]:
    rank = dist.get_rank(group)
    q, k, v = (t[:, cuts[rank] : cuts[rank + 1]].clone().requires_grad_() for t in (x.q, x.k, x.v))
    with Received(group) as forward:
        o = lasp(q, k, v, x.decay, cu_seqlens=x.cu_seqlens, cuts=cuts, group=group)
    assert isinstance(o, Tensor)
    with Received(group) as backward:
        o.sum().backward()
    return forward.bytes, backward.bytes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_bytes(size: int, dtype: torch.dtype) -> None:
    """One all-gather of states each way and nothing else, whatever the length."""
    itemsize = 8 if dtype == torch.float64 else 4
    for lengths in ((40, 60), (1000, 0, 500)):
        x = make_inputs(H=3, K=8, V=12, dtype=dtype, lengths=lengths, state=False)
        want = lasp_bytes(size, heads=3, key_dim=8, value_dim=12, itemsize=itemsize)
        assert want == (size - 1) * 3 * 8 * 12 * itemsize
        for each_way in run_ranks(size, traffic, x, even_cuts(sum(lengths), size)):
            for found in each_way:
                assert found == ({"_allgather_base_": want} if size > 1 else {})


def order(group: dist.ProcessGroup, x: Inputs, cuts: list[int]) -> list[str]:
    """In which order things begin and end."""
    from lightning_attn import ops

    said: list[str] = []
    mine = slice(cuts[dist.get_rank(group)], cuts[dist.get_rank(group) + 1])
    with pytest.MonkeyPatch.context() as patch:
        spied = [
            (ops, "attention_forward"),
            (ops, "attention_backward"),
            (Ranks, "all_gather"),
            (Pending, "wait"),
        ]
        for owner, name in spied:
            right = getattr(owner, name)

            def spy(*args: object, name: str = name, right: object = right) -> object:
                said.append(name)
                return right(*args)  # type: ignore[operator]

            patch.setattr(owner, name, spy)
        q, k, v = (t[:, mine].clone().requires_grad_() for t in (x.q, x.k, x.v))
        o = lasp(q, k, v, x.decay, cu_seqlens=x.cu_seqlens, cuts=cuts, group=group)
        assert isinstance(o, Tensor)
        o.sum().backward()
    return said


def test_overlap() -> None:
    """The states are under way while the rank's own tokens are computed, in both directions."""
    x = make_inputs(H=2, lengths=(100,), state=False)
    for said in run_ranks(3, order, x, [0, 30, 60, 100]):
        assert said == ["all_gather", "attention_forward", "wait", "all_gather", "attention_backward", "wait"]


def beyond_float16(group: dist.ProcessGroup) -> Tensor:
    """o of this rank: what came before brings its own part, 70,000, back into the range."""
    v = torch.full((1, 2, 1, 1), (-20000.0, 35000.0)[dist.get_rank(group)], dtype=torch.float16)
    one = torch.ones_like(v)
    o = lasp(one, one, v, torch.zeros(1), cu_seqlens=None, cuts=[0, 2, 4], group=group)
    assert isinstance(o, Tensor)
    return o.flatten()


def test_parts_beyond_float16() -> None:
    """Nothing overflows that does not in one process."""
    first, second = run_ranks(2, beyond_float16)
    assert first.tolist() == [-20000, -40000]
    assert second.tolist() == [-4992, 30016]  # -5000 and 30000, as float16 has them


def test_repeatable() -> None:
    """Two runs give the same bits."""
    x = make_inputs(H=3, K=32, V=48, lengths=PACKED)
    first, second = (whole(run_ranks(4, across, x, CUTS, "cpu")) for _ in range(2))
    for name, y in first.items():
        assert_same_bits(y, second[name], name)


def test_truth_of_these_tests() -> None:
    """What float64 results are compared with here agrees with the recurrence."""
    x = make_inputs(H=2, K=5, V=6, dtype=torch.float64, lengths=(60, 0, 40), rates=RATES[0])
    one = differentiate(functools.partial(lightning_attention, return_state=True, backend="reference"), x)
    for name, y in truth(x).items():
        torch.testing.assert_close(one[name], y, rtol=0, atol=1e-12)
    assert baseline(x).keys() == one.keys()
