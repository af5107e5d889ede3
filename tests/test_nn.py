"""What LightningAttention computes: against float64 and transformers; in steps, strided, packed, padded."""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from nn_support import DIM, HEADS, HIDDEN, PARAMETERS, dtypes, here, layer, normal, on_cpu, states
from support import (
    LAYOUTS,
    Result,
    assert_close_to_truth,
    assert_same_bits,
    device_of,
    dtype_id,
    offsets,
    poisoned_memory,
)
from torch import Tensor

from lightning_attn import LightningAttention, decay
from lightning_attn.backends import reference


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


# ---- what the layer computes ------------------------------------------------------------------------------


@here
@dtypes
@pytest.mark.parametrize("T", [1, 70])
def test_against_the_recurrence(backend: str, dtype: torch.dtype, T: int) -> None:
    """Row 1: output, state and every gradient, within twice the error of plain PyTorch."""
    module = layer(dtype)
    options = {"rates": decay.minimax(HEADS, 1, 4)}
    run_all(
        module,
        (2, T),
        ours(module, backend=backend),
        partial(recurrence, **options),
        partial(plain, **options),
    )


@pytest.mark.parametrize("layer_idx, eps", [(0, 1e-6), (3, 1e-6), (1, 0.5)])
def test_layer_and_eps(layer_idx: int, eps: float) -> None:
    """Row 1: the rates follow the layer's index, the norm its eps; neither is a constant."""
    module = layer(layer_idx=layer_idx, norm_eps=eps)
    rates = decay.minimax(HEADS, layer_idx, 4)
    assert_same_bits(module.decay, rates)
    options = {"rates": rates, "eps": eps}
    run_all(module, (2, 20), ours(module), partial(recurrence, **options), partial(plain, **options))


@on_cpu
def test_gradcheck(backend: str) -> None:
    """Row 2: in float64, through output and state, in the input, the state and every parameter; with padding
    too."""
    torch.manual_seed(0)
    module = LightningAttention(3, 2, 2, layer_idx=0, num_layers=2, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]
    x, state = normal(2, 5, 3, dtype=torch.float64), normal(2, 2, 2, 2, dtype=torch.float64)
    leaves = [t.detach().requires_grad_() for t in (x, state, *module.parameters())]
    for mask in (None, torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]])):

        def call(x: Tensor, state: Tensor, *weights: Tensor, mask: Tensor | None = mask) -> Any:
            options = {"state": state, "return_state": True, "attention_mask": mask, "backend": backend}
            named = dict(zip(names, weights, strict=True))
            return torch.func.functional_call(module, named, (x,), options)

        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("layer_idx", [0, 2])
def test_against_transformers(layer_idx: int) -> None:
    """Row 1: transformers' own layer, same weights, an uncached float32 forward and backward of more than one
    of its blocks; held to twice its error. It computes the slopes of later layers otherwise, so ours are set
    to its."""
    modeling = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    H, D, hidden, layers = 4, 16, 48, 4
    config = modeling.MiniMaxConfig(
        hidden_size=hidden,
        num_attention_heads=H,
        num_key_value_heads=H,
        head_dim=D,
        num_hidden_layers=layers,
        layer_types=["linear_attention"] * layers,
    )
    torch.manual_seed(0)
    theirs = modeling.MiniMaxLightningAttention(config, layer_idx)
    with torch.no_grad():
        theirs.qkv_proj.weight.mul_(3)
        theirs.norm.weight.copy_(torch.randn(H * D) + 1)
    module = LightningAttention(hidden, H, D, layer_idx=layer_idx, num_layers=layers)
    missing, unexpected = module.load_state_dict(theirs.state_dict(), strict=False)
    assert missing == [] and set(unexpected) == {"slope_rate", "query_decay", "key_decay", "diagonal_decay"}
    rates = theirs.slope_rate.flatten()
    if layer_idx == 0:
        torch.testing.assert_close(module.decay, rates, rtol=1e-6, atol=0)
    module.decay.copy_(rates)

    def call(layer: torch.nn.Module, x: Tensor, dy: Tensor, **options: Any) -> Result:
        x = x.detach().requires_grad_()
        y, state = layer(x, **options)
        weights = dict(layer.named_parameters())
        gradients = torch.autograd.grad(y, [x, *weights.values()], dy)
        names = ["x", *sorted(weights)]
        by_name = dict(zip(["x", *weights], gradients, strict=True))
        return {"y": y.detach(), "state": state.detach(), **{f"d {n}": by_name[n] for n in names}}

    wide = copy.deepcopy(module).double()
    wide.decay.copy_(rates)
    assert wide.decay.dtype == torch.float32
    results: list[list[Result]] = [[], [], []]
    for seed in range(3):
        x, dy = (normal(2, 300, hidden, seed=10 * seed + i) for i in range(2))
        results[0].append(call(module, x, dy, return_state=True))
        results[1].append(call(wide, x.double(), dy.double(), return_state=True, backend="reference"))
        results[2].append(call(theirs, x, dy, position_embeddings=None, attention_mask=None))
    assert_results(*results)


