"""The errors of the mixture of experts."""

import torch
from torch import Tensor

from .common import dims, floating, index, same_device, tensor

_MOST_PAIRS = 2**31 - 1  # tokens times experts: they are numbered in 32 bits

Quantized = tuple[Tensor, Tensor]


def moe_route(logits: Tensor, top_k: int, renormalize: bool) -> None:
    """The structure of the arguments of moe_route."""
    function = "moe_route"
    floating(function, "logits", logits)
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise TypeError(f"{function}: expected top_k to be an int, got {type(top_k).__name__}")
    if not isinstance(renormalize, bool):
        raise TypeError(f"{function}: expected renormalize to be a bool, got {type(renormalize).__name__}")
    if logits.dim() != 2:
        raise ValueError(f"{function}: expected logits of shape [T, E], got {dims(logits)}")
    T, E = logits.shape
    if not 1 <= top_k <= E:
        raise ValueError(f"{function}: expected top_k from 1 to E = {E}, got {top_k}")
    _pairs(function, T, top_k)


def moe_route_values(logits: Tensor) -> None:
    """That every token has a largest logit: none is NaN or +inf, and not all are -inf."""
    finite = logits.amax(1).isfinite()  # NaN is the largest
    if not finite.all():
        t = int((~finite).nonzero()[0])
        got = f"a largest logit of {logits[t].amax().item()} for token {t}"
        raise ValueError(f"moe_route: expected a finite largest logit for every token, got {got}")


def grouped_gemm(x: Tensor, w: Tensor, offs: Tensor) -> None:
    """The structure of the arguments of grouped_gemm."""
    function = "grouped_gemm"
    floating(function, "x", x)
    if w.dtype != x.dtype:
        raise TypeError(f"{function}: expected w of x's dtype {x.dtype}, got {w.dtype}")
    if offs.dtype != torch.int32:
        raise TypeError(f"{function}: expected offs of dtype int32, got {offs.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{function}: expected x of shape [M, K], got {dims(x)}")
    if w.dim() != 3 or w.shape[2] != x.shape[1]:
        raise ValueError(f"{function}: expected w of shape [E, N, K] = [E, N, {x.shape[1]}], got {dims(w)}")
    if w.shape[0] == 0:
        raise ValueError(f"{function}: expected at least one group, got w of shape {dims(w)}")
    if offs.shape != w.shape[:1]:
        raise ValueError(f"{function}: expected offs of shape [E] = [{w.shape[0]}], got {dims(offs)}")
    _pairs(function, x.shape[0], 1)
    same_device(function, "w", w, "x", x)
    same_device(function, "offs", offs, "x", x)


def grouped_gemm_values(offs: Tensor, M: int) -> None:
    """That offs does not decrease and stays within M rows."""
    ends = offs.tolist()
    for e, (before, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end < before:
            where = f"{end} after {before} at index {e}"
            raise ValueError(f"grouped_gemm: expected offs not to decrease from 0 on, got {where}")
    if ends[-1] > M:
        raise ValueError(f"grouped_gemm: expected offs to end at M = {M} or before, got {ends[-1]}")


def moe_mlp(
    x: Tensor,
    gate_up: Tensor | Quantized,
    down: Tensor | Quantized,
    weights: Tensor,
    experts: Tensor,
    layout: str,
) -> None:
    """The structure of the arguments of moe_mlp."""
    function = "moe_mlp"
    if layout not in ("concatenated", "interleaved"):
        raise ValueError(f"{function}: expected layout to be 'concatenated' or 'interleaved', got {layout!r}")
    floating(function, "x", x)
    if isinstance(gate_up, tuple) != isinstance(down, tuple):
        kinds = " and ".join("a pair" if isinstance(w, tuple) else "a tensor" for w in (gate_up, down))
        raise TypeError(
            f"{function}: expected gate_up and down both as tensors or both as pairs, got {kinds}"
        )
    if x.dim() != 2:
        raise ValueError(f"{function}: expected x of shape [T, D], got {dims(x)}")
    T, D = x.shape
    up = _expert(function, "gate_up", gate_up, x)
    if up.dim() != 3 or up.shape[1] % 2 or up.shape[2] != D:
        raise ValueError(f"{function}: expected gate_up of shape [E, 2F, D] = [E, 2F, {D}], got {dims(up)}")
    E, F = up.shape[0], up.shape[1] // 2
    if E == 0:
        raise ValueError(f"{function}: expected at least one expert, got gate_up of shape {dims(up)}")
    _scales(function, "gate_up", gate_up)
    back = _expert(function, "down", down, x)
    if back.shape != (E, D, F):
        raise ValueError(f"{function}: expected down of shape [E, D, F] = [{E}, {D}, {F}], got {dims(back)}")
    _scales(function, "down", down)
    _choice(function, weights, experts, x, T, E)
    if isinstance(gate_up, tuple) and torch.is_grad_enabled():
        for name, t in (("x", x), ("weights", weights)):
            if t.requires_grad:
                raise ValueError(
                    f"{function}: expected {name} without requires_grad (int8 experts are not differentiable: use "
                    "torch.no_grad()), got a tensor that requires grad"
                )


def moe_mlp_values(experts: Tensor, E: int, function: str = "moe_mlp") -> None:
    """That every expert is one."""
    if experts.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(experts))
    if not 0 <= low <= high < E:
        raise ValueError(f"{function}: expected experts in [0, {E}), got {low if low < 0 else high}")


