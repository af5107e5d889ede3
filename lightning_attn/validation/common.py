"""The checks that all functions share."""

import sys

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int32, torch.int64)


def types(function: str, backend: str, **tensors: Tensor) -> None:
    """The types of arguments: comes before everything that takes them for granted."""
    for name, x in tensors.items():
        tensor(function, name, x)
    if not isinstance(backend, str):
        raise TypeError(f"{function}: expected backend to be a str, got {type(backend).__name__}")


def tensor(function: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: expected {name} to be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{function}: expected {name} of layout torch.strided, got {x.layout}")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise ValueError(
            f"{function}: expected {name} without a tangent: there is no forward-mode derivative"
        )
    if not torch.compiler.is_compiling() and _loses_gradient(x):
        raise ValueError(
            f"{function}: expected {name} without requires_grad inside vmap: the gradient would be lost"
        )


def _loses_gradient(x: Tensor) -> bool:
    """Within vmap a tensor from outside does not show that it requires grad: the operator would be called without."""
    if functorch.peek_interpreter_stack() is None or not torch.is_grad_enabled():
        return False
    while functorch.is_batchedtensor(x):
        x = functorch.get_unwrapped(x)
        if x.requires_grad:
            return True
    return False


def floating(function: str, name: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"{function}: expected {name} of dtype float32, bfloat16, float16 or float64, got {x.dtype}"
        )


def index(function: str, name: str, x: Tensor, like: Tensor, like_name: str = "q") -> None:
    tensor(function, name, x)
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{function}: expected {name} of dtype int32 or int64, got {x.dtype}")
    same_device(function, name, x, like_name, like)


def same_device(function: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{function}: expected {name} on {other_name}'s device {other.device}, got {x.device}"
        )


def number(function: str, name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{function}: expected {name} to be a Python number, got {type(value).__name__}")
    if not -sys.float_info.max <= value <= sys.float_info.max:
        got = "an int beyond float64" if isinstance(value, int) else value
        raise ValueError(f"{function}: expected {name} to be finite, got {got}")


def dims(x: Tensor) -> list[int]:
    return list(x.shape)
