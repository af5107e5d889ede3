"""What the tests of the mixture of experts share: inputs, the truth in float64, plain PyTorch in the inputs' dtype.

The truth is dense: every expert is applied to every token and weighted, with zero where it was not chosen; its gradients are
written out.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from support import assert_close_to_truth, device_of
from torch import Tensor
from torch.nn import functional as F

from lightning_attn import grouped_gemm, moe_mlp
from lightning_attn.dispatch import accumulation_dtype

Result = dict[str, Tensor]
LEAVES = ("x", "gate_up", "down", "weights")


@dataclass(frozen=True, eq=False)
class Experts:
    """The arguments of one moe_mlp, and the gradient that comes back. Never written to."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    weights: Tensor
    experts: Tensor
    dy: Tensor
    layout: str = "concatenated"

    def to(self, device: str) -> "Experts":
        return self.map(lambda t: t.to(device))

    def double(self) -> "Experts":
        return self.map(lambda t: t.double() if t.is_floating_point() else t)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Experts":
        tensors = {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **{name: function(t) for name, t in tensors.items()})


@functools.lru_cache(maxsize=512)
def make_experts(
    T: int = 70,
    D: int = 48,
    F: int = 40,
    E: int = 5,
    k: int = 2,
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "concatenated",
    only: tuple[int, ...] | None = None,  # the experts that are chosen, of all if None
    seed: int = 0,
) -> Experts:
    """Normal inputs, equal for equal arguments; k different experts a token unless `only` has fewer."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype)

    chosen = torch.tensor(range(E) if only is None else only)
    picks = torch.rand(T, len(chosen), generator=random).argsort(1)
    experts = chosen[picks.repeat(1, -(-k // len(chosen)))[:, :k]].to(torch.int32)
    weights = torch.rand(T, k, generator=random, dtype=torch.float64).to(accumulation_dtype(dtype))
    return Experts(
        x=normal(T, D),
        gate_up=normal(E, 2 * F, D, scale=D**-0.5),
        down=normal(E, D, F, scale=F**-0.5),
        weights=weights,
        experts=experts,
        dy=normal(T, D),
        layout=layout,
    )


def _gate_and_up(gate_up: Any, layout: str) -> tuple[Any, Any]:
    """Views of the rows of both in [..., 2F, D]."""
    half = gate_up.shape[-2] // 2
    if layout == "interleaved":
        return gate_up[..., 0::2, :], gate_up[..., 1::2, :]
    return gate_up[..., :half, :], gate_up[..., half:, :]


def plain_mlp(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, layout: str
) -> Tensor:
    """Expert by expert, as it is usually written."""
    y = torch.zeros_like(x)
    for e in experts.unique().tolist():
        token, j = torch.where(experts == e)
        gate, up = _gate_and_up(gate_up[e], layout)
        each = F.linear(F.silu(F.linear(x[token], gate)) * F.linear(x[token], up), down[e])
        y = y.index_add(0, token, (each * weights[token, j, None]).to(y.dtype))
    return y


def differentiate(form: Callable[..., Tensor], a: Experts) -> Result:
    """y of form(x, gate_up, down, weights, experts, layout) and the gradients of <y, dy>, on the CPU."""
    leaves = [getattr(a, name).detach().requires_grad_() for name in LEAVES]
    y = form(*leaves, a.experts, a.layout)
    gradients = torch.autograd.grad(y, leaves, a.dy, materialize_grads=True)
    names = ("y", *("d" + name for name in LEAVES))
    return dict(zip(names, (t.detach().cpu() for t in (y, *gradients)), strict=True))


@functools.lru_cache(maxsize=256)
def mlp_truth(a: Experts) -> Result:
    """y and the gradients of <y, dy>, in NumPy's long double where float64 is what is tested, rounded to float64."""
    wide = np.longdouble if a.x.dtype == torch.float64 else np.float64
    x, gate_up, down, weights, dy = (
        t.double().numpy().astype(wide) for t in (a.x, a.gate_up, a.down, a.weights, a.dy)
    )
    experts = a.experts.numpy()
    y, dx, dweights = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
    dgate_up, ddown = np.zeros_like(gate_up), np.zeros_like(down)
    for e in range(len(down)):
        (gate, up), (dgate, dup) = (_gate_and_up(t[e], a.layout) for t in (gate_up, dgate_up))
        share = (weights * (experts == e)).sum(1, keepdims=True)
        g, u = x @ gate.T, x @ up.T
        sigmoid = 1 / (1 + np.exp(-g))
        act = g * sigmoid * u
        z = act @ down[e].T
        y += share * z
        dweights += (dy * z).sum(1, keepdims=True) * (experts == e)
        dz = share * dy
        da = dz @ down[e]
        dg, du = da * u * sigmoid * (1 + g * (1 - sigmoid)), da * g * sigmoid
        dx += dg @ gate + du @ up
        dgate[:], dup[:], ddown[e] = dg.T @ x, du.T @ x, dz.T @ act
    results = {"y": y, "dx": dx, "dgate_up": dgate_up, "ddown": ddown, "dweights": dweights}
    return {name: torch.from_numpy(t.astype(np.float64)) for name, t in results.items()}


