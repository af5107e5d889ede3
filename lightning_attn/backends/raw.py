"""What the raw functions that are made of PyTorch have in common."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def raw(function: Callable[P, R]) -> Callable[P, R]:
    """A raw function sees neither the caller's grad mode nor its autocast."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        assert isinstance(args[0], Tensor)
        with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
            return function(*args, **kwargs)

    return run
