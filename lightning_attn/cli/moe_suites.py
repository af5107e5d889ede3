"""The cases of the mixture of experts, for `suites`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .case import FORWARD, TRAIN, Case
from .moe_blocks import MoeBlock, MoeMlp
from .moe_cases import GroupedGemm, Route

OPS = (Route.op, GroupedGemm.op, MoeMlp.op, MoeBlock.op)
F32, BF16 = torch.float32, torch.bfloat16

SMALL: dict[str, Any] = {"D": 1024, "F": 1536, "E": 16, "k": 2}
MINIMAX_01: dict[str, Any] = {"D": 6144, "F": 9216, "E": 32, "k": 2}


def check_cases(dtype: torch.dtype) -> Iterator[Case]:
    """No token, one, blocks of rows that are full and that are not, experts from one to 512, all tokens on one of them,
    experts without any, odd sizes, both layouts, int8. Of very few tokens the forward alone, for their weights have not
    enough gradients for errors to compare.
    """
    yield Route(dtype, T=300, E=512, k=2)
    yield Route(dtype, T=0, E=16, k=2)
    yield Route(dtype, T=1, E=1, k=1)
    yield Route(dtype, T=5, E=16, k=16)
    yield Route(dtype, T=65, E=3, k=2, renormalize=False)
    yield Route(dtype, T=65, E=16, k=3, ties=True)
    yield GroupedGemm(dtype, M=5, E=3, N=7, K=9)
    yield GroupedGemm(dtype, M=0, E=3, N=8, K=8, passes=(FORWARD,))
    yield GroupedGemm(dtype, M=1, E=1, N=16, K=16)
    yield GroupedGemm(dtype, M=65, E=16, N=33, K=24, spread="idle")
    yield GroupedGemm(dtype, M=300, E=3, N=64, K=48, spread="one")
    yield GroupedGemm(dtype, M=100, E=512, N=8, K=16, spread="skewed")
    yield MoeMlp(dtype, T=5, D=33, F=17, E=3, k=3, layout="interleaved")
    yield MoeMlp(dtype, T=0, D=16, F=8, E=4, k=2, passes=(FORWARD,))
    yield MoeMlp(dtype, T=1, D=33, F=17, E=1, k=1, passes=(FORWARD,))
    yield MoeMlp(dtype, T=65, D=48, F=40, E=16, k=2, spread="idle")
    yield MoeMlp(dtype, T=300, D=24, F=16, E=3, k=1, layout="interleaved", spread="one")
    yield MoeMlp(dtype, T=65, D=16, F=8, E=512, k=2, passes=(FORWARD,))
    yield MoeMlp(dtype, T=300, D=16, F=8, E=64, k=2)
    yield MoeMlp(dtype, T=5, D=32, F=16, E=4, k=2, int8=True)
    yield MoeMlp(dtype, T=65, D=33, F=17, E=4, k=2, layout="interleaved", int8=True)
    yield MoeBlock(dtype, T=65, D=64, F=48, E=16, k=2)
    yield MoeBlock(dtype, T=5, D=32, F=16, E=4, k=2, int8=True)


def quick(dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for dtype in dtypes or (F32, BF16):
        yield MoeBlock(dtype, T=2048, **SMALL)
    for dtype in dtypes or (F32, BF16):
        yield MoeBlock(dtype, T=4, **SMALL)
    for dtype in dtypes or (F32, BF16):
        yield MoeMlp(dtype, T=4, **SMALL, passes=(FORWARD,))
        yield MoeMlp(dtype, T=4, **SMALL, int8=True)
    for dtype in dtypes or (BF16,):
        yield GroupedGemm(dtype, M=4096, E=16, N=3072, K=1024, passes=(FORWARD,))
        yield Route(dtype, T=8192, E=32, k=2)


def full(dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for dtype in dtypes or (F32, BF16):
        for spread in ("skewed", "one"):
            yield MoeMlp(dtype, T=2048, **SMALL, spread=spread)
        yield MoeMlp(dtype, T=2048, **SMALL, layout="interleaved")
        for tokens in (1, 32, 256):
            yield MoeMlp(dtype, T=tokens, **SMALL, passes=(FORWARD,))
        for tokens in (1, 32):
            yield MoeMlp(dtype, T=tokens, **SMALL, int8=True)
        yield MoeMlp(dtype, T=2048, D=1024, F=256, E=128, k=8)  # fine-grained experts
        yield GroupedGemm(dtype, M=4096, E=16, N=3072, K=1024, passes=(FORWARD, TRAIN))
        yield Route(dtype, T=8192, E=512, k=8)


def minimax_01(dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """At the size of the model: where there is no room for its experts, `bench` leaves them out."""
    for dtype in dtypes or (BF16,):
        yield Route(dtype, T=8192, E=32, k=2)
        yield GroupedGemm(dtype, M=4096, E=32, N=18_432, K=6144, passes=(FORWARD,))
        yield MoeMlp(dtype, T=2048, **MINIMAX_01)
        yield MoeBlock(dtype, T=2048, **MINIMAX_01)
        for tokens in (1, 4, 32):
            yield MoeBlock(dtype, T=tokens, **MINIMAX_01)
        yield MoeMlp(dtype, T=4, **MINIMAX_01, int8=True)
