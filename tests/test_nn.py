"""The modules: against a recurrence in float64, against transformers, and as PyTorch modules."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import (
    BACKENDS,
    DTYPES,
    LAYOUTS,
    Result,
    assert_close_to_truth,
    assert_same_bits,
    dtype_id,
    offsets,
    poisoned_memory,
)
from torch import Tensor

from lightning_attn import GatedRMSNorm, LightningAttention, decay
from lightning_attn.backends import reference

ON_CPU = [name for name in BACKENDS if name in ("reference", "cpu")]
HIDDEN, HEADS, DIM = 20, 3, 8
PARAMETERS = ["qkv_proj.weight", "output_gate.weight", "norm.weight", "out_proj.weight"]

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


def ours(module: LightningAttention, **options: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """The module as a function of its parameters."""

    def form(parameters: dict[str, Tensor], x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(
            module, parameters, (x,), {"state": state, "return_state": True, **options}
        )

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


@on_cpu
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


@on_cpu
@pytest.mark.parametrize("B, T", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_empty(backend: str, B: int, T: int, masked: bool) -> None:
    """Row 11: no tokens, no sequences."""
    module, state = layer(), states(B)
    mask = torch.ones(B, T) if masked else None
    x = normal(B, T, HIDDEN).requires_grad_()
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


@on_cpu
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


@on_cpu
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


@on_cpu
def test_all_padding(backend: str) -> None:
    """Row 7: a sequence of padding only returns its state untouched, with no state zeros; its gradient passes
    through."""
    module, mask = layer(), torch.zeros(2, 6)
    x, first = torch.full((2, 6, HIDDEN), float("nan")), states(2).requires_grad_()
    y, last = module(x, state=first, return_state=True, attention_mask=mask, backend=backend)
    assert_same_bits(last, first, "state")
    assert_same_bits(y.detach(), torch.zeros(2, 6, HIDDEN), "y")
    (gradient,) = torch.autograd.grad(last, first, states(2, seed=8), retain_graph=True)
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


# ---- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, match, x, options",
    [
        (ValueError, "expected x of shape", (2, 20), {}),
        (ValueError, "expected x of shape", (2, 5, HIDDEN + 1), {}),
        (ValueError, "expected x of shape", (2, 5, 1, HIDDEN), {}),
        (
            ValueError,
            "expected attention_mask of shape",
            (2, 5, HIDDEN),
            {"attention_mask": torch.ones(2, 4)},
        ),
        (ValueError, "expected attention_mask of shape", (2, 5, HIDDEN), {"attention_mask": torch.ones(5)}),
        (TypeError, "expected attention_mask", (2, 5, HIDDEN), {"attention_mask": [[1] * 5] * 2}),
        (ValueError, "attention_mask", (2, 5, HIDDEN), {"attention_mask": torch.ones(2, 5, device="meta")}),
        (
            ValueError,
            "expected attention_mask or cu_seqlens, got both",
            (1, 5, HIDDEN),
            {"attention_mask": torch.ones(1, 5), "cu_seqlens": torch.tensor([0, 5])},
        ),
        (ValueError, "cu_seqlens", (2, 5, HIDDEN), {"cu_seqlens": torch.tensor([0, 5])}),
        (ValueError, "cu_seqlens", (1, 5, HIDDEN), {"cu_seqlens": torch.tensor([0, 4])}),
        (ValueError, "state of shape", (2, 5, HIDDEN), {"state": torch.zeros(1, HEADS, DIM, DIM)}),
        (TypeError, "state of dtype", (2, 5, HIDDEN), {"state": states(2).double()}),
        (TypeError, "state", (2, 5, HIDDEN), {"state": 0}),
        (
            ValueError,
            "state of shape",
            (2, 5, HIDDEN),
            {"state": torch.zeros(1, HEADS, DIM, DIM), "attention_mask": torch.ones(2, 5)},
        ),
        (
            TypeError,
            "state of dtype",
            (2, 5, HIDDEN),
            {"state": states(2).double(), "attention_mask": torch.ones(2, 5)},
        ),
        (TypeError, "state", (2, 5, HIDDEN), {"state": [0.0], "attention_mask": torch.ones(2, 5)}),
        (ValueError, "expected backend", (2, 5, HIDDEN), {"backend": "nonsense"}),
        (TypeError, "expected backend to be a str", (2, 5, HIDDEN), {"backend": None}),
    ],
)
def test_bad_input(error: type[Exception], match: str, x: tuple[int, ...], options: dict[str, Any]) -> None:
    """Row 13: names the argument, what was expected and what came."""
    with pytest.raises(error, match=match) as raised:
        layer()(normal(*x), **options)
    assert "expected" in str(raised.value) and "got" in str(raised.value)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"layer_idx": 4, "num_layers": 4}, "layer_idx"),
        ({"layer_idx": -1, "num_layers": 4}, "layer_idx"),
        ({"num_heads": 0, "layer_idx": 0, "num_layers": 4}, "num_heads"),
    ],
)
def test_bad_construction(options: dict[str, int], match: str) -> None:
    """Row 13: a layer that cannot be is not made."""
    with pytest.raises(ValueError, match=match):
        LightningAttention(**{"hidden_size": 4, "num_heads": 2, "head_dim": 2, **options})
    with pytest.raises(TypeError, match="positional"):
        LightningAttention(4, 2, 2, 0, 4)  # which is the layer, which the number of layers?


# ---- as a module ------------------------------------------------------------------------------------------


def test_parameters() -> None:
    """The names and shapes of the released checkpoint, and nothing else: no bias, no buffer that would be
    saved."""
    module = LightningAttention(24, 3, 8, layer_idx=0, num_layers=1)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "qkv_proj.weight": (72, 24),
        "output_gate.weight": (24, 24),
        "norm.weight": (24,),
        "out_proj.weight": (24, 24),
    }
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == shapes
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    assert torch.equal(module.norm.weight, torch.ones(24))
    wide = LightningAttention(10, 3, 8, layer_idx=0, num_layers=1, dtype=torch.bfloat16)
    assert wide.qkv_proj.weight.shape == (72, 10) and wide.out_proj.weight.shape == (10, 24)
    assert all(p.dtype == torch.bfloat16 for p in wide.parameters()) and wide.decay.dtype == torch.float32
    assert all(f"{name}={value}" in repr(wide) for name, value in (("num_heads", 3), ("head_dim", 8)))


def test_checkpoint_shapes() -> None:
    """The released layer: shapes and number of parameters."""
    module = LightningAttention(6144, 64, 128, layer_idx=0, num_layers=80, device="meta")
    assert module.qkv_proj.weight.shape == (24576, 6144) and module.out_proj.weight.shape == (6144, 8192)
    assert module.output_gate.weight.shape == (8192, 6144) and module.norm.weight.shape == (8192,)
    assert sum(p.numel() for p in module.parameters()) == 251_666_432


def test_interleaved_heads() -> None:
    """The rows of qkv_proj are q | k | v per head, as in the checkpoint: only then is this layer's state
    known."""
    module = LightningAttention(2, 2, 1, layer_idx=0, num_layers=2)
    with torch.no_grad():
        module.qkv_proj.weight.copy_(torch.arange(1.0, 13).reshape(6, 2))
        x = torch.tensor([[[1.0, 0.0]]])
        _, state = module(x, return_state=True)
    silu = F.silu(torch.tensor([1.0, 3, 5, 7, 9, 11]))  # q0 k0 v0 q1 k1 v1
    torch.testing.assert_close(state.flatten(), torch.stack([silu[1] * silu[2], silu[4] * silu[5]]))


def test_state_dict_round_trip() -> None:
    """Strictly, and a missing, an extra or a misshapen tensor is an error."""
    module, other = layer(), LightningAttention(HIDDEN, HEADS, DIM, layer_idx=1, num_layers=4)
    x = normal(2, 10, HIDDEN)
    assert not torch.equal(module(x), other(x))
    saved = module.state_dict()
    assert list(saved) and other.load_state_dict(saved, strict=True)
    assert_same_bits(other(x), module(x))
    for name in PARAMETERS:
        without = {n: t for n, t in saved.items() if n != name}
        with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
            other.load_state_dict(without)
        with pytest.raises(RuntimeError, match="size mismatch"):
            other.load_state_dict({**saved, name: saved[name][:-1]})
    with pytest.raises(RuntimeError, match="Unexpected key.*decay"):
        other.load_state_dict({**saved, "decay": module.decay})


CASTS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "bfloat16": lambda m: m.bfloat16(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "there and back": lambda m: m.half().float(),
    "to(cpu)": lambda m: m.to("cpu"),
    "in a model": lambda m: torch.nn.Sequential(m).to(torch.bfloat16)[0],
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=list(CASTS))
def test_decay_stays_float32(cast: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    """Row 16: no dtype of the module rounds the rates. Rounded to bfloat16 they are wrong by as much as
    0.4%."""
    rates = decay.minimax(HEADS, 1, 4)
    assert not torch.equal(rates.bfloat16().float(), rates) and not torch.equal(rates.half().float(), rates)
    module = cast(layer())
    assert_same_bits(module.decay, rates, "decay")
    dtype = module.out_proj.weight.dtype
    y, state = module(normal(2, 10, HIDDEN, dtype=dtype), return_state=True)
    assert y.dtype == dtype and state.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("how", ["to_empty", "assign"])
@pytest.mark.parametrize("made", ["device", "context"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_meta_device(how: str, made: str, dtype: torch.dtype) -> None:
    """Made without memory, then filled, alone or in a model: the rates are there although no checkpoint has
    them."""
    source = layer(dtype)
    shape = HIDDEN, HEADS, DIM
    options: dict[str, Any] = {"layer_idx": 1, "num_layers": 4, "dtype": dtype}
    if made == "device":
        module = LightningAttention(*shape, **options, device="meta")
    else:
        with torch.device("meta"):
            module = LightningAttention(*shape, **options)
    x = normal(2, 10, HIDDEN, dtype=dtype)
    assert all(p.is_meta for p in module.parameters()) and module.decay.is_meta
    y, state = module(x.to("meta"), return_state=True)
    assert y.is_meta and y.shape == x.shape and y.dtype == dtype and state.dtype == torch.float32

    model = torch.nn.Sequential(module)
    saved = {f"0.{name}": t for name, t in source.state_dict().items()}
    if how == "to_empty":
        with poisoned_memory():
            model.to_empty(device="cpu")
        model.load_state_dict(saved)
    else:
        model.load_state_dict(saved, assign=True)
    assert_same_bits(module.decay, source.decay, "decay")
    assert_same_bits(model(x), source(x))


def test_copies() -> None:
    """deepcopy, pickle and torch.save keep weights and rates, and share no memory with the original."""
    module, x = layer(layer_idx=2), normal(2, 10, HIDDEN)
    expected = module(x).detach()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ]
    with torch.no_grad():
        for tensor in (*module.parameters(), module.decay):
            tensor.fill_(0.5)
    for other in copies:
        assert_same_bits(other(x).detach(), expected)
        assert_same_bits(other.bfloat16().decay, decay.minimax(HEADS, 2, 4), "decay")
        assert other.layer_idx == 2 and list(other.state_dict()) == list(module.state_dict())


def test_saved_weights_alone() -> None:
    """The state_dict passes through torch.save and the safe torch.load."""
    module, buffer = layer(), io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = LightningAttention(HIDDEN, HEADS, DIM, layer_idx=1, num_layers=4)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_bits(other(normal(2, 10, HIDDEN)), module(normal(2, 10, HIDDEN)))


def test_trains() -> None:
    """Some steps of an optimizer lower a loss; every parameter moves, the rates do not."""
    torch.manual_seed(0)
    module, x, goal = layer(), normal(2, 30, HIDDEN), normal(2, 30, HIDDEN, seed=1)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    rates = module.decay.clone()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(module(x), goal)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert_same_bits(module.decay, rates)


def test_causal() -> None:
    """A later token changes no bit of an earlier output, an earlier token does change a later output."""
    module, x = layer(), normal(2, 30, HIDDEN)
    changed = x.clone()
    changed[:, 20] += 1
    a, b = module(x), module(changed)
    assert_same_bits(a[:, :20], b[:, :20])
    assert (a[:, 20:] != b[:, 20:]).any(-1).all()


# ---- GatedRMSNorm -----------------------------------------------------------------------------------------


@on_cpu
@dtypes
def test_gated_rms_norm(backend: str, dtype: torch.dtype) -> None:
    """Row 1: the module is the formula, with its own weight and eps."""
    norm = GatedRMSNorm(33, eps=0.25).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(normal(33, seed=2))
    x, gate = (normal(4, 5, 33, seed=seed, dtype=dtype) for seed in (0, 1))

    def formula(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (33,), weight, 0.25) * gate.sigmoid()

    x_, gate_, weight_ = x.double(), gate.double(), norm.weight.detach().double()
    expected = x_ * weight_ / ((x_.square().mean(-1, keepdim=True) + 0.25).sqrt() * (1 + (-gate_).exp()))
    y = norm(x, gate, backend=backend).detach()
    if dtype == torch.float64:
        torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    else:
        assert_close_to_truth(y, expected, formula(x, gate, norm.weight).detach())
    norm(x, gate, backend=backend).sum().backward()
    assert norm.weight.grad.dtype == dtype and norm.weight.grad.any()


def test_gated_rms_norm_module() -> None:
    """One parameter, `weight`, of ones; device and dtype as asked for; it says what it is."""
    norm = GatedRMSNorm(5)
    assert {n: p.tolist() for n, p in norm.state_dict().items()} == {"weight": [1.0] * 5}
    assert norm.eps == 1e-6 and norm.weight.requires_grad
    assert GatedRMSNorm(5, dtype=torch.float16).weight.dtype == torch.float16
    assert GatedRMSNorm(5, device="meta").weight.is_meta
    assert repr(GatedRMSNorm(5, eps=0.5)) == "GatedRMSNorm(5, eps=0.5)"
    with pytest.raises(ValueError, match="expected weight of shape"):
        norm(torch.ones(2, 6), torch.ones(2, 6))


@on_cpu
def test_gated_rms_norm_many_rows(backend: str) -> None:
    """Row 1: the gradient of the weight sums over all tokens; in float32 its error may not grow with their
    number."""
    for rows in (64, 1024, 16384):
        x, gate, dy = (normal(rows, 24, seed=seed) for seed in range(3))
        norm = GatedRMSNorm(24)
        (actual,) = torch.autograd.grad(norm(x, gate, backend=backend), norm.weight, dy)
        plain_y = F.rms_norm(x, (24,), norm.weight, norm.eps) * gate.sigmoid()
        (baseline,) = torch.autograd.grad(plain_y, norm.weight, dy)
        x_, gate_, dy_ = x.double(), gate.double(), dy.double()
        rstd = (x_.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        expected = (dy_ * x_ * rstd * gate_.sigmoid()).sum(0)
        assert_close_to_truth(actual, expected, baseline, name=f"dweight of {rows} rows")
