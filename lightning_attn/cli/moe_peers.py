"""Who else does the mixture of experts: PyTorch's grouped_mm, transformers' block, Liger-Kernel's fused experts."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import moe_eager
from .case import Case
from .eager import Function
from .moe_blocks import MoeBlock, MoeMlp, as_function
from .moe_cases import GroupedGemm, Route

PER_EXPERT, SOFTMAX_TOPK = "per-expert", "softmax-topk"  # the plain versions
GROUPED_MM = "grouped_mm"
TRANSFORMERS, TRANSFORMERS_EAGER = "transformers", "transformers-eager"
LIGER = "liger"

GROUPED_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPED_MM_BYTES = 16  # its rows are aligned to
LIGER_MODULE = "liger_kernel.ops.fused_moe"
# Of the block in transformers.
PARAMETERS = {"gate": "gate.weight", "gate_up": "experts.gate_up_proj", "down": "experts.down_proj"}


def plain_name(case: Case) -> str | None:
    """Of the plain version; None for other ops."""
    if isinstance(case, Route):
        return SOFTMAX_TOPK
    return PER_EXPERT if isinstance(case, GroupedGemm | MoeMlp) else None


def versions(case: Case, on_gpu: bool, modeling: Any) -> dict[str, Function]:
    """By name, what runs the case. `modeling` is transformers' module, None if it is not there."""
    found: dict[str, Function] = {}
    if isinstance(case, GroupedGemm) and _takes_grouped_mm(case.dtype, case.N, case.K):
        found[GROUPED_MM] = grouped_mm
    if not isinstance(case, MoeMlp) or case.int8:
        return found
    if _takes_grouped_mm(case.dtype, case.D, case.F):
        found[GROUPED_MM] = grouped_mm_mlp
    if on_gpu and case.layout == "concatenated" and not isinstance(fused := _liger(), str):
        found[LIGER] = functools.partial(_liger_mlp, fused)
    if not isinstance(case, MoeBlock):
        return found
    found = {name: functools.partial(moe_eager.moe, top_k=case.k, moe_mlp=mlp) for name, mlp in found.items()}
    if modeling:
        found[TRANSFORMERS] = _transformers_block(case, modeling, _default_experts(modeling))
        found[TRANSFORMERS_EAGER] = _transformers_block(case, modeling, "eager")
    return found


def missing(on_gpu: bool) -> list[str]:
    found = _liger() if on_gpu else None
    return [found] if isinstance(found, str) else []


# ---- PyTorch ------------------------------------------------------------------------------------------------------


def _takes_grouped_mm(dtype: torch.dtype, *rows: int) -> bool:
    aligned = all(n * dtype.itemsize % GROUPED_MM_BYTES == 0 for n in rows)
    return hasattr(F, "grouped_mm") and dtype in GROUPED_MM_DTYPES and aligned


def grouped_mm(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return F.grouped_mm(x, w.mT, offs=offs)


def grouped_mm_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, *, layout: str
) -> Tensor:
    """The pairs sorted by expert, two products, the pairs of a token summed: nothing waits for the device."""
    sorted_, order = experts.flatten().sort(stable=True)
    every = torch.arange(len(gate_up), device=x.device, dtype=sorted_.dtype)
    offs = torch.searchsorted(sorted_, every, right=True, out_int32=True)
    gate, up = moe_eager.halves(grouped_mm(x[order // experts.shape[1]], gate_up, offs), layout)
    z = grouped_mm(F.silu(gate) * up, down, offs) * weights.flatten()[order, None]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return z[place].view(*experts.shape, -1).sum(1).to(x.dtype)


# ---- transformers -------------------------------------------------------------------------------------------------


@functools.cache
def _default_experts(modeling: Any) -> str:
    """The implementation of the experts that a model has which is made from its config and nothing else."""
    config = modeling.MiniMaxConfig(
        vocab_size=8, hidden_size=64, head_dim=8, intermediate_size=8, num_hidden_layers=1
    )
    with torch.device("meta"):
        model = importlib.import_module("transformers").AutoModel.from_config(config)
    return model.config._experts_implementation


def _transformers_block(case: MoeBlock, modeling: Any, implementation: str) -> Function:
    """In evaluation mode: in training mode its default multiplies x by noise."""
    config = modeling.MiniMaxConfig(
        hidden_size=case.D,
        intermediate_size=case.F,
        num_local_experts=case.E,
        num_experts_per_tok=case.k,
        experts_implementation=implementation,
    )

    @functools.cache
    def module() -> torch.nn.Module:
        with torch.device("meta"):  # it is given the matrices in every call
            return modeling.MiniMaxSparseMoeBlock(config).eval()

    function = as_function(module, PARAMETERS)
    return lambda x, *matrices: function(x[None], *matrices)[0]


# ---- Liger-Kernel -------------------------------------------------------------------------------------------------


@functools.cache  # an import that fails takes its time again
def _liger() -> Function | str:
    """Its fused experts (0.8.5), or why they are not there."""
    try:
        return importlib.import_module(LIGER_MODULE).LigerFusedMoEFunction.apply
    except Exception as error:  # noqa: BLE001 - a peer that is broken is not there
        if isinstance(error, ModuleNotFoundError) and error.name == "liger_kernel":
            return "Liger-Kernel is not installed: it is not compared"
        return f"Liger-Kernel is not compared: {type(error).__name__}: {error}"


def _liger_mlp(
    fused: Function,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    *,
    layout: str,
) -> Tensor:
    return fused(x, gate_up, down, experts, weights)