@on_cpu
@dtypes
@pytest.mark.parametrize("cuts", [(1,), (69,), (30,), (7, 8, 9, 69), (0, 70), tuple(range(60, 70))], ids=str)
def test_prefill_then_decode(backend: str, dtype: torch.dtype, cuts: tuple[int, ...]) -> None:
    """Row 18: calls that pass the state on, of many tokens, of one, of none, are one call; their gradients,
    too."""
    module = layer(dtype)
    options = {"rates": module.decay}

    def in_steps(form: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def result(parameters: dict[str, Tensor], x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            outputs = []
            for a, b in itertools.pairwise((0, *cuts, 70)):
                y, state = form(parameters, x[:, a:b], state)
                outputs.append(y)
            return torch.cat(outputs, 1), state

        return result

    # The baseline takes the same steps: PyTorch's projection of one token rounds otherwise than that of many.
    baseline = in_steps(partial(plain, **options))
    run_all(
        module, (2, 70), in_steps(ours(module, backend=backend)), partial(recurrence, **options), baseline
    )


def test_state_is_not_written() -> None:
    """Row 18: the state that comes in stays as it is, and return_state changes no output."""
    module, x, state = layer(), normal(2, 10, HIDDEN), states(2)
    before = state.clone()
    y, _ = module(x, state=state, return_state=True)
    mask = torch.ones(2, 10)
    mask[0, 3] = 0
    module(x, state=state, attention_mask=mask)
    assert_same_bits(state, before, "state")
    assert_same_bits(module(x, state=state), y)
    assert_same_bits(module(x), module(x, state=torch.zeros_like(state)))


@here
@pytest.mark.parametrize("B, T", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_empty(backend: str, B: int, T: int, masked: bool) -> None:
    """Row 11: no tokens, no sequences."""
    device = device_of(backend)
    module, state = layer().to(device), states(B).to(device)
    mask = torch.ones(B, T, device=device) if masked else None
    x = normal(B, T, HIDDEN).to(device).requires_grad_()
    y, last = module(x, state=state, return_state=True, attention_mask=mask, backend=backend)
    assert y.shape == (B, T, HIDDEN)
    assert_same_bits(last, state, "state")
    y.sum().backward()
    assert x.grad.shape == x.shape and not module.out_proj.weight.grad.any()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "every_other_head"])
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_strided(layout: str, masked: bool) -> None:
    """Row 10: x and the state in any layout, x also as an expanded row."""
    module, x, state = layer(), normal(2, 10, HIDDEN), states(2)
    mask = normal(2, 10, seed=1) > 0 if masked else None
    options = {"return_state": True, "attention_mask": mask}
    expected = module(x, state=state, **options)
    strided = LAYOUTS[layout](x[:, :, None])[:, :, 0], LAYOUTS[layout](state)
    assert torch.equal(strided[0], x) and torch.equal(strided[1], state)
    for a, b in zip(module(strided[0], state=strided[1], **options), expected, strict=True):
        assert_same_bits(a, b)
    row = x[:, :1].expand(-1, 10, -1)
    assert_same_bits(module(row, attention_mask=mask), module(row.contiguous(), attention_mask=mask))


@here
@dtypes
def test_packed(backend: str, dtype: torch.dtype) -> None:
    """Row 18: packed sequences, some empty, are the sequences one by one: outputs, states, gradients."""
    module, lengths = layer(dtype), (5, 0, 1, 64, 0)
    cu_seqlens = offsets(lengths)

    def one_by_one(form: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def result(parameters: dict[str, Tensor], x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            parts = [
                form(parameters, x[:, a:b], state[n : n + 1], module.decay)
                for n, (a, b) in enumerate(itertools.pairwise(cu_seqlens.tolist()))
            ]
            return torch.cat([y for y, _ in parts], 1), torch.cat([last for _, last in parts])

        return result

    packed = ours(module, cu_seqlens=cu_seqlens, backend=backend)
    run_all(module, (1, 70), packed, one_by_one(recurrence), one_by_one(plain), N=5)


# ---- padding ----------------------------------------------------------------------------------------------

MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]],
    "both": [[0, 0, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0]],
    "holes": [[1, 0, 1, 0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 0, 1, 1, 1, 1]],
    "one token": [[0, 0, 0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1]],
    "no token": [[0, 0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0]],
    "all": [[1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]],
}

masks = pytest.mark.parametrize("mask", [torch.tensor(m) for m in MASKS.values()], ids=list(MASKS))


