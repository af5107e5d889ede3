"""What LightningAttention computes: against float64 and transformers; in steps, strided, packed."""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from nn_support import (
    HEADS,
    HIDDEN,
    assert_results,
    dtypes,
    here,
    layer,
    normal,
    on_cpu,
    ours,
    plain,
    recurrence,
    run_all,
    states,
)
from support import (
    LAYOUTS,
    Result,
    assert_same_bits,
    device_of,
    offsets,
)
from torch import Tensor

from lightning_attn import LightningAttention, decay


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


@on_cpu
@dtypes
def test_decode_in_place(backend: str, dtype: torch.dtype) -> None:
    """Row 18: one token at a time on a pool of states is one call; -1 is padding, other rows stay as they are."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    module, x, first = layer(dtype), normal(2, 9, HIDDEN).to(dtype), states(2).to(wide)
    pool = torch.full((5, *first.shape[1:]), 7, dtype=wide)
    pool[[3, 1]] = first
    slots = torch.tensor([3, -1, 1])
    rows = torch.stack([x[0], torch.full_like(x[0], torch.nan), x[1]])
    with torch.no_grad():
        truth = copy.deepcopy(module).double()(
            x.double(), state=first.double(), return_state=True, backend="reference"
        )
        plain_ = module(x, state=first, return_state=True, backend="reference")
        y = torch.cat(
            [module.decode(token, pool, slots=slots, backend=backend) for token in rows.split(1, 1)], 1
        )
    for got, exact, other in zip((y[::2], pool[[3, 1]]), truth, plain_, strict=True):
        error, allowed = ((r.double() - exact).abs().max() for r in (got, other))
        assert error <= 2 * allowed + 4 * torch.finfo(got.dtype).eps * exact.abs().max()
    assert (pool[[0, 2, 4]] == 7).all()


def test_decode_wants_no_gradient() -> None:
    module = layer()
    with pytest.raises(ValueError, match="requires grad"):
        module.decode(normal(2, 1, HIDDEN), states(2))
    with torch.no_grad(), pytest.raises(ValueError, match=r"x of shape \[B, T, "):
        module.decode(normal(2, 1, HIDDEN + 1), states(2))


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
