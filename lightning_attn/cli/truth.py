"""The truth of every op, given float64 inputs.

Each is written otherwise than in `eager`, so that in float64, too, the baseline has an error of its own to be
measured: two texts that round alike would allow nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_attn.backends.reference import block_form, recurrence

from . import eager

RECURRENT = 1024  # tokens: longer sequences in blocks of 512, for the recurrence keeps a state per token


def attention(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The recurrence itself, as long as that is affordable."""
    form = recurrence if q.shape[1] <= RECURRENT else partial(block_form, block_size=512)
    return form(q, k, v, decay, **options)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    scale: float,
) -> Tensor:
    """A decode is a prefill that starts from the state."""
    if slots is None:
        slots = torch.arange(len(q), device=q.device)
    real = slots >= 0
    rows = slots[real]
    o = torch.zeros_like(v)
    o[real], state[rows] = block_form(
        q[real], k[real], v[real], decay, scale=scale, initial_state=state[rows]
    )
    return o


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return x * weight / ((1 + torch.exp(-gate)) * torch.sqrt(torch.mean(x * x, -1, keepdim=True) + eps))


layer: eager.Function = partial(eager.layer, attention=attention, gated_rms_norm=gated_rms_norm)
