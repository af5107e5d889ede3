"""The errors of gated_rms_norm."""

import torch
from torch import Tensor

from .common import dims, floating, number, same_device


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> None:
    """The structure of the arguments of gated_rms_norm."""
    function = "gated_rms_norm"
    floating(function, "x", x)
    if gate.dtype != x.dtype:
        raise TypeError(f"{function}: expected gate of x's dtype {x.dtype}, got {gate.dtype}")
    if weight.dtype != x.dtype and weight.dtype != torch.float32:
        raise TypeError(f"{function}: expected weight of x's dtype {x.dtype} or float32, got {weight.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{function}: expected x of shape [..., D], got {dims(x)}")
    if gate.shape != x.shape:
        raise ValueError(f"{function}: expected gate of x's shape {dims(x)}, got {dims(gate)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{function}: expected weight of shape [D] = [{x.shape[-1]}], got {dims(weight)}")
    same_device(function, "gate", gate, "x", x)
    same_device(function, "weight", weight, "x", x)
    number(function, "eps", eps)
    if eps <= 0:
        raise ValueError(f"{function}: expected eps > 0, got {eps}")