def quantize_experts(gate_up: Tensor, down: Tensor) -> None:
    """The structure of the arguments of quantize_experts."""
    function = "quantize_experts"
    for name, w in (("gate_up", gate_up), ("down", down)):
        tensor(function, name, w)
        floating(function, name, w)
        if w.dim() != 3:
            raise ValueError(f"{function}: expected {name} of shape [E, N, K], got {dims(w)}")


def load_balancing_loss(logits: Tensor, experts: Tensor) -> None:
    """The structure of the arguments of load_balancing_loss."""
    function = "load_balancing_loss"
    router_logits(function, logits)
    index(function, "experts", experts, logits, "logits")
    if experts.dim() != 2 or experts.shape[0] != logits.shape[0]:
        raise ValueError(
            f"{function}: expected experts of shape [T, k] = [{logits.shape[0]}, k], got {dims(experts)}"
        )


def router_logits(function: str, logits: Tensor) -> None:
    """Logits [T, E]."""
    tensor(function, "logits", logits)
    floating(function, "logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"{function}: expected logits of shape [T, E], got {dims(logits)}")


def sparse_moe(x: Tensor, hidden_size: int) -> None:
    """The structure of the argument of SparseMoE."""
    tensor("SparseMoE", "x", x)
    if x.dim() == 0 or x.shape[-1] != hidden_size:
        raise ValueError(f"SparseMoE: expected x of shape [..., {hidden_size}], got {dims(x)}")


def _expert(function: str, name: str, w: Tensor | Quantized, x: Tensor) -> Tensor:
    """The matrices [E, N, K] of `w`, whose dtype and device are right."""
    if isinstance(w, tuple):
        if len(w) != 2:
            raise TypeError(
                f"{function}: expected {name} to be a pair (int8 matrices, scales), got {len(w)} items"
            )
        for part, t in zip((name, f"the scales of {name}"), w, strict=True):
            tensor(function, part, t)
            same_device(function, part, t, "x", x)
        if w[0].dtype != torch.int8:
            raise TypeError(f"{function}: expected {name} of dtype int8 in a pair, got {w[0].dtype}")
        if w[1].dtype != torch.float32:
            raise TypeError(f"{function}: expected the scales of {name} of dtype float32, got {w[1].dtype}")
        if torch.is_grad_enabled() and w[1].requires_grad:
            raise ValueError(f"{function}: expected the scales of {name} to be constants, got requires_grad")
        return w[0]
    tensor(function, name, w)
    if w.dtype != x.dtype:
        raise TypeError(f"{function}: expected {name} of x's dtype {x.dtype}, got {w.dtype}")
    same_device(function, name, w, "x", x)
    return w


def _scales(function: str, name: str, w: Tensor | Quantized) -> None:
    if isinstance(w, tuple) and w[1].shape != w[0].shape[:2]:
        raise ValueError(
            f"{function}: expected the scales of {name} of shape [E, N] = {dims(w[0])[:2]}, got {dims(w[1])}"
        )


def _choice(function: str, weights: Tensor, experts: Tensor, x: Tensor, T: int, E: int) -> None:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weights.dtype not in (wide, x.dtype):
        names = " or ".join(dict.fromkeys((str(wide), str(x.dtype))))
        raise TypeError(f"{function}: expected weights of dtype {names}, got {weights.dtype}")
    index(function, "experts", experts, x, "x")
    if experts.dim() != 2 or experts.shape[0] != T or not 1 <= experts.shape[1] <= E:
        raise ValueError(
            f"{function}: expected experts of shape [T, k] = [{T}, k] with k from 1 to E = {E}, got {dims(experts)}"
        )
    if weights.shape != experts.shape:
        raise ValueError(
            f"{function}: expected weights of experts' shape {dims(experts)}, got {dims(weights)}"
        )
    _pairs(function, *experts.shape)
    same_device(function, "weights", weights, "x", x)


def _pairs(function: str, T: int, k: int) -> None:
    if T * k > _MOST_PAIRS:
        raise ValueError(f"{function}: expected at most {_MOST_PAIRS} rows, got {T * k}")


def finite_expert(function: str, name: str, e: int, scale: Tensor) -> None:
    """That the scales of the rows of expert e are finite."""
    if not scale.isfinite().all():
        got = f"a row of expert {e} whose scale is {scale.amax().item()}"
        raise ValueError(f"{function}: expected {name} to be finite in float32, got {got}")


def expert_sizes(hidden_size: int, intermediate_size: int, num_experts: int, top_k: int) -> None:
    """The sizes of SparseMoE."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_experts": num_experts}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"SparseMoE: expected {name} >= 1, got {size}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"SparseMoE: expected top_k from 1 to num_experts = {num_experts}, got {top_k}")