@here
@dtypes
@masks
def test_padding(backend: str, dtype: torch.dtype, mask: Tensor) -> None:
    """Row 7: padding, wherever it is, adds nothing and decays nothing: outputs, states and gradients are
    those of the sequences without it; the outputs of padding are zero."""
    module = layer(dtype)

    def one_by_one(parameters: dict[str, Tensor], x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, last = torch.zeros_like(x), []
        for b, real in enumerate(mask != 0):
            row, end = plain(parameters, x[b, real][None], state[b : b + 1], module.decay)
            y = y.index_put((torch.tensor(b), real.nonzero().flatten()), row[0])
            last.append(end)
        return y, torch.cat(last)

    truth = partial(recurrence, rates=module.decay, mask=mask)
    call = ours(module, attention_mask=mask, backend=backend)
    for result in run_all(module, (3, 9), call, truth, one_by_one):
        assert not result["y"][mask == 0].any() and not result["d x"][mask == 0].any()


@on_cpu
@masks
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30, 0.0])
def test_junk_in_padding(backend: str, mask: Tensor, junk: float) -> None:
    """Row 7: what stands in padding changes no bit: not of real outputs, not of states, not of any gradient,
    even if the gradients of the padded outputs are junk as well."""
    module, real = layer(), mask[..., None] != 0
    first, dstate = states(3), states(3, seed=8)
    x, dy = normal(3, 9, HIDDEN), normal(3, 9, HIDDEN, seed=3)
    call = ours(module, attention_mask=mask, backend=backend)
    with poisoned_memory():
        expected, actual = (
            differentiated(call, parameters_of(module, torch.float32), x_, first, dy_, dstate)
            for x_, dy_ in ((x, dy.where(real, 0)), (x.where(real, junk), dy.where(real, 5.0)))
        )
    for name, value in actual.items():
        assert value.isfinite().all(), name
        assert_same_bits(value, expected[name], name)
    assert not actual["y"][mask == 0].any()


@here
def test_all_padding(backend: str) -> None:
    """Row 7: a sequence of padding only returns its state untouched, with no state zeros; its gradient passes
    through."""
    device = device_of(backend)
    module, mask = layer().to(device), torch.zeros(2, 6, device=device)
    x, first = torch.full((2, 6, HIDDEN), float("nan"), device=device), states(2).to(device).requires_grad_()
    y, last = module(x, state=first, return_state=True, attention_mask=mask, backend=backend)
    assert_same_bits(last, first, "state")
    assert_same_bits(y.detach(), torch.zeros(2, 6, HIDDEN), "y")
    (gradient,) = torch.autograd.grad(last, first, states(2, seed=8).to(device), retain_graph=True)
    assert_same_bits(gradient, states(2, seed=8), "gradient of the state")
    y.sum().backward()
    assert not any(p.grad.any() for p in module.parameters())
    y, last = module(x, return_state=True, attention_mask=mask, backend=backend)
    assert_same_bits(last.detach(), torch.zeros(2, HEADS, DIM, DIM), "state from nothing")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32], ids=dtype_id)
def test_mask_dtypes(dtype: torch.dtype) -> None:
    """Row 7: nonzero is a real token, in any dtype."""
    module, x, mask = layer(), normal(3, 9, HIDDEN), torch.tensor(MASKS["holes"])
    expected = module(x, attention_mask=mask)
    assert_same_bits(module(x, attention_mask=mask.to(dtype)), expected)
    assert_same_bits(module(x, attention_mask=3 * mask.to(dtype)), expected)


def test_mask_of_ones_is_no_mask() -> None:
    """Row 7: and the rule holds for both: their bits may differ, for masked sequences are packed."""
    module, x = layer(torch.float64), normal(3, 80, HIDDEN, dtype=torch.float64)
    for a, b in zip(
        module(x, return_state=True, attention_mask=torch.ones(3, 80)),
        module(x, return_state=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@given(
    st.lists(st.lists(st.booleans(), min_size=11, max_size=11), min_size=1, max_size=4), st.integers(0, 11)
)
def test_any_mask_split_anywhere(mask: list[list[bool]], cut: int) -> None:
    """Rows 7, 18: any padding, cut anywhere: in float64 the two calls are one, and both are the
    recurrence."""
    module, real = layer(torch.float64), torch.tensor(mask)
    x, first = normal(len(mask), 11, HIDDEN, dtype=torch.float64), states(len(mask), torch.float64)
    with torch.no_grad():
        whole = module(x, state=first, return_state=True, attention_mask=real)
        y1, middle = module(x[:, :cut], state=first, return_state=True, attention_mask=real[:, :cut])
        y2, last = module(x[:, cut:], state=middle, return_state=True, attention_mask=real[:, cut:])
        expected = recurrence(dict(module.named_parameters()), x, first, module.decay, real)
    for actual in (whole, (torch.cat([y1, y2], 1), last)):
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
