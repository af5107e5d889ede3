"""How an operator of `torch.library` is made, and which backend runs it.

The choice is made inside an operator because torch.compile does not look into operators: a compiled graph chooses when it
runs, as eager code does.
"""

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from .. import backends, dispatch

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("lightning_attn", "DEF")


def operator(
    fake: Callable[P, R], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Registers the decorated function as the operator of its name and signature, for tensors of any device.

    `fake` gives the outputs' shapes and dtypes; outputs are contiguous and never alias an input.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        name = function.__name__
        _library.define(
            torch.library.infer_schema(function, op_name=name, mutates_args=mutates),
            tags=(torch.Tag.pt2_compliant_tag,),
        )
        _library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lightning_attn::{name}", fake, lib=_library)
        return cast(Callable[P, R], getattr(torch.ops.lightning_attn, name).default)

    return register


def kernels_of(backend: str, op: str, x: Tensor, state_dtype: torch.dtype, V: int) -> ModuleType:
    """The backend that runs the raw function `op` on x [..., K]."""
    if backend == "auto":
        backend = os.environ.get("LIGHTNING_ATTN_BACKEND") or "auto"
    return _resolve(backend, dispatch.Spec(op, x.device.type, x.dtype, state_dtype, x.shape[-1], V))


@functools.lru_cache(maxsize=1024)
def _resolve(backend: str, spec: dispatch.Spec) -> ModuleType:
    return backends.load(dispatch.resolve(backend, spec, backends.supports))


def check_values(x: Tensor) -> bool:
    # On a GPU the checks would wait for the device.
    return x.is_cpu or os.environ.get("LIGHTNING_ATTN_CHECK") == "1"


def rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension; kernels take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()