@functools.lru_cache(maxsize=256)
def mlp_baseline(a: Experts) -> Result:
    return differentiate(plain_mlp, a)


def run_mlp(a: Experts, backend: str) -> Result:
    """moe_mlp on one backend, with its gradients."""

    def form(*args: Tensor) -> Tensor:
        *tensors, layout = args
        return moe_mlp(*tensors, layout=layout, backend=backend)

    return differentiate(form, a.to(device_of(backend)))


def check_mlp(actual: Result, a: Experts) -> None:
    """The rule for a result of moe_mlp on these inputs."""
    check_together([actual], [a])


def check_together(actual: list[Result], a: list[Experts]) -> None:
    """The rule for results on several inputs as one: of few numbers the errors of both sides are a matter of luck."""
    expected, plain = [mlp_truth(b) for b in a], [mlp_baseline(b) for b in a]
    for name in actual[0]:
        y, z, p = (torch.cat([r[name] for r in results]) for results in (actual, expected, plain))
        assert_close_to_truth(y, z, p, name=name)


# ---- products of groups ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Groups:
    """The arguments of one grouped_gemm, and the gradient that comes back. Never written to."""

    x: Tensor
    w: Tensor
    offs: Tensor
    dy: Tensor

    def to(self, device: str) -> "Groups":
        return Groups(*(t.to(device) for t in vars(self).values()))


@functools.lru_cache(maxsize=512)
def make_groups(
    counts: tuple[int, ...], N: int, K: int, dtype: torch.dtype = torch.float32, *, rest: int = 0
) -> Groups:
    """Groups of these rows, and `rest` rows after the last."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    M = sum(counts) + rest
    offs = torch.tensor(counts).cumsum(0).to(torch.int32)
    return Groups(normal(M, K), normal(len(counts), N, K), offs, normal(M, N))


def plain_gemm(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    """Group by group."""
    begins, ends = [0, *offs.tolist()], [*offs.tolist(), len(x)]
    parts = [x[a:b] @ m.T for a, b, m in zip(begins, ends, w, strict=False)]
    return torch.cat([*parts, x.new_zeros(len(x) - begins[-1], w.shape[1])])


def differentiate_gemm(form: Callable[..., Tensor], a: Groups) -> Result:
    """y of form(x, w, offs) and the gradients of <y, dy>, on the CPU."""
    leaves = [t.detach().requires_grad_() for t in (a.x, a.w)]
    y = form(*leaves, a.offs)
    gradients = torch.autograd.grad(y, leaves, a.dy, materialize_grads=True)
    return dict(zip(("y", "dx", "dw"), (t.detach().cpu() for t in (y, *gradients)), strict=True))


def run_gemm(a: Groups, backend: str) -> Result:
    return differentiate_gemm(functools.partial(grouped_gemm, backend=backend), a.to(device_of(backend)))


def gemm_truth(a: Groups) -> Result:
    """As `mlp_truth`."""
    wide = np.longdouble if a.x.dtype == torch.float64 else np.float64
    x, w, dy = (t.double().numpy().astype(wide) for t in (a.x, a.w, a.dy))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for e, (begin, end) in enumerate(pairwise([0, *a.offs.tolist()])):
        rows = slice(begin, end)
        y[rows], dx[rows], dw[e] = x[rows] @ w[e].T, dy[rows] @ w[e], dy[rows].T @ x[rows]
    return {name: torch.from_numpy(t.astype(np.float64)) for name, t in {"y": y, "dx": dx, "dw": dw}.items()}


def check_gemm(actual: Result, a: Groups) -> None:
    """The rule for a result of grouped_gemm on these inputs."""
    expected, plain = gemm_truth(a), differentiate_gemm(plain_gemm, a)
    for name, y in actual.items():
        assert_close_to_truth(y, expected[name], plain[name], name=name)
