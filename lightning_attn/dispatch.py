"""Which backend runs a call: a pure decision over plain data."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")

# What "auto" tries on a device, best first. The reference runs everywhere and comes last.
_PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


@dataclass(frozen=True)
class Spec:
    """What a backend needs to know to say whether it can run a call.

    `op` is the name of the raw function. For the norm K and V are both the length of the normalised dimension
    and state_dtype is the weight's dtype. For the mixture of experts state_dtype is that of the expert matrices (routing: of
    the weights); K and V are E and k (routing), k and E (sorting), K and N (grouped_gemm), D and F (moe_mlp).
    """

    op: str
    device: str
    dtype: torch.dtype
    state_dtype: torch.dtype
    K: int
    V: int

    @property
    def function(self) -> str:
        """The public function that `op` belongs to."""
        name = self.op.removesuffix("_forward").removesuffix("_backward").removesuffix("_state")
        if name == "moe_sort":
            return "moe_mlp"
        return f"lightning_{name}" if name.startswith("attention") else name


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, and of the states of inputs of `dtype`: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def resolve(backend: str, spec: Spec, supports: Callable[[str, Spec], list[str]]) -> str:
    """Name of the backend that runs `spec`.

    "auto" takes the first that supports it; a backend that was named runs or raises, it never falls back.
    `supports(name, spec)` lists the reasons why a backend cannot run it.
    """
    if backend == "auto":
        candidates = (*_PREFERRED.get(spec.device, ()), "reference")
    elif backend in BACKENDS:
        candidates = (backend,)
    else:
        known = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"{spec.function}: expected backend to be one of {known}, got {backend!r}")
    refusals = []
    for name in candidates:
        reasons = supports(name, spec)
        if not reasons:
            return name
        refusals.append(f"{name}: {', '.join(reasons)}")
    raise ValueError(
        f"{spec.function}: expected a backend that can run it, got {backend!r} ({'; '.join(refusals)})"
    )
