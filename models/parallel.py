"""The text model over many processes: context parallelism for both kinds of attention, expert and expert tensor parallelism for the
experts, data parallelism outside.

    world = DP x CP = EDP x EP x ETP        (arXiv 2501.08313, section 3)

The same ranks are looked at in two ways: rank r = d CP + c has the c-th part of the sequences of replica d, and r = (i EP + e) ETP + t the
t-th slice of the e-th share of the experts. Experts serve the tokens of all ranks of their EP x ETP, whatever replica they
belong to. Layers may lie on several devices of a rank as without this (`models.placement`): placed first, then made parallel. Training wants
them on one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_attn import SparseMoE
from lightning_attn.distributed import ExpertParallel

from .text import CausalLM, DecoderLayer


@dataclass(frozen=True)
class Sizes:
    """How a world is shared out; what is left over is DP and EDP."""

    cp: int = 1
    ep: int = 1
    etp: int = 1

    @staticmethod
    def parse(text: str) -> Sizes:
        """ "cp=2,ep=2,etp=1"; what is not named is 1. Raises ValueError."""
        known = [f.name for f in fields(Sizes)]
        found: dict[str, int] = {}
        for part in filter(None, text.split(",")):
            name, _, value = part.strip().partition("=")
            if name not in known or name in found or not value.isdecimal() or int(value) < 1:
                raise ValueError(f"parallel: expected {'=N,'.join(known)}=N with N >= 1, got {text!r}")
            found[name] = int(value)
        return Sizes(**found)


class World:
    """The groups and meshes of this rank; collective over the default group, which is initialised.

    Raises ValueError for sizes that do not divide the number of ranks.
    """

    def __init__(self, sizes: Sizes, device_type: str = "cpu") -> None:
        ranks = dist.get_world_size()
        for names, size in (("cp", sizes.cp), ("ep x etp", sizes.ep * sizes.etp)):
            if ranks % size:
                raise ValueError(f"parallel: expected {names} = {size} to divide the {ranks} ranks")
        self.sizes, self.ranks, self.rank = sizes, ranks, dist.get_rank()
        self.dp, self.edp = ranks // sizes.cp, ranks // (sizes.ep * sizes.etp)
        tokens = init_device_mesh(device_type, (self.dp, sizes.cp), mesh_dim_names=("dp", "cp"))
        self.experts = init_device_mesh(
            device_type, (self.edp, sizes.ep, sizes.etp), mesh_dim_names=("edp", "ep", "etp")
        )
        self.replica = self.rank // sizes.cp
        self.cp = tokens.get_group("cp")
        # Groups of a mesh have PyTorch's timeout, half an hour and more, whatever the default group was made with.
        whole = dist.distributed_c10d._get_default_group()
        timeout = whole._get_backend(torch.device(device_type)).options._timeout
        for group in (*tokens.get_all_groups(), *self.experts.get_all_groups()):
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def parallelize(model: CausalLM, world: World, *, groups: int = 1) -> CausalLM:
    """Leaves this rank's part of the experts, in place; `groups`: see `ExpertParallel`. The model is the same on every rank. Call it
    with `context` then (`ContextParallel`), or `models.sharded.prefill`. Collective over the world. Returns the model.
    """
    for layer in cast("list[DecoderLayer]", model.model.layers):
        dense = layer.block_sparse_moe
        if not isinstance(dense, SparseMoE):
            raise TypeError(f"parallelize: expected a dense model, got experts in {type(dense).__name__}")
        layer.block_sparse_moe = ExpertParallel(dense, world.experts, groups=groups)
    return model


def experts_of(model: nn.Module) -> Iterator[tuple[str, ExpertParallel]]:
    """The parallel experts, by name."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertParallel):
            yield name, module


def gather(model: CausalLM) -> CausalLM:
    """The dense model, whole on every rank. Collective over EP x ETP."""
    tensors = dict(model.state_dict())
    for name, experts in experts_of(model):
        tensors |= {f"{name}.{n}": t for n, t in experts.gather_dense().items()}
    dense = CausalLM(model.config, device="meta")
    dense.load_state_dict(tensors, assign=True)
    return dense.train(model.training)
