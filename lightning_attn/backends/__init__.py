"""The kernels, behind one interface. A backend is imported when it is first asked for, never before.

Every backend module exports the same raw functions, or those of them that it has a kernel for ("cuda" has decode, routing
and sorting): tensors in, tensors out, no autograd, no validation.
Outputs are contiguous and alias no input.

    unavailable() -> str | None                 # why it can run nothing on this machine
    supports(spec) -> list[str]                 # the reasons why it cannot run the call; empty if it can
    attention_forward(q, k, v, decay, scale, initial_state, cu_seqlens, return_state) -> (o, state or None)
    attention_backward(do, dstate, q, k, v, decay, scale, initial_state, cu_seqlens)
        -> (dq, dk, dv, dinitial_state or None)        # None where there is no initial state
    attention_state(k, v, decay, scale, initial_state, reverse) -> state       # of one dense batch, no outputs; see below
    attention_history(x, state, decay, scale, reverse, out)
        # in place, out_t += scale * lambda^(t+1) S^T x_t (reverse: lambda^(T-1-t)) of one dense batch, x [B, T, H, K],
        # state [B, H, K, V] in the accumulation dtype, out [B, T, H, V] of x's dtype: what a state adds to the tokens after it
    attention_decode(q, k, v, decay, state, slots, scale) -> o                 # state is updated in place
    gated_rms_norm_forward(x, gate, weight, eps) -> (y, rstd)
    gated_rms_norm_backward(dy, x, gate, weight, rstd) -> (dx, dgate, dweight)
    moe_route_forward(logits, top_k, renormalize) -> (weights, experts)
    moe_route_backward(dweights, logits, weights, experts, renormalize) -> dlogits
    moe_sort(experts, num_experts) -> (order, position, offs)
    grouped_gemm_forward(x, w, offs) -> y
    grouped_gemm_backward(dy, x, w, offs, need_x, need_w) -> (dx or None, dw or None)
    moe_mlp_forward(x, gate_up, down, weights, routing, interleaved, save) -> (y, h or None)
    moe_mlp_backward(dy, x, gate_up, down, weights, routing, h, interleaved, need_x, need_gate_up, need_down, need_weights)
        -> (dx, dgate_up, ddown, dweights)             # None for what is not needed

Shapes and dtypes are those of the public functions; gradients have the dtype of what they belong to; rstd is
float32 (float64 with float64 inputs), shape x.shape[:-1]. q, k, v, do, x, gate and dy are contiguous in the
last dimension and free in their other strides, as decode's state is in its first two; the rest is contiguous.

`attention_state` reads k and v once and gives the state after the last token, lambda^T S0 + scale * the sum of
lambda^(T-1-j) k_j v_j^T, lambda = e^{-decay}; with `reverse` lambda^T S0 + scale * the sum of lambda^(t+1) k_t v_t^T, which of
q, do and dstate is the gradient of the initial state. Tokens whose weight is zero in the accumulation dtype need not be read.

The mixture of experts. A pair (t, j) is token t with the j-th of its k experts, and has the number p = t * k + j.

    logits, x [T, D], dweights, dy      contiguous in the last dimension, free in the first
    w, gate_up, down                    [E, N, K], contiguous in one of the last two dimensions, free in the other strides;
                                        gate_up and down of an MLP as `Expert`: the matrices, and the scales if they are int8
    weights, experts                    [T, k] contiguous; float32 (float64 with float64 x), int32
    order [T * k] int32                 the pairs by expert, those of an expert in rising order: a stable sort
    position [T, k] int32               where each pair stands in `order`; -1 for one whose expert is not in [0, E)
    offs [E] int32                      where each expert's pairs end in `order`; what follows the last is undefined
    h [T * k, 2F]                       pre-activations in x's dtype, rows as in `order`, columns in an order of the backend's
                                        own. Kept for its backward, None without `save`
    routing                             (order, position, offs), as `Routing`

`grouped_gemm_*` treat rows of x past offs[-1] as no group's: zero in y and dx. dw of an empty group is zero. On a GPU no
value of `experts` or `offs`, and no NaN, leads outside of a tensor.
"""

import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import BACKENDS, Spec


class Routing(NamedTuple):
    """Pairs of tokens and experts, sorted: see above."""

    order: Tensor
    position: Tensor
    offs: Tensor


class Expert(NamedTuple):
    """A matrix of each expert, [E, N, K]; if it is int8, with a float32 factor for each of its rows, `scale` [E, N]."""

    weight: Tensor
    scale: Tensor | None = None


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """How many threads a CPU kernel may use: as many as PyTorch, but one in a forked child. The thread pool of GNU
    OpenMP does not survive a fork, and a parallel region there would wait for ever.
    """
    return 1 if _forked else torch.get_num_threads()


def load(name: str) -> ModuleType:
    """The backend module `name`, imported; ImportError says why it is not there."""
    module = importlib.import_module(f"{__name__}.{name}")
    if reason := module.unavailable():
        raise ImportError(reason)
    return module


def supports(name: str, spec: Spec) -> list[str]:
    """The reasons why backend `name` cannot run `spec`; empty if it can."""
    try:
        module = load(name)
    except ImportError as error:
        return [str(error)]
    return module.supports(spec)


def available_backends() -> dict[str, str]:
    """Each backend's name with "ok", or with the reason why it cannot be used here."""
    report = {}
    for name in BACKENDS:
        try:
            load(name)
            report[name] = "ok"
        except ImportError as error:
            report[name] = str(error)
    return report
