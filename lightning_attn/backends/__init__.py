"""The kernels, behind one interface. A backend is imported when it is first asked for, never before.

Every backend module exports the same raw functions: tensors in, tensors out, no autograd and no validation. Head
dimensions are contiguous (`stride(-1) == 1`), other strides are free; states and small vectors are contiguous, except
the state of `attention_decode`, whose two leading strides are free.

    supports(spec) -> list[str]                          # the reasons why not; empty if it can run the call
    attention_forward(q, k, v, decay, scale, initial_state, cu_seqlens, return_state) -> (o, state or None)
    attention_backward(do, dstate, q, k, v, decay, scale, initial_state, cu_seqlens) -> (dq, dk, dv, dinitial_state)
    attention_decode(q, k, v, decay, state, slots, scale) -> o                               # state is updated in place
    gated_rms_norm_forward(x, gate, weight, eps) -> (y, rstd)
    gated_rms_norm_backward(dy, x, gate, weight, rstd) -> (dx, dgate, dweight)
"""

import importlib
from types import ModuleType

from ..dispatch import BACKENDS, Spec

_TITLES = {"triton": "Triton", "cuda": "CUDA"}


def load(name: str) -> ModuleType:
    """The backend module `name`, imported; ImportError says why it is not there."""
    if name in _TITLES:
        raise ImportError(f"this version has no {_TITLES[name]} kernels")
    return importlib.import_module(f"{__name__}.{name}")


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
