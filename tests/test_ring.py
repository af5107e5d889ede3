"""Varlen ring attention on gloo ranks against plain softmax attention of each document in one process."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks_support import Received, run_ranks
from support import Result, assert_close_to_truth, assert_same_bits, error
from torch import Tensor

from lightning_attn.distributed import RankError, ring_plan, softmax
from lightning_attn.distributed.ring import ring_attention, ring_attention_layout
from lightning_attn.distributed.ring_plan import Layout

METHODS = ("ring", "all_gather")


@dataclass(frozen=True)
class Case:
    """A packing and where it lies."""

    offsets: tuple[int, ...]
    cuts: tuple[int, ...] = ()
    zigzag: bool = False
    method: str = "ring"
    heads: int = 2
    groups: int = 1
    D: int = 4
    D_v: int = 4
    scale: float | None = None
    dtype: torch.dtype = torch.float64
    queries: Layout | None = None  # instead of cuts
    keys: Layout | None = None
    seed: int = 0

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        if self.queries is not None and self.keys is not None:
            return self.queries, self.keys
        layout = (ring_plan.zigzag if self.zigzag else ring_plan.contiguous)(self.cuts)
        return layout, layout


def inputs(case: Case) -> dict[str, Tensor]:
    """q, k, v and the gradient of o for the whole sequence."""
    generator = torch.Generator().manual_seed(case.seed)
    T, H, G = case.offsets[-1], case.heads, case.groups
    shapes = {"q": (T, H, case.D), "k": (T, G, case.D), "v": (T, G, case.D_v), "do": (T, H, case.D_v)}
    return {
        name: torch.randn(1, *shape, generator=generator, dtype=torch.float64).to(case.dtype)
        for name, shape in shapes.items()
    }


def take(x: Tensor, ranges: ring_plan.Ranges) -> Tensor:
    return torch.cat([x[:, :0], *(x[:, begin:end] for begin, end in ranges)], 1)


def plain(case: Case, x: dict[str, Tensor]) -> Result:
    """Softmax attention, document by document, of the queries and keys that the layouts have."""
    queries, keys = (torch.zeros(case.offsets[-1], dtype=torch.bool) for _ in range(2))
    for held, layout in zip((queries, keys), case.layouts, strict=True):
        for begin, end in itertools.chain(*layout):
            held[begin:end] = True
    leaves = {name: x[name].detach().requires_grad_() for name in ("q", "k", "v")}
    q, k, v = (y[0].transpose(0, 1) for y in leaves.values())
    M = case.heads // case.groups
    k, v = k.repeat_interleave(M, 0), v.repeat_interleave(M, 0)
    scale = case.D**-0.5 if case.scale is None else case.scale
    parts = []
    for a, b in itertools.pairwise(case.offsets):
        seen = torch.ones(b - a, b - a, dtype=torch.bool).tril() & keys[a:b]
        blind = ~seen.any(-1, keepdim=True)
        scores = (q[:, a:b] @ k[:, a:b].mT * scale).masked_fill(~(seen | blind), -math.inf)
        o = (scores.softmax(-1) @ v[:, a:b]).masked_fill(blind | ~queries[a:b, None], 0)
        parts.append(o.transpose(0, 1))
    o = torch.cat([x["do"][0, :0], *parts])[None]
    grads = torch.autograd.grad(o, list(leaves.values()), x["do"], allow_unused=True)
    return {"o": o.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True) if g is not None}}


def call(group: dist.ProcessGroup, case: Case, leaves: dict[str, Tensor]) -> Tensor:
    cu_seqlens = torch.tensor(case.offsets, dtype=(torch.int32, torch.int64)[case.seed % 2])
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    common: dict[str, Any] = {"group": group, "scale": case.scale, "method": case.method}
    if case.queries is not None:
        return ring_attention_layout(
            q, k, v, cu_seqlens=cu_seqlens, queries=case.queries, keys=case.keys or (), **common
        )
    one = len(case.offsets) == 2 and case.seed % 2
    return ring_attention(
        q, k, v, cu_seqlens=None if one else cu_seqlens, cuts=list(case.cuts), zigzag=case.zigzag, **common
    )


def ring(group: dist.ProcessGroup, case: Case, x: dict[str, Tensor]) -> Result:
    """This rank's output and gradients; what it received is what the formulas say."""
    rank, (queries, keys) = dist.get_rank(group), case.layouts
    leaves = {n: take(x[n], (queries if n == "q" else keys)[rank]).requires_grad_() for n in ("q", "k", "v")}
    with Received(group) as forward:
        o = call(group, case, leaves)
    with Received(group) as backward:
        grads = torch.autograd.grad(o, list(leaves.values()), take(x["do"], queries[rank]))
    expected = ring_plan.plan(queries, keys, case.offsets).received(
        rank,
        case.method,
        width=case.groups * (case.D + case.D_v),
        itemsize=case.dtype.itemsize,
        grad_itemsize=8 if case.dtype == torch.float64 else 4,
    )
    assert (forward.total, backward.total) == expected, case
    return {"o": o.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def share(case: Case, rank: int, whole: Result) -> Result:
    queries, keys = case.layouts
    return {n: take(x, (queries if n in ("o", "dq") else keys)[rank]) for n, x in whole.items()}


# ---- float64 -------------------------------------------------------------------------------------------------------


def random_case(seed: int, ranks: int) -> Case:
    choose = random.Random(seed)
    T = choose.choice([0, 1, 7, 23, 40, 64])
    kind = choose.randrange(4)
    inner = [choose.randint(0, T) for _ in range(choose.randrange(8))]
    if kind == 0:  # equal documents
        inner = list(range(0, T, choose.randint(1, 9)))
    offsets = tuple(sorted([0, *inner, T]))
    zigzag = choose.random() < 0.5
    pieces = 2 * ranks if zigzag else ranks
    starts = offsets if choose.random() < 0.3 else range(T + 1)
    cuts = tuple(sorted([0, *(choose.choice(starts) for _ in range(pieces - 1)), T]))
    if choose.random() < 0.3:  # even pieces
        cuts = tuple(T * i // pieces for i in range(pieces + 1))
    groups = choose.choice([1, 2])
    D = choose.randint(1, 6)
    return Case(
        offsets=(0, T) if kind == 1 else offsets,
        cuts=cuts,
        zigzag=zigzag,
        method=choose.choice(METHODS),
        heads=groups * choose.randint(1, 4),
        groups=groups,
        D=D,
        D_v=choose.choice([D, choose.randint(1, 6)]),
        scale=choose.choice([None, None, 0.9, -1.3, 0.0]),
        seed=seed,
    )


def random_layout_case(seed: int, ranks: int) -> Case:
    """Chunked prefill: the keys of a chunk are cut among the ranks anew with every chunk."""
    choose = random.Random(seed)
    T, chunks = choose.choice([11, 40, 64]), choose.randint(1, 4)
    bounds = sorted([0, *(choose.randint(0, T) for _ in range(chunks))])
    keys: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for begin, end in itertools.pairwise(bounds):
        cuts = sorted([begin, *(choose.randint(begin, end) for _ in range(ranks - 1)), end])
        pieces = list(itertools.pairwise(cuts))
        for rank, piece in zip(choose.sample(range(ranks), ranks), pieces, strict=True):
            keys[rank].append(piece)
    begin, end = bounds[-2:]
    if choose.random() < 0.3:  # queries of several chunks, some without keys
        begin, end = choose.randint(0, begin), T
    cuts = sorted([begin, *(choose.randint(begin, end) for _ in range(ranks - 1)), end])
    queries = tuple((piece,) for piece in itertools.pairwise(cuts))
    return replace(
        random_case(seed, ranks),
        offsets=tuple(sorted([0, *(choose.randint(0, T) for _ in range(choose.randrange(4))), T])),
        queries=tuple(ring_plan.union(ranges) for ranges in queries),
        keys=tuple(ring_plan.union(ranges) for ranges in keys),
    )


def against_one_process(group: dist.ProcessGroup, seeds: range, make: Callable[[int, int], Case]) -> float:
    worst = 0.0
    for seed in seeds:
        case = make(seed, dist.get_world_size(group))
        x = inputs(case)
        whole = plain(case, x)
        expected, found = share(case, dist.get_rank(group), whole), ring(group, case, x)
        for name, y in found.items():
            # By the largest of the whole truth: of a shard's, which may be tiny, rounding is no small part.
            largest = whole[name].abs().max().item() if whole[name].numel() else 0.0
            difference = (y - expected[name]).abs().max().item() if y.numel() else 0.0
            assert y.shape == expected[name].shape and y.dtype == torch.float64
            assert difference <= 1e-12 * (largest or 1.0), (name, difference, largest, case)
            worst = max(worst, difference / (largest or 1.0))
    return worst


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_against_one_process(ranks: int) -> None:
    """90 random packings and cuts: outputs, every gradient and the bytes received, on every rank."""
    run_ranks(ranks, against_one_process, range(1000 * ranks, 1000 * ranks + 90), random_case)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_chunked_prefill(ranks: int) -> None:
    """Queries and keys in different layouts, 40 random ones."""
    run_ranks(ranks, against_one_process, range(1000 * ranks, 1000 * ranks + 40), random_layout_case)


def sdpa(case: Case, x: dict[str, Tensor]) -> Result:
    """PyTorch's scaled_dot_product_attention, document by document, and its gradients."""
    leaves = {name: x[name].detach().requires_grad_() for name in ("q", "k", "v")}
    q, k, v = (y.transpose(1, 2) for y in leaves.values())
    parts = [x["do"][:, :0]]
    for a, b in itertools.pairwise(case.offsets):
        here = (y[:, :, a:b] for y in (q, k, v))
        o = F.scaled_dot_product_attention(*here, is_causal=True, scale=case.scale, enable_gqa=True)
        parts.append(o.transpose(1, 2))
    o = torch.cat(parts, 1)
    grads = torch.autograd.grad(o, list(leaves.values()), x["do"])
    return {"o": o.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def errors_in_float32(group: dist.ProcessGroup, seeds: range) -> dict[str, tuple[float, float]]:
    """The largest error over the cases of each of this rank's results, and that of PyTorch's attention in one process."""
    rank, found = dist.get_rank(group), {n: (0.0, 0.0) for n in ("o", "dq", "dk", "dv")}
    for seed in seeds:
        case = replace(random_case(seed, dist.get_world_size(group)), dtype=torch.float32)
        if case.scale is not None and case.scale <= 0:  # of which PyTorch's kernel makes NaN
            case = replace(case, scale=None)
        x = inputs(case)
        if not case.offsets[-1]:
            continue
        truth, usual = plain(case, {n: y.double() for n, y in x.items()}), sdpa(case, x)
        exact, theirs = share(case, rank, truth), share(case, rank, usual)
        for name, y in ring(group, case, x).items():
            assert y.dtype == torch.float32 and y.shape == exact[name].shape, case
            if y.numel():
                largest = truth[name].abs().max().item() or 1.0
                pair = ((z - exact[name]).abs().max().item() / largest for z in (y, theirs[name]))
                found[name] = tuple(map(max, found[name], pair))  # type: ignore[assignment]
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_against_one_process_in_float32(ranks: int) -> None:
    """90 random packings and cuts: the largest error over all is at most twice that of PyTorch's attention, plus epsilon. (Its fused
    kernel, which is in both, is less exact than the plain formula.)
    """
    answers = run_ranks(ranks, errors_in_float32, range(1000 * ranks, 1000 * ranks + 90))
    for name in answers[0]:
        ours, theirs = (max(answer[name][i] for answer in answers) for i in (0, 1))
        assert ours <= 2 * theirs + torch.finfo(torch.float32).eps, name


# ---- other dtypes --------------------------------------------------------------------------------------------------

PACKED = Case((0, 90, 90, 154, 400, 464, 528, 600), (0, 130, 300, 450, 600), heads=4, groups=2, D=16, D_v=16)
CASES = [
    PACKED,
    replace(PACKED, method="all_gather", cuts=(0, 154, 160, 464, 600)),
    replace(PACKED, zigzag=True, cuts=(0, 50, 120, 130, 300, 420, 450, 450, 600), D_v=24),
    replace(
        PACKED, zigzag=True, method="all_gather", offsets=(0, 600), cuts=tuple(range(0, 601, 75)), groups=1
    ),
]


def results(group: dist.ProcessGroup, case: Case) -> Result:
    return ring(group, case, inputs(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("i", range(len(CASES)))
def test_as_exact_as_plain_pytorch(i: int, dtype: torch.dtype) -> None:
    """The suite's rule, for the whole sequence."""
    case = replace(CASES[i], dtype=dtype)
    x = inputs(case)
    truth, baseline = plain(case, {n: y.double() for n, y in x.items()}), plain(case, x)
    found = run_ranks(4, results, case)
    for name in truth:
        expected, rough = (
            torch.cat([share(case, r, w)[name] for r in range(4)], 1) for w in (truth, baseline)
        )
        assert_close_to_truth(torch.cat([part[name] for part in found], 1), expected, rough, name=name)


# ---- what must not change, and what must not be kept ---------------------------------------------------------------

EVERY_WAY = [
    replace(PACKED, method=method, **pieces)
    for method in METHODS
    for pieces in ({}, {"zigzag": True, "cuts": (0, 50, 120, 130, 300, 420, 450, 450, 600), "D_v": 24})
]


def repeated(group: dist.ProcessGroup, case: Case) -> None:
    x = inputs(case)
    first, second = ring(group, case, x), ring(group, case, x)
    for name in first:
        assert_same_bits(second[name], first[name], name)


def one_document_other(group: dist.ProcessGroup, case: Case) -> None:
    """Another document's contents, up to NaN, change no bit of the others'."""
    x, rank = inputs(case), dist.get_rank(group)
    before = ring(group, case, x)
    for a, b in itertools.pairwise(case.offsets):
        for value in (math.nan, math.inf, 3.0):
            changed = {name: y.clone() for name, y in x.items()}
            for y in changed.values():
                y[:, a:b] = value
            after = ring(group, case, changed)
            for name in before:
                layout = case.layouts[0 if name in ("o", "dq") else 1]
                positions = torch.tensor([t for begin, end in layout[rank] for t in range(begin, end)])
                kept = (positions < a) | (positions >= b)
                assert_same_bits(after[name][:, kept], before[name][:, kept], name)


@pytest.mark.parametrize("case", EVERY_WAY, ids=lambda case: f"{case.method}-{case.zigzag}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits(case: Case, dtype: torch.dtype) -> None:
    """Equal calls give equal bits, and a document does not know the others."""
    run_ranks(4, repeated, replace(case, dtype=dtype))
    run_ranks(4, one_document_other, replace(case, dtype=dtype))


def silent(group: dist.ProcessGroup, case: Case) -> None:
    x = inputs(case)
    with Received(group) as received:
        ring(group, case, x)
    assert received.bytes == {}  # nor is anything exchanged that is empty


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_sent_between_documents(method: str) -> None:
    run_ranks(4, silent, replace(PACKED, cuts=(0, 90, 400, 400, 600), method=method))


def kept(group: dist.ProcessGroup) -> None:
    x, rank = inputs(PACKED), dist.get_rank(group)
    share = {name: take(y, PACKED.layouts[0][rank]) for name, y in x.items()}
    assert call(group, PACKED, share).grad_fn is None
    share = {name: y.requires_grad_(name == "k") for name, y in share.items()}
    with torch.no_grad():
        assert call(group, PACKED, share).grad_fn is None
    o = call(group, PACKED, share)
    saved = o.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert [y.data_ptr() for y in saved[:4]] == [y.data_ptr() for y in (*list(share.values())[:3], o)]
    assert [y.shape for y in saved[4:]] == [o.shape[1:3]]
    (dk,) = torch.autograd.grad(o.square().sum(), share["k"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(dk.sum(), share["k"])


def test_what_is_kept() -> None:
    """Nothing without a need of gradients; with one the inputs, o and a number per token and head. Gradients once."""
    run_ranks(4, kept)


# ---- ways to call it -----------------------------------------------------------------------------------------------


def without_fused_kernels(group: dist.ProcessGroup, case: Case) -> Result:
    kernel, tile = softmax._kernel, softmax._TILE
    softmax._kernel, softmax._TILE = lambda q, v: None, 3000
    try:
        return results(group, case)
    finally:
        softmax._kernel, softmax._TILE = kernel, tile


@pytest.mark.parametrize("case", EVERY_WAY, ids=lambda case: f"{case.method}-{case.zigzag}")
def test_without_fused_kernels(case: Case) -> None:
    whole = plain(case, inputs(case))
    for rank, found in enumerate(run_ranks(4, without_fused_kernels, case)):
        for name, expected in share(case, rank, whole).items():
            assert error(found[name], expected) <= 1e-12, name


def under_autocast(group: dist.ProcessGroup) -> None:
    case = replace(PACKED, dtype=torch.float32)
    x, rank = inputs(case), dist.get_rank(group)
    parts = {name: take(y, case.layouts[0][rank]).requires_grad_() for name, y in x.items()}
    with torch.autocast("cpu", torch.bfloat16):
        o = call(group, case, parts)
    halves = {name: y.detach().bfloat16().requires_grad_() for name, y in parts.items()}
    expected = call(group, case, halves)
    assert_same_bits(o, expected)
    (dq,) = torch.autograd.grad(o, parts["q"], halves["do"])
    assert_same_bits(dq, torch.autograd.grad(expected, halves["q"], halves["do"])[0].float())


def compiled(group: dist.ProcessGroup) -> None:
    x, rank = inputs(PACKED), dist.get_rank(group)
    share = {name: take(y, PACKED.layouts[0][rank]) for name, y in x.items()}
    expected = 2 * call(group, PACKED, share)
    assert_same_bits(torch.compile(lambda: 2 * call(group, PACKED, share), backend="eager")(), expected)


def strided(group: dist.ProcessGroup) -> None:
    x, rank = inputs(PACKED), dist.get_rank(group)
    share = {name: take(y, PACKED.layouts[0][rank]) for name, y in x.items()}
    expected = call(group, PACKED, share)
    for order in ((0, 2, 1, 3), (0, 3, 2, 1)):
        views = {name: y.permute(order).contiguous().permute(order) for name, y in share.items()}
        assert error(call(group, PACKED, views), expected) <= 1e-14


@pytest.mark.parametrize("function", [under_autocast, compiled, strided])
def test_ways_to_call_it(function: Callable[[dist.ProcessGroup], None]) -> None:
    run_ranks(4, function)


# ---- errors --------------------------------------------------------------------------------------------------------


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# On one rank, T = 5, H = 4, G = 2, D = 3, D_v = 6: the argument, the exception, its value.
BAD: dict[str, tuple[str, type[Exception], Any]] = {
    "q is a list": ("q", TypeError, [1.0]),
    "q of rank 3": ("q", ValueError, zeros(5, 4, 3)),
    "q of two sequences": ("q", ValueError, zeros(2, 5, 4, 3)),
    "q of integers": ("q", TypeError, zeros(1, 5, 4, 3, dtype=torch.int32)),
    "q too short": ("q", ValueError, zeros(1, 4, 4, 3)),
    "q without heads": ("q", ValueError, zeros(1, 5, 0, 3)),
    "H no multiple of G": ("k", ValueError, zeros(1, 5, 3, 3)),
    "k of another D": ("k", ValueError, zeros(1, 5, 2, 4)),
    "k of another dtype": ("k", TypeError, zeros(1, 5, 2, 3, dtype=torch.float64)),
    "k elsewhere": ("k", ValueError, zeros(1, 5, 2, 3, device="meta")),
    "v is None": ("v", TypeError, None),
    "v of another G": ("v", ValueError, zeros(1, 5, 1, 6)),
    "v of another length": ("v", ValueError, zeros(1, 4, 2, 6)),
    "scale is a string": ("scale", TypeError, "1"),
    "scale NaN": ("scale", ValueError, math.nan),
    "method unknown": ("method", ValueError, "tree"),
    "method is None": ("method", TypeError, None),
    "zigzag is an int": ("zigzag", TypeError, 1),
    "cuts too few for zigzag": ("zigzag", ValueError, True),
    "cuts is a tensor": ("cuts", TypeError, torch.tensor([0, 5])),
    "cuts of floats": ("cuts", TypeError, [0, 5.0]),
    "cuts too many": ("cuts", ValueError, [0, 2, 5]),
    "cuts not from 0": ("cuts", ValueError, [1, 5]),
    "cuts short of T": ("cuts", ValueError, [0, 4]),
    "cuts decreasing": ("cuts", ValueError, [0, -1]),
    "cu_seqlens is a list": ("cu_seqlens", TypeError, [0, 5]),
    "cu_seqlens of floats": ("cu_seqlens", TypeError, torch.tensor([0.0, 5.0])),
    "cu_seqlens of rank 2": ("cu_seqlens", ValueError, torch.tensor([[0, 5]])),
    "cu_seqlens empty": ("cu_seqlens", ValueError, torch.tensor([], dtype=torch.int64)),
    "cu_seqlens elsewhere": ("cu_seqlens", ValueError, zeros(2, dtype=torch.int64, device="meta")),
    "cu_seqlens not from 0": ("cu_seqlens", ValueError, torch.tensor([1, 5])),
    "cu_seqlens decreasing": ("cu_seqlens", ValueError, torch.tensor([0, 7, 5])),
    "group is a string": ("group", TypeError, "world"),
    "queries is a number": ("queries", TypeError, 5),
    "queries of two ranks": ("queries", ValueError, [[(0, 5)], []]),
    "queries of numbers": ("queries", TypeError, [[0, 5]]),
    "queries of floats": ("queries", TypeError, [[(0, 5.0)]]),
    "queries out of order": ("queries", ValueError, [[(3, 5), (0, 3)]]),
    "queries beyond T": ("queries", ValueError, [[(1, 6)]]),
    "queries longer than q": ("queries", ValueError, [[(0, 2), (2, 4)]]),
    "keys below 0": ("keys", ValueError, [[(-1, 4)]]),
    "keys fewer than k": ("keys", ValueError, [[(0, 3)]]),
    "keys twice": ("keys", ValueError, [[(0, 3), (2, 4)]]),
}


def bad(group: dist.ProcessGroup, name: str) -> None:
    argument, exception, value = BAD[name]
    good: dict[str, Any] = {"q": zeros(1, 5, 4, 3), "k": zeros(1, 5, 2, 3), "v": zeros(1, 5, 2, 6)}
    good |= {"cu_seqlens": torch.tensor([0, 2, 5]), "group": group}
    function: Callable[..., Tensor] = ring_attention
    if argument in ("queries", "keys"):
        function = ring_attention_layout
        good |= {"queries": [[(0, 5)]], "keys": [[(0, 5)]]}
    else:
        good["cuts"] = [0, 5]
    function(**good)
    with pytest.raises(exception, match=f"^{function.__name__}: expected .*, got "):
        function(**{**good, argument: value})


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    run_ranks(1, bad, name)


def differs(group: dist.ProcessGroup, what: str) -> str:
    """One rank is called otherwise -> what it and the others are told."""
    rank = dist.get_rank(group)
    case = replace(PACKED, cuts=(0, 130, 300, 600))
    changes: dict[str, Any] = {
        "cuts": {"cuts": (0, 129, 300, 600)},
        "cu_seqlens": {"offsets": (0, 89, *case.offsets[2:])},
        "dtype": {"dtype": torch.float32},
        "[H, G, D, D_v]": {"D_v": 17},
        "scale": {"scale": 0.3},
        "method": {"method": "all_gather"},
    }
    if rank == 1:
        case = replace(case, **changes.get(what, {}))
    x = {name: take(y, case.layouts[0][rank]) for name, y in inputs(case).items()}
    x["q"].requires_grad_(what == "need of gradients" and rank == 1)
    if what == "a bad shard" and rank == 1:
        x["q"] = x["q"][:, 1:]
    with pytest.raises(ValueError if what == "a bad shard" and rank == 1 else RankError) as told:
        call(group, case, x)
    return str(told.value)


WHAT = (
    "cuts",
    "cu_seqlens",
    "dtype",
    "[H, G, D, D_v]",
    "scale",
    "method",
    "need of gradients",
    "a bad shard",
)


@pytest.mark.parametrize("what", WHAT)
def test_one_rank_differs(what: str) -> None:
    """All ranks are told, before anything is sent, and the group lives on."""
    told = run_ranks(3, differs, what)
    expected = "got ValueError" if what == "a bad shard" else f"expected the same {what} on all 3 ranks"
    assert all(expected in said or rank == 1 for rank, said in enumerate(told)), told
    run_ranks(3, repeated, replace(PACKED, cuts=(0, 130, 300, 600)))
