"""Across ranks, on torch.distributed: NCCL on GPUs, gloo on CPUs."""

from .all_reduce import all_reduce
from .balance import load_balancing_share
from .comm import RankError
from .expert import ExpertParallel
from .lasp import lasp
from .lasp_plan import even_cuts
from .ring import ring_attention, ring_attention_layout

__all__ = [
    "ExpertParallel",
    "RankError",
    "all_reduce",
    "even_cuts",
    "lasp",
    "load_balancing_share",
    "ring_attention",
    "ring_attention_layout",
]
