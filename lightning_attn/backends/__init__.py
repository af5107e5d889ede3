"""The kernels, behind one interface. A backend is imported when it is first asked for, never before.

Every backend module exports the same raw functions, or those of them that it has a kernel for ("cuda" has decode only):
tensors in, tensors out, no autograd, no validation.
Outputs are contiguous and alias no input.

    unavailable() -> str | None                 # why it can run nothing on this machine
    supports(spec) -> list[str]                 # the reasons why it cannot run the call; empty if it can
    attention_forward(q, k, v, decay, scale, initial_state, cu_seqlens, return_state) -> (o, state or None)
    attention_backward(do, dstate, q, k, v, decay, scale, initial_state, cu_seqlens)
        -> (dq, dk, dv, dinitial_state or None)        # None where there is no initial state
    attention_decode(q, k, v, decay, state, slots, scale) -> o                 # state is updated in place
    gated_rms_norm_forward(x, gate, weight, eps) -> (y, rstd)
    gated_rms_norm_backward(dy, x, gate, weight, rstd) -> (dx, dgate, dweight)

Shapes and dtypes are those of the public functions; gradients have the dtype of what they belong to; rstd is
float32 (float64 with float64 inputs), shape x.shape[:-1]. q, k, v, do, x, gate and dy are contiguous in the
last dimension and free in their other strides, as decode's state is in its first two; the rest is contiguous.
"""

import importlib
import os
from types import ModuleType

import torch

from ..dispatch import BACKENDS, Spec

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
