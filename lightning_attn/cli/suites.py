"""Which cases `check` judges and which `bench` times; those of the mixture of experts are in `moe_suites`."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lightning_attn.dispatch import accumulation_dtype

from . import moe_suites
from .case import Case, dtype_name
from .cases import Attention, Decode, GatedRMSNorm, Layer

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = {dtype_name(dtype): dtype for dtype in (F64, F32, BF16, F16)}
PRESETS = ("quick", "full", "minimax-01")
OPS = (Attention.op, Decode.op, GatedRMSNorm.op, Layer.op, *moe_suites.OPS)


def check_cases() -> Iterator[Case]:
    """Small shapes that reach every path: one token, block edges, odd and unequal head dims, slopes from zero
    to large, packed and empty documents, padding in the slots.
    """
    for dtype in DTYPES.values():
        yield Attention(dtype, T=1, H=2, K=16, V=16, stateful=True)
        yield Attention(dtype, B=2, T=65, H=3, K=64, V=64)
        yield Attention(dtype, T=257, H=2, K=128, V=128, stateful=True)
        yield Attention(dtype, B=2, T=130, H=2, K=96, V=96, stateful=True)
        yield Attention(dtype, B=2, T=70, H=2, K=7, V=5, stateful=True)
        yield Attention(dtype, T=200, H=2, K=33, V=80, stateful=True)
        yield Attention(dtype, T=129, H=1, K=256, V=256, stateful=True)
        yield Attention(
            dtype, B=8, T=64, H=2, K=1, V=1, stateful=True
        )  # enough numbers for errors to compare
        yield Attention(dtype, T=300, H=2, K=32, V=32, slopes="zero", stateful=True)
        yield Attention(dtype, T=300, H=5, K=32, V=32, slopes="large", stateful=True)
        yield Attention(dtype, T=331, H=2, K=64, V=32, lengths=(0, 65, 1, 0, 200, 65, 0), stateful=True)
        for state in dict.fromkeys((accumulation_dtype(dtype), F64 if dtype == F64 else BF16)):
            yield Decode(dtype, B=3, H=4, K=128, V=128, state=state)
            yield Decode(dtype, B=5, H=3, K=64, V=64, state=state, slots=True)
            yield Decode(dtype, B=5, T=3, H=2, K=33, V=17, state=state, slots=True)
        yield GatedRMSNorm(dtype, rows=1, D=3)
        yield GatedRMSNorm(dtype, rows=7, D=1001)
        yield GatedRMSNorm(dtype, rows=64, D=8192)
        yield GatedRMSNorm(dtype, rows=2000, D=96)
        yield Layer(dtype, B=2, T=65, hidden=64, H=4, D=16)
        yield from moe_suites.check_cases(dtype)


def bench_cases(preset: str, dtypes: tuple[torch.dtype, ...] = (), *, module: bool = False) -> list[Case]:
    """The cases of a preset, in its dtypes unless others are named; `module` adds the attention layer to "quick"."""
    make = {"quick": _quick, "full": _full, "minimax-01": _minimax_01}[preset]
    return list(dict.fromkeys(make(dtypes, module)))  # without repeats, in order


def _quick(dtypes: tuple[torch.dtype, ...], module: bool) -> Iterator[Case]:
    for dtype in dtypes or (F32, BF16):
        yield Attention(dtype, T=8192, H=8, K=128, V=128)
    for dtype in dtypes or (F32, BF16):
        yield Decode(dtype, B=16, H=64, K=128, V=128, state=accumulation_dtype(dtype))
    for dtype in dtypes or (BF16,):
        yield GatedRMSNorm(dtype, rows=2048, D=8192)
    if module:  # the layer is there to be compared: its time is mostly that of the projections
        for dtype in dtypes or (F32, BF16):
            yield Layer(dtype, T=2048, hidden=1024, H=8, D=128)
    yield from moe_suites.quick(dtypes)


def _full(dtypes: tuple[torch.dtype, ...], module: bool) -> Iterator[Case]:
    yield from _quick(dtypes, module=True)
    for dtype in dtypes or (F16, F64):
        yield Attention(dtype, T=8192, H=8, K=128, V=128)
    for dtype in dtypes or (F32, BF16):
        yield Attention(dtype, T=16384, H=8, K=128, V=128)
        for tokens in (16_384, 1_048_576):  # a time per token that does not grow with T
            yield Attention(dtype, T=tokens, H=1, K=128, V=128)
        yield Attention(dtype, T=8192, H=8, K=128, V=128, lengths=(64,) * 64 + (0, 1, 127, 4096 - 128))
        for k, v in ((64, 64), (96, 96), (33, 80), (127, 129)):
            yield Attention(dtype, T=8192, H=8, K=k, V=v)
    for dtype in dtypes or (F32,):
        for batch in (1, 4, 64):
            yield Decode(dtype, B=batch, H=64, K=128, V=128, state=accumulation_dtype(dtype))
    for dtype in dtypes or (BF16,):
        for batch in (1, 16, 64):
            yield Decode(dtype, B=batch, H=64, K=128, V=128, state=F64 if dtype == F64 else BF16)
    for dtype in dtypes or (F32, F16):
        yield GatedRMSNorm(dtype, rows=2048, D=8192)
    yield from moe_suites.full(dtypes)


def _minimax_01(dtypes: tuple[torch.dtype, ...], module: bool) -> Iterator[Case]:
    for dtype in dtypes or (BF16,):
        for tokens in (2048, 4096, 8192):
            yield Attention(dtype, T=tokens, H=64, K=128, V=128)
        for batch in (1, 4, 16):
            yield Decode(dtype, B=batch, H=64, K=128, V=128, state=accumulation_dtype(dtype))
        yield GatedRMSNorm(dtype, rows=2048, D=8192)
        yield Layer(dtype, T=512, hidden=6144, H=64, D=128)
    yield from moe_suites.minimax_01(dtypes)
