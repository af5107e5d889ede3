"""LASP+ over gloo ranks against one process, on every rank: random packings and cuts, faults of arguments, bytes, bits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks_support import Received, run_ranks
from torch import Tensor

from lightning_attn import lightning_attention
from lightning_attn.dispatch import accumulation_dtype
from lightning_attn.distributed import RankError, lasp
from lightning_attn.distributed.lasp_plan import lasp_bytes

SIZES = (2, 3, 4, 5)
CASES = 90  # of each number of ranks
# Slow ones, so that history matters; one that none survives.
RATES = ([0.01, 0.0], [0.3, 1e-4], [0.05, 2.0], [1e4, 0.02])


def packing(choose: random.Random, T: int) -> list[int]:
    """cu_seqlens of T tokens: some documents, of which some may be empty."""
    n = choose.choice((1, 1, 2, 3, 6))
    inner = [choose.choice((0, T, choose.randint(0, T), choose.randint(0, T))) for _ in range(n - 1)]
    return sorted([0, *inner, T])


def cutting(choose: random.Random, documents: Sequence[int], R: int) -> list[int]:
    """R + 1 cuts: even, anywhere, on starts of documents, or with empty shards."""
    T = documents[-1]
    how = choose.randrange(4)
    if how == 0:
        return [r * T // R for r in range(R + 1)]
    places = [documents, range(T + 1), [0, T // 2, T]][how - 1]
    return sorted([0, *(choose.choice(places) for _ in range(R - 1)), T])


def inputs(
    seed: int, T: int, N: int, rates: list[float], dtype: torch.dtype = torch.float64, K: int = 5, V: int = 6
) -> dict[str, Tensor]:
    """Equal on all ranks. q, k, v, do of the whole sequence; initial states and their gradients of all documents."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    H, acc = len(rates), accumulation_dtype(dtype)
    found = {n: normal(1, T, H, D) for n, D in (("q", K), ("k", K), ("v", V), ("do", V))}
    states = {n: normal(N, H, K, V, dtype=acc) for n in ("initial", "dstate")}
    return {**found, **states, "decay": torch.tensor(rates)}


WITH_STATES, WITHOUT_STATES = True, False


def alone(x: dict[str, Tensor], documents: Sequence[int], states: bool, backend: str) -> dict[str, Tensor]:
    """Outputs and gradients of one process."""
    leaves = {n: x[n].detach().clone().requires_grad_() for n in ("q", "k", "v", "initial")}
    o, state = lightning_attention(
        leaves["q"], leaves["k"], leaves["v"], x["decay"], scale=0.7, cu_seqlens=torch.tensor(documents),
        initial_state=leaves["initial"] if states else None, return_state=True, backend=backend,
    )  # fmt: skip
    total = (o * x["do"]).sum() + ((state * x["dstate"]).sum() if states else 0)
    total.backward()
    grads = {f"d{n}": leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
    return {"o": o.detach(), "state": state.detach(), **grads}


def across(
    group: dist.ProcessGroup, x: dict[str, Tensor], documents: Sequence[int], cuts: list[int], states: bool, backend: str
) -> dict[str, Tensor]:  # fmt: skip
    """What this rank gets."""
    rank = dist.get_rank(group)
    mine = slice(cuts[rank], cuts[rank + 1])
    leaves = {n: x[n][:, mine].detach().clone().requires_grad_() for n in ("q", "k", "v")}
    leaves["initial"] = x["initial"].detach().clone().requires_grad_()
    o, state = lasp(
        leaves["q"], leaves["k"], leaves["v"], x["decay"], scale=0.7, cu_seqlens=torch.tensor(documents), cuts=cuts,
        group=group, initial_state=leaves["initial"] if states else None, return_state=True, backend=backend,
    )  # fmt: skip
    total = (o * x["do"][:, mine]).sum() + ((state * x["dstate"]).sum() if states else 0)
    total.backward()
    grads = {f"d{n}": leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
    return {"o": o.detach(), "state": state.detach(), **grads}


def own(name: str, whole: Tensor, documents: Sequence[int], cuts: Sequence[int], rank: int) -> Tensor:
    """The part of a result of one process that a rank has."""
    if name not in ("state", "dinitial"):
        return whole[:, cuts[rank] : cuts[rank + 1]]
    part = torch.zeros_like(whole)
    for n, (s, e) in enumerate(zip(documents, documents[1:])):
        token = s if s == e or name == "dinitial" else e - 1
        holders = [r for r in range(len(cuts) - 1) if cuts[r] <= token < cuts[r + 1]]
        if rank == (holders[0] if holders else len(cuts) - 2):
            part[n] = whole[n]
    return part


def distance(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest value."""
    if want.numel() == 0:
        return 0.0 if got.shape == want.shape else float("inf")
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30)).item()


def compare(group: dist.ProcessGroup, cases: int, backend: str) -> tuple[float, str]:
    """The worst distance from one process of all outputs and gradients of this rank, over random cases."""
    R, rank = dist.get_world_size(group), dist.get_rank(group)
    choose = random.Random(R)
    worst = (0.0, "")
    for case in range(cases):
        T = choose.choice((0, 1, R - 1, 7, 23, 64, 97, 150))
        documents = packing(choose, T)
        cuts = cutting(choose, documents, R)
        states, rates = case % 3 != 0, choose.choice(RATES)
        x = inputs(case, T, len(documents) - 1, rates)
        truth = alone(x, documents, states, "reference")
        found = across(group, x, documents, cuts, states, backend)
        assert found.keys() == truth.keys()
        for name, value in found.items():
            want = own(name, truth[name], documents, cuts, rank)
            scale = truth[name].abs().max().clamp(min=1e-30) if truth[name].numel() else 1.0
            assert value.shape == want.shape and value.isfinite().all(), name
            error = ((value - want).abs().max() / scale).item() if want.numel() else 0.0
            worst = max(worst, (error, f"{name} {documents=} {cuts=} {rates=}"))
    return worst


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("size", SIZES)
def test_random_packings(size: int, backend: str) -> None:
    """Row 27, float64: every output and gradient on every rank, 360 packings and cuts on each backend."""
    for error, where in run_ranks(size, compare, CASES, backend):
        assert error < 1e-12, where


if __name__ == "__main__":
    for R in SIZES:
        print(R, run_ranks(R, compare, CASES, "reference"))
