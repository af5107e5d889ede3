"""What each step of measurements times: bfloat16, attention at head dim 128 on shapes that fill a GPU and on those that do
not, the mixture of experts at the size of MiniMax-01.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lightning_attn.cli.case import BACKWARD, FORWARD, GRAPH, TRAIN, Case
from lightning_attn.cli.cases import Attention, Decode, GatedRMSNorm, Layer
from lightning_attn.cli.moe_blocks import MoeMlp
from lightning_attn.cli.moe_cases import GroupedGemm, Route

from . import dry
from .targets import DECODE, EXPERTS, FULL, GEMM, LONG, PREFILL, ROUTE, TRAINING, Shape

BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Measured:
    """A case. `listed`: it stands in the README's table, not only in a plot. `every_backend`: it is timed with those
    that "auto" has not taken too.
    """

    case: Case
    listed: bool = True
    every_backend: bool = False


def forward() -> Iterator[Measured]:
    yield Measured(attention(FULL, FORWARD))
    yield Measured(attention(LONG, FORWARD))
    lengths = (1, 63, 64, 0, 1000, 24, *(512,) * 12, 1024, 8064)  # documents from nothing to half of all
    yield Measured(attention(FULL | {"B": 1, "T": sum(lengths)}, FORWARD, lengths=lengths))
    # The only rates that FLA's own lightning attention has.
    yield Measured(attention(FULL, FORWARD, slopes="fla"))
    for tokens in (1024, 2048, 4096, 16_384, 32_768, 65_536):
        yield Measured(attention(FULL | {"T": tokens}, FORWARD), listed=False)


def backward() -> Iterator[Measured]:
    yield Measured(attention(FULL, BACKWARD, TRAIN))
    yield Measured(attention(LONG, BACKWARD))
    for tokens in (1024, 2048, 4096, 16_384, 32_768):
        yield Measured(attention(FULL | {"T": tokens}, BACKWARD), listed=False)


def decode() -> Iterator[Measured]:
    for batch in (128, 1, 16, 64, 256, 4, 32, 8, 2):
        passes = (FORWARD, GRAPH) if batch == 1 else (FORWARD,)
        yield Measured(decoding(DECODE | {"B": batch}, *passes), listed=batch in (1, 128), every_backend=True)
    for batch in (1, 128):
        passes = (FORWARD, GRAPH) if batch == 1 else (FORWARD,)
        yield Measured(decoding(DECODE | {"B": batch, "state": "bfloat16"}, *passes), every_backend=True)
    yield Measured(decoding(DECODE | {"T": 4}, FORWARD), every_backend=True)  # as in speculative decoding


def norm() -> Iterator[Measured]:
    for rows in (16_384, 128):
        # Few rows stay in the L2 cache: no fraction of the memory's bandwidth.
        yield Measured(GatedRMSNorm(BF16, rows=rows, D=8192, passes=(FORWARD, BACKWARD)), listed=rows > 1024)


def layer() -> Iterator[Measured]:
    yield Measured(Layer(BF16, T=4096, hidden=6144, H=64, D=128, passes=(FORWARD, TRAIN)))


def experts() -> Iterator[Measured]:
    yield Measured(moe(PREFILL, FORWARD))
    yield Measured(GroupedGemm(BF16, passes=(FORWARD,), **_sizes(GEMM)))
    yield Measured(moe(TRAINING, TRAIN))
    yield Measured(Route(BF16, passes=(FORWARD,), **_sizes(ROUTE)), every_backend=True)


def expert_decode() -> Iterator[Measured]:
    """In a graph, as decoding is served: at one token a launch takes longer than its kernel."""
    for tokens in (1, 8, 32, 128):
        yield Measured(moe(EXPERTS | {"T": tokens}, GRAPH, FORWARD))
    for tokens in (1, 8, 32):
        yield Measured(moe(EXPERTS | {"T": tokens}, GRAPH, int8=True))


STEPS: dict[str, Callable[[], Iterator[Measured]]] = {
    step.__name__: step for step in (forward, backward, decode, experts, expert_decode, norm, layer)
}


def of_step(step: str, dry_run: bool) -> list[Measured]:
    """The cases of a step; in a dry run the same kinds of cases, tiny, and each only once."""
    found = list(STEPS[step]())
    if not dry_run:
        return found
    tiny = (Measured(_tiny(m.case), m.listed, m.every_backend) for m in found)
    return list(dict.fromkeys(tiny))


def attention(shape: Shape, *passes: str, **options: Any) -> Attention:
    return Attention(BF16, passes=passes, **shape, **options)


def decoding(shape: Shape, *passes: str) -> Decode:
    return Decode(BF16, passes=passes, **shape | {"state": getattr(torch, str(shape["state"]))})


def moe(shape: Shape, *passes: str, **options: Any) -> MoeMlp:
    return MoeMlp(BF16, passes=passes, **_sizes(shape), **options)


def _sizes(shape: Shape) -> dict[str, Any]:
    return dict(shape)


def _tiny(case: Case) -> Case:
    """The same kind of case at a size for the interpreter."""
    dtype, passes, H, d = dry.DTYPE, case.passes, 2, 16
    if isinstance(case, Attention):
        lengths = (5, 0, 65) if case.lengths else ()
        tokens = 130 if case.T >= 8192 else 70
        return Attention(
            dtype, T=sum(lengths) or tokens, H=H, K=d, V=d, lengths=lengths, slopes=case.slopes, passes=passes
        )
    if isinstance(case, Decode):
        return Decode(dtype, B=min(case.B, 2), T=case.T, H=H, K=d, V=d, state=case.state, passes=passes)
    if isinstance(case, GatedRMSNorm):
        return GatedRMSNorm(dtype, rows=6, D=33, passes=passes)
    if isinstance(case, MoeMlp):
        tokens = min(case.T, 2) if GRAPH in passes else 33
        return MoeMlp(dtype, T=tokens, D=32, F=16, E=4, k=2, int8=case.int8, passes=passes)
    if isinstance(case, GroupedGemm):
        return GroupedGemm(dtype, M=40, E=4, N=32, K=16, passes=passes)
    if isinstance(case, Route):
        return Route(dtype, T=40, E=8, k=2, passes=passes)
    return Layer(dtype, T=40, hidden=24, H=H, D=d, passes=passes)
