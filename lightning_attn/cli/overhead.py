"""What a public call costs over the raw function of its backend: validation, dispatch and torch.library."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch

from lightning_attn import backends, lightning_attention, lightning_attention_decode

from .case import Case
from .cases import Attention, Decode
from .report import runs_on
from .timing import Call, medians


def call_times(backend: str, device: torch.device) -> dict[str, dict[str, float]]:
    """By op, microseconds of a public call and of the raw function in it. At one token of one small head: the
    kernel itself has next to nothing to do.
    """
    decode = Decode(torch.float32, B=1, H=1, K=16, V=16)
    attention = Attention(torch.float32, B=1, T=1, H=1, K=16, V=16)

    def raw(case: Case) -> ModuleType:
        return backends.load(runs_on(case, backend, device))

    inputs = decode.inputs(device)
    q, k, v, decay, state = (inputs[name] for name in ("q", "k", "v", "decay", "state"))
    calls: dict[str, dict[str, Call]] = {
        "attention": {
            "public": partial(lightning_attention, q, k, v, decay, backend=backend),
            "raw": partial(raw(attention).attention_forward, q, k, v, decay, 1.0, None, None, False),
        },
        "decode": {
            "public": partial(lightning_attention_decode, q, k, v, decay, state, backend=backend),
            "raw": partial(raw(decode).attention_decode, q, k, v, decay, state, None, 1.0),
        },
    }
    return {
        op: {name: 1e6 * time for name, time in medians(pair, device, budget=0.5).items()}
        for op, pair in calls.items()
    }
