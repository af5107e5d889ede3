"""What autocast asks of the arguments of a function."""

import torch
from torch import Tensor


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast wants them: in its dtype, if it is on; float64 is left alone."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast does not know meta
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
