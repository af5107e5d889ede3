"""Across ranks, on torch.distributed: NCCL on GPUs, gloo on CPUs."""

from .comm import RankError

__all__ = ["RankError"]
