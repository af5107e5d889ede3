"""The sparse mixture of experts as a module, with the names of the released checkpoints and of transformers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation
from ..moe import Quantized, moe_mlp, moe_route, quantize_experts

MATRICES, SCALES = ("gate_up_proj", "down_proj"), ("gate_up_scale", "down_scale")


class SparseMoE(nn.Module):
    """The mixture of experts of MiniMax-Text-01 (arXiv 2501.08313):

        weights, experts = moe_route(gate(x), top_k)        y = moe_mlp(x, gate_up_proj, down_proj, weights, experts)

    No token is dropped, nothing has a bias. Parameters: `gate.weight` [E, D], `gate_up_proj` [E, 2F, D] (the gate's rows,
    then the up projection's), `down_proj` [E, D, F]. `load_state_dict` takes as well `experts.gate_up_proj` and
    `experts.down_proj`, as transformers has them, and the checkpoint's `experts.E.w1.weight` (gate), `w3` (up) and `w2`
    (down), which `checkpoint_state_dict` gives back.
    """

    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_scale: Tensor | None
    down_scale: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        validation.expert_sizes(hidden_size, intermediate_size, num_experts, top_k)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_experts, self.top_k = num_experts, top_k
        E, D, F = num_experts, hidden_size, intermediate_size
        self.gate = nn.Linear(D, E, bias=False, device=device, dtype=dtype)
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F, D, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(E, D, F, device=device, dtype=dtype))
        self.gate_up_scale = self.down_scale = None
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_rename)

    def reset_parameters(self) -> None:
        """Each expert's matrices as those of `nn.Linear`."""
        if self.quantized:
            raise ValueError("SparseMoE: expected floating-point experts to reset, got int8")
        self.gate.reset_parameters()
        for w in (self.gate_up_proj, self.down_proj):
            bound = w.shape[2] ** -0.5
            nn.init.uniform_(w, -bound, bound)

    def forward(
        self, x: Tensor, *, return_router_logits: bool = False, backend: str = "auto"
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [..., D] -> y [..., D] in x's dtype; with return_router_logits (y, logits [tokens, E]), for the losses.

        Raises TypeError and ValueError as `moe_mlp`.
        """
        validation.sparse_moe(x, self.hidden_size)
        flat = x.reshape(-1, self.hidden_size)
        logits = self.gate(flat)
        weights, experts = moe_route(logits, self.top_k, backend=backend)
        gate_up, down = self._experts()
        y = moe_mlp(flat, gate_up, down, weights, experts, backend=backend).view(x.shape)
        return (y, logits) if return_router_logits else y

    @property
    def quantized(self) -> bool:
        return self.gate_up_scale is not None

    @torch.no_grad()
    def quantize(self) -> "SparseMoE":
        """The experts' matrices in int8 (`quantize_experts`), in place, for inference: buffers with the names of the
        parameters that they replace, and `gate_up_scale` [E, 2F] and `down_scale` [E, D] beside them, float32 whatever
        dtype the module is cast to. The gate keeps its dtype, but requires no gradient any more. Load a checkpoint first.
        Returns the module.
        """
        if not self.quantized:
            pairs = quantize_experts(self.gate_up_proj, self.down_proj)
            for name, (q, scale) in zip(("gate_up", "down"), pairs, strict=True):
                delattr(self, f"{name}_proj")
                delattr(self, f"{name}_scale")
                self.register_buffer(f"{name}_proj", q)
                self.register_buffer(f"{name}_scale", scale)
            self.gate.requires_grad_(False)
        return self

    def checkpoint_state_dict(self) -> dict[str, Tensor]:
        """The parameters by the names of the released checkpoints, less `block_sparse_moe.`; views, not copies."""
        if self.quantized:
            raise ValueError("SparseMoE: expected floating-point experts for a checkpoint, got int8")
        tensors = {"gate.weight": self.gate.weight.detach()}
        for e, (gate_up, down) in enumerate(
            zip(self.gate_up_proj.detach(), self.down_proj.detach(), strict=True)
        ):
            gate, up = gate_up.chunk(2)
            tensors |= {_name(e, "w1"): gate, _name(e, "w2"): down, _name(e, "w3"): up}
        return tensors

    def _experts(self) -> tuple[Tensor | Quantized, Tensor | Quantized]:
        """As `moe_mlp` takes them."""
        if self.gate_up_scale is None or self.down_scale is None:
            return self.gate_up_proj, self.down_proj
        return (self.gate_up_proj, self.gate_up_scale), (self.down_proj, self.down_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseMoE":
        with scales_kept(self):
            super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        sizes = f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
        return sizes + f"num_experts={self.num_experts}, top_k={self.top_k}" + ", int8" * self.quantized


@contextmanager
def scales_kept(module: nn.Module) -> Iterator[None]:
    """Around `_apply`: .to(dtype) would round the scales of int8 experts."""
    scales = {name: scale for name in SCALES if (scale := getattr(module, name)) is not None}
    yield
    for name, before in scales.items():
        after = getattr(module, name)
        if after.dtype != before.dtype:
            kept = torch.empty_like(after, dtype=before.dtype) if before.is_meta else before.to(after.device)
            setattr(module, name, kept)


def _name(e: int, part: str) -> str:
    return f"experts.{e}.{part}.weight"


def _rename(module: SparseMoE, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Other names of the experts' matrices -> ours. What is incomplete or of unequal shapes is left, to be reported as
    missing and unexpected; int8 where the module has floating-point experts, or these where it has int8, is an error.
    """
    _stack(module, state_dict, prefix)
    errors: list[str] = rest[-1]
    for name in MATRICES:
        given = state_dict.get(prefix + name)
        if isinstance(given, Tensor) and (given.dtype == torch.int8) != module.quantized:
            kind = "int8 (the module is quantised)" if module.quantized else "floating-point"
            errors.append(f"SparseMoE: expected {prefix}{name} to be {kind}, got {given.dtype}")
            del state_dict[prefix + name]  # nothing is copied


def _stack(module: SparseMoE, state_dict: dict[str, Any], prefix: str) -> None:
    for name in MATRICES:
        other = f"{prefix}experts.{name}"
        if other in state_dict and prefix + name not in state_dict:
            state_dict[prefix + name] = state_dict.pop(other)
    shapes = {
        "w1": (module.intermediate_size, module.hidden_size),
        "w2": (module.hidden_size, module.intermediate_size),
        "w3": (module.intermediate_size, module.hidden_size),
    }
    found = {
        part: [state_dict.get(prefix + _name(e, part)) for e in range(module.num_experts)] for part in shapes
    }
    whole = all(isinstance(w, Tensor) and w.shape == shapes[part] for part, ws in found.items() for w in ws)
    if not whole or prefix + "gate_up_proj" in state_dict or prefix + "down_proj" in state_dict:
        return
    state_dict[prefix + "gate_up_proj"] = torch.stack(
        [torch.cat(pair) for pair in zip(found["w1"], found["w3"], strict=True)]  # type: ignore[arg-type]
    )
    state_dict[prefix + "down_proj"] = torch.stack(found["w2"])  # type: ignore[arg-type]
    for part in shapes:
        for e in range(module.num_experts):
            del state_dict[prefix + _name(e, part)]
