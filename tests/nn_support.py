"""What the tests of the modules share: a small layer, its inputs, the recurrence that it must obey and plain PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import (
    BACKENDS,
    DTYPES,
    ON_CPU,
    Result,
    assert_close_to_truth,
    device_of,
    dtype_id,
)
from torch import Tensor

from lightning_attn import LightningAttention
from lightning_attn.backends import reference

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


# ---- the layer by its definition ---------------------------------------------------------------------------


def parameters_of(module: LightningAttention, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fresh leaves."""
    return {n: p.detach().to(dtype, copy=True).requires_grad_() for n, p in module.named_parameters()}


def recurrence(
    parameters: dict[str, Tensor],
    x: Tensor,
    state: Tensor,
    rates: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The layer token by token and head by head, as the paper writes it; padding is left out, its outputs
    zero."""
    qkv, gate, weight, out = (parameters[name] for name in PARAMETERS)
    keep = torch.exp(-rates.to(x.dtype))[:, None, None]  # [H, 1, 1]
    rows, last = [], []
    for b in range(x.shape[0]):
        S, tokens = state[b], []  # [H, K, V]
        for t in range(x.shape[1]):
            if mask is not None and not mask[b, t]:
                tokens.append(torch.zeros(HIDDEN, dtype=x.dtype))
                continue
            heads = (qkv @ x[b, t]).reshape(HEADS, 3, DIM)
            q, k, v = (heads / (1 + torch.exp(-heads))).unbind(1)  # SiLU, [H, D]
            S = keep * S + torch.einsum("hk,hv->hkv", k, v)
            o = torch.einsum("hk,hkv->hv", q, S).flatten()  # [H*D]
            o = o / torch.sqrt((o * o).mean() + eps) * weight / (1 + torch.exp(-(gate @ x[b, t])))
            tokens.append(out @ o)
        rows.append(torch.stack(tokens) if tokens else x[b])
        last.append(S)
    return torch.stack(rows), torch.stack(last)


def plain(
    parameters: dict[str, Tensor], x: Tensor, state: Tensor, rates: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The layer as it is usually written, in the dtype of its inputs."""
    qkv, gate, weight, out = (parameters[name] for name in PARAMETERS)
    q, k, v = F.silu(F.linear(x, qkv)).unflatten(-1, (HEADS, 3 * DIM)).chunk(3, -1)
    o, last = reference.block_form(q, k, v, rates, initial_state=state)
    o = F.rms_norm(o.flatten(-2), weight.shape, weight, eps) * F.linear(x, gate).sigmoid()
    return F.linear(o, out), last


def differentiated(
    form: Callable[..., tuple[Tensor, Tensor]],
    parameters: dict[str, Tensor],
    x: Tensor,
    state: Tensor,
    dy: Tensor,
    dstate: Tensor,
    **options: Any,
) -> Result:
    """y and the state of form(parameters, x, state), and all gradients of <y, dy> + <state, dstate>."""
    leaves = {
        "x": x.detach().clone().requires_grad_(),
        "state": state.detach().clone().requires_grad_(),
        **parameters,
    }
    y, last = form(parameters, leaves["x"], leaves["state"], **options)
    gradients = torch.autograd.grad((y, last), list(leaves.values()), (dy, dstate))
    return {
        "y": y.detach(),
        "last": last.detach(),
        **{f"d {n}": g for n, g in zip(leaves, gradients, strict=True)},
    }


def ours(
    module: LightningAttention, *, backend: str = "auto", **tensors: Tensor
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The module on one backend as a function of its parameters, from the CPU to the CPU."""
    device = device_of(backend)

    def form(parameters: dict[str, Tensor], x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        there = {n: t.to(device) for n, t in {"state": state, **tensors}.items()}
        options = {**there, "return_state": True, "backend": backend}
        own = {n: t.to(device) for n, t in {"decay": module.decay, **parameters}.items()}
        y, last = torch.func.functional_call(module, own, (x.to(device),), options)
        return y.cpu(), last.cpu()

    return form


def assert_results(actual: list[Result], expected: list[Result], baseline: list[Result]) -> None:
    """The rule for results of several draws of the same shapes, taken together: of one draw, and of tensors
    this small, the largest error is too much a matter of luck. In float64 the truth rounds as well, so there
    a few hundred roundings are allowed."""
    for name in expected[0]:
        a, e, b = (
            torch.stack([r[name].detach() for r in results]) for results in (actual, expected, baseline)
        )
        if a.dtype == torch.float64:
            assert (a - e).abs().max() <= 1e-13 * e.abs().max(), name
        else:
            assert_close_to_truth(a, e, b, name=name)


def run_all(
    module: LightningAttention,
    shape: tuple[int, int],
    form: Callable[..., tuple[Tensor, Tensor]],
    truth: Callable[..., tuple[Tensor, Tensor]],
    baseline: Callable[..., tuple[Tensor, Tensor]],
    N: int | None = None,
) -> list[Result]:
    """The rule for the outputs and gradients of `form`, of tokens x [B, T] and N (None: B) states; -> its
    results."""
    B, T = shape
    dtype = module.norm.weight.dtype
    results: list[list[Result]] = [[], [], []]
    for seed in range(0, 40, 10):
        x, dy = (normal(B, T, HIDDEN, seed=seed + i, dtype=dtype) for i in range(2))
        state, dstate = (states(B if N is None else N, dtype, seed=seed + i) for i in (2, 3))
        inputs = x, state, dy, dstate
        wide = [t.double() for t in inputs]
        results[0].append(differentiated(form, parameters_of(module, dtype), *inputs))
        results[1].append(differentiated(truth, parameters_of(module, torch.float64), *wide))
        results[2].append(differentiated(baseline, parameters_of(module, dtype), *inputs))
    assert_results(*results)
    return results[0]
