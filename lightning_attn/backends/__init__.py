"""The kernels, behind one interface. A backend is imported when it is first asked for, never before.

Every backend module exports the same raw functions: tensors in, tensors out, no autograd, no validation.
Outputs are contiguous and alias no input.

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
