"""What the tests of the modules share: a small layer and its inputs."""

from typing import Any

import pytest
import torch
from support import BACKENDS, DTYPES, ON_CPU, dtype_id
from torch import Tensor

from lightning_attn import LightningAttention

HIDDEN, HEADS, DIM = 20, 3, 8
PARAMETERS = ["qkv_proj.weight", "output_gate.weight", "norm.weight", "out_proj.weight"]

here = pytest.mark.parametrize("backend", BACKENDS)
on_cpu = pytest.mark.parametrize("backend", ON_CPU)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def layer(dtype: torch.dtype = torch.float32, **options: Any) -> LightningAttention:
    """A small one whose norm weight is not all ones."""
    torch.manual_seed(0)
    module = LightningAttention(HIDDEN, HEADS, DIM, **{"layer_idx": 1, "num_layers": 4, **options})
    with torch.no_grad():
        module.qkv_proj.weight.mul_(3)
        module.norm.weight.copy_(torch.randn(HEADS * DIM) + 1)
    return module.to(dtype)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def states(N: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> Tensor:
    return normal(N, HEADS, DIM, DIM, seed=seed, dtype=torch.promote_types(dtype, torch.float32))
