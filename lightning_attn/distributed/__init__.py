"""Across ranks, on torch.distributed: NCCL on GPUs, gloo on CPUs."""

from .comm import RankError
from .lasp import lasp

__all__ = ["RankError", "lasp"]
