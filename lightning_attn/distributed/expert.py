"""A mixture of experts over ranks: expert parallelism (EP) times expert tensor parallelism (ETP) times data (EDP)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..autocast import autocast
from ..backends import Expert
from ..dispatch import accumulation_dtype
from ..moe import moe_mlp, moe_route
from ..nn import SparseMoE
from ..nn.moe import MATRICES, SCALES, scales_kept
from ..ops.registry import kernels_of
from ..validation import expert_parallel as validation
from . import expert_steps as steps
from .all_reduce import sum_over
from .comm import Ranks
from .expert_plan import Place, join, shard

_NAME = validation.FUNCTION


class ExpertParallel(nn.Module):
    """`SparseMoE` with its experts spread over ranks (arXiv 2501.08313, section 3: EP, ETP and EDP), each rank with tokens of its
    own. y and every gradient are those of the dense module; no token is dropped.

    Rank (d, e, t) of EDP x EP x ETP holds `gate.weight` [E, D] whole, and of the experts [e E / EP, (e + 1) E / EP) the slice t of
    the intermediate dimension: `gate_up_proj` [E / EP, 2F / ETP, D] (its rows of the gate, then those of the up projection),
    `down_proj` [E / EP, D, F / ETP]. Ranks of equal e and t hold the same, of equal d exchange rows.

    Each token group: all-to-all of the rows over EP, all-gather over ETP, experts, reduce-scatter over ETP, all-to-all back.
    A rank dispatches its own tokens only, 1 / ETP of those of its ETP ranks. The counts of all groups are gathered before
    that, once over EP and once over ETP, and read on the CPU: a GPU is waited for there. While the experts of a group compute, the exchanges of
    the others fly. `expert_plan` has the bytes. Without EP and ETP nothing is sent.

    Args:
        moe: the dense module, the same on every rank. This rank's part of it is copied; if it is on the meta device, the
            parameters are too (`load_dense`, `load_state_dict(assign=True)`). int8 experts: for inference.
        mesh: with dimensions named among "edp", "ep", "etp", in any order, a missing one being 1; along each the ranks rise.
        groups: into how many contiguous parts the tokens of a rank are split, equal on all ranks.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value; experts that EP, or F that ETP, does not divide.
    """

    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_scale: Tensor | None
    down_scale: Tensor | None

    def __init__(self, moe: SparseMoE, mesh: DeviceMesh, *, groups: int = 1) -> None:
        super().__init__()
        validation.expert_parallel(moe, SparseMoE, mesh, groups)
        self.mesh, self.groups = mesh, groups
        self.hidden_size, self.intermediate_size = moe.hidden_size, moe.intermediate_size
        self.num_experts, self.top_k = moe.num_experts, moe.top_k
        (EP, e), (ETP, t) = (_coordinate(mesh, name) for name in ("ep", "etp"))
        validation.expert_split(moe.num_experts, moe.intermediate_size, EP, ETP)
        self.place = Place(EP, ETP, e, t)
        self.gate = copy.deepcopy(moe.gate)
        self.gate_up_scale = self.down_scale = None
        for name in MATRICES:
            w = getattr(moe, name)
            part = shard(name, w, self.place)
            if moe.quantized:
                self.register_buffer(name, part)
            else:
                setattr(self, name, nn.Parameter(part, requires_grad=w.requires_grad))
        for name in SCALES if moe.quantized else ():
            delattr(self, name)
            self.register_buffer(name, shard(name, getattr(moe, name), self.place))
        self.train(moe.training)

    @torch.compiler.disable
    def forward(
        self, x: Tensor, *, return_router_logits: bool = False, backend: str = "auto"
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [..., D], this rank's tokens -> y [..., D] in x's dtype; with return_router_logits (y, logits [tokens, E]).

        Every rank of EP x ETP calls it, with as many tokens as it has; a rank without any takes part all the same. So it is
        with the backward: all ranks run it or none, a rank without tokens too (`y.sum()` in its loss). Differentiable once.
        Beside its inputs the backward keeps the rows that the rank's experts computed, of them the pre-activations, and what
        they made of the rank's own pairs. Two runs give the same bits. torch.compile breaks its graph here.

        Under autocast as `SparseMoE`.

        Raises:
            TypeError, ValueError: as `SparseMoE`. The other ranks raise RankError.
            RankError: the ranks disagree about dtype, D, F, E, top_k, groups or what requires gradients, or one does not come.
        """
        groups = self._groups("ep", "etp")
        if not groups:
            flat, weights, experts, logits, *matrices = self._route(x, backend)
            whole = [w.weight if w.scale is None else (w.weight, w.scale) for w in matrices]
            y = moe_mlp(flat, whole[0], whole[1], weights, experts, backend=backend)
            return (y.view(x.shape), logits) if return_router_logits else y.view(x.shape)
        with steps.call_along(_NAME, groups) as ranks:
            flat, weights, experts, logits, gate_up, down = self._route(x, backend)
            leaves = (flat, gate_up.weight, down.weight, weights)
            needs = [n for n, leaf in zip(steps.LEAVES, leaves, strict=True) if leaf.requires_grad]
            save = torch.is_grad_enabled() and bool(needs)
            facts = {
                "dtype": flat.dtype,
                "D": self.hidden_size,
                "F": self.intermediate_size,
                "E": self.num_experts,
                "top_k": self.top_k,
                "groups": self.groups,
                "need of gradients": needs if save else [],
            }
            ranks.agree(facts, x.device)
        exchange = self._exchange(ranks)
        if save:
            y = steps.ExpertsFunction.apply(*leaves, experts, exchange, self.groups, backend)
        else:
            y, *_ = steps.forward(flat, gate_up, down, weights, experts, exchange, self.groups, backend)
        return (y.view(x.shape), logits) if return_router_logits else y.view(x.shape)

    @property
    def quantized(self) -> bool:
        return self.gate_up_scale is not None

    @torch.no_grad()
    def load_dense(self, moe: SparseMoE) -> None:
        """Copies this rank's part of a dense module of the same sizes, dtype aside; parameters on the meta device are replaced.

        Raises TypeError and ValueError for a module that is none, of other sizes, or of which only one of both is int8.
        """
        sizes = self.hidden_size, self.intermediate_size, self.num_experts
        validation.expert_dense(moe, SparseMoE, sizes, self.quantized)
        parts = {name: shard(name, w, self.place) for name, w in moe.state_dict().items()}
        self.load_state_dict(parts, assign=self.gate.weight.is_meta)

    @torch.no_grad()
    def gather_dense(self) -> dict[str, Tensor]:
        """The state dict of the dense module, whole on every rank. Collective over EP x ETP.

        Raises RankError if a rank does not come.
        """
        function, own = f"{_NAME}.gather_dense", self.state_dict()
        with steps.call_along(function, self._groups("ep", "etp")) as ranks:
            tensors = {name: (list(w.shape), w.dtype) for name, w in own.items()}
            ranks.agree({"tensors": tensors}, self.gate.weight.device)
        exchange, whole = self._exchange(ranks), {"gate.weight": own.pop("gate.weight").clone()}
        for name, w in own.items():
            slices = w[None] if exchange.etp is None else exchange.etp.all_gather(w).wait()
            w = join(name, slices)
            whole[name] = w.clone() if exchange.ep is None else exchange.ep.all_gather(w).wait().flatten(0, 1)
        return whole

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sums the gradients of the experts over EDP and that of the gate over the whole mesh, in place: the gradients of the sum
        of the ranks' losses, each of which is its rank's share of the whole. Sums are made in the order of the ranks, in
        float32 (float64 for float64), so all ranks get the same bits, every time. Collective over the mesh.

        Raises RankError if the ranks disagree about which parameters have gradients, or one does not come.
        """
        function = f"{_NAME}.reduce_gradients"
        gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        with steps.call_along(function, self._groups("edp", "ep", "etp")) as ranks:
            facts = {"gradients": {name: g.dtype for name, g in gradients.items()}}
            ranks.agree(facts, self.gate.weight.device)
        for name, gradient in gradients.items():
            total, dims = gradient, ["edp"]
            if name == "gate.weight":  # small, so it can be rounded once
                total, dims = gradient.to(accumulation_dtype(gradient.dtype)), ["etp", "ep", "edp"]
            for group in self._groups(*dims):
                total = sum_over(Ranks(function, group), total)
            gradient.copy_(total)

    def _route(self, x: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Expert, Expert]:
        """x [T, D] as its experts take it, weights and experts [T, k], logits [T, E], gate_up and down."""
        validation.expert_input(x, backend, self.hidden_size, self.gate.weight, self.quantized)
        x = x.reshape(-1, self.hidden_size)
        flat, gate = autocast(x, self.gate.weight)
        gate_up, down = Expert(self.gate_up_proj, self.gate_up_scale), Expert(self.down_proj, self.down_scale)
        if not self.quantized:
            gate_up, down = map(Expert, autocast(self.gate_up_proj, self.down_proj))
        tensors = {"gate.weight": gate, "gate_up_proj": gate_up.weight, "down_proj": down.weight}
        validation.expert_dtype(flat, **tensors)
        kernels_of(backend, "moe_mlp_forward", flat, down.weight.dtype, down.weight.shape[2])  # or it raises
        logits = self.gate(x)
        weights, experts = moe_route(logits, self.top_k, backend=backend)
        return flat, weights, experts, logits, gate_up, down

    def _groups(self, *dims: str) -> list[ProcessGroup]:
        """Those of the mesh along these dimensions that have more ranks than this one."""
        return [self.mesh.get_group(name) for name in dims if _coordinate(self.mesh, name)[0] > 1]

    def _exchange(self, lines: steps.Lines) -> steps.Exchange:
        """Of the ranks along "ep" and "etp", as they have agreed."""
        found = {line.group: line for line in lines.lines}
        ep, etp = (next((found[g] for g in self._groups(name)), None) for name in ("ep", "etp"))
        return steps.Exchange(self.place, ep, etp)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertParallel:
        with scales_kept(self):
            super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        sizes = f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
        sizes += f"num_experts={self.num_experts}, top_k={self.top_k}, groups={self.groups}, "
        return sizes + f"ep={self.place.ep}, etp={self.place.etp}" + ", int8" * self.quantized


def _coordinate(mesh: DeviceMesh, name: str) -> tuple[int, int]:
    """The size of a dimension, and this rank's coordinate in it."""
    names, coordinate = mesh.mesh_dim_names, mesh.get_coordinate()
    assert names is not None and coordinate is not None, "validated"
    dim = names.index(name) if name in names else None
    return (1, 0) if dim is None else (mesh.size(dim), coordinate[dim])
