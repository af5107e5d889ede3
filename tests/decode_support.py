"""The rule for decode, which has no gradients and updates a state."""

import functools

import torch
from support import Inputs, assert_close_to_truth, device_of
from torch import Tensor

from lightning_attn import lightning_attention_decode
from lightning_attn.backends import reference
from lightning_attn.dispatch import accumulation_dtype


@functools.lru_cache(maxsize=512)
def decode_results(x: Inputs, state_dtype: torch.dtype) -> tuple[Tensor, tuple, tuple]:
    """A state of that dtype, and (o, new state) in float64 and in plain PyTorch."""
    state = x.initial_state.to(state_dtype)
    y = x.double()
    exact = reference.recurrence(y.q, y.k, y.v, y.decay, scale=y.scale, initial_state=state.double())
    wide = state.to(accumulation_dtype(x.q.dtype))
    plain = reference.block_form(x.q, x.k, x.v, x.decay, scale=x.scale, initial_state=wide)
    return state, exact, plain


def check_decode(x: Inputs, backend: str, state_dtype: torch.dtype) -> None:
    """The rule for o and the state after one call on a state of that dtype."""
    state, exact, plain = decode_results(x, state_dtype)
    device = device_of(backend)
    on_device = [t.to(device, copy=True) for t in (x.q, x.k, x.v, x.decay, state)]
    o = lightning_attention_decode(*on_device, scale=x.scale, backend=backend)
    assert_close_to_truth(o.cpu(), exact[0], plain[0], x.v.dtype, "o", 2)
    new = on_device[-1].cpu()
    assert_close_to_truth(new, exact[1], plain[1].to(state_dtype), state_dtype, "state", 1)
