"""What a state adds to the tokens after it, and its gradient to those before it: against the truth, and beside the whole."""

from dataclasses import replace

import pytest
import torch
from support import (
    DTYPES,
    LAYOUTS,
    Inputs,
    affordable,
    assert_close_to_truth,
    assert_same_bits,
    device_of,
    dtype_id,
    make_inputs,
)
from torch import Tensor

from lightning_attn import ops
from lightning_attn.backends import reference

pytestmark = pytest.mark.op("attention_history")

RATES = (0.0, 1e-6, 0.01, 0.3, 5.0, 1e4)
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def add(x: Inputs, out: Tensor, backend: str, reverse: bool) -> Tensor:
    """`out` [B, T, H, V] with what the initial state adds for q, in place."""
    y = x.to(device_of(backend))
    assert y.initial_state is not None
    ops.attention_history(y.q, y.initial_state, y.decay, y.scale, reverse, out, backend)
    return out


def weights(x: Inputs, reverse: bool, dtype: torch.dtype) -> Tensor:
    """scale * lambda^n, [1, T, H, 1]."""
    t = torch.arange(x.q.shape[1])
    n = len(t) - 1 - t if reverse else t + 1
    return torch.exp(-x.decay.to(dtype)[None] * n[:, None])[None, :, :, None] * x.scale


def exactly(x: Inputs, out: Tensor, reverse: bool) -> Tensor:
    """out_t + scale * lambda^n S^T q_t in float64."""
    assert x.initial_state is not None
    product = torch.einsum("bthk,bhkv->bthv", x.q.double(), x.initial_state.double())
    return out.double() + product * weights(x, reverse, torch.float64)


def plainly(x: Inputs, out: Tensor, reverse: bool) -> Tensor:
    """The same in the dtype of the inputs, with weighted rows and one product of matrices."""
    assert x.initial_state is not None
    dtype = x.q.dtype
    rows = x.q * weights(x, reverse, torch.promote_types(dtype, torch.float32)).to(dtype)
    return out + (rows.transpose(1, 2) @ x.initial_state.to(dtype)).transpose(1, 2)


def check(x: Inputs, backend: str, reverse: bool, out: Tensor | None = None) -> None:
    given = x.do if out is None else out
    actual = add(x, given.clone().to(device_of(backend)), backend, reverse).cpu()
    if x.q.numel():
        exact, plain = exactly(x, given, reverse), plainly(x, given, reverse)
        assert_close_to_truth(actual, exact, plain, name="out", head_dim=2)


@DIRECTIONS
@dtypes
@pytest.mark.parametrize("T", [0, 1, 63, 64, 65, 1000])
def test_history_obeys_the_rule(variant: str, T: int, dtype: torch.dtype, reverse: bool) -> None:
    """Row 1: of all rates, K unlike V; `out` holds something before."""
    x = make_inputs(B=2, T=affordable(variant, T, min(T, 200)), H=6, K=20, V=33, dtype=dtype, rates=RATES)
    check(x, variant, reverse)


@DIRECTIONS
@dtypes
@pytest.mark.parametrize("dims", [(1, 1), (128, 128), (256, 3)], ids=str)
def test_head_dims(variant: str, dims: tuple[int, int], dtype: torch.dtype, reverse: bool) -> None:
    """Row 12."""
    K, V = dims
    check(make_inputs(B=1, T=70, H=2, K=K, V=V, dtype=dtype, rates=(0.02, 0.4)), variant, reverse)


@DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
def test_it_goes_as_far_as_it_counts(variant: str, dtype: torch.dtype, reverse: bool) -> None:
    """Row 16: `out` is zero, so that nothing hides what is far from the state; several spans of tokens."""
    T = affordable(variant, 3000, 1100)
    x = make_inputs(B=1, T=T, H=3, K=8, V=8, dtype=dtype, rates=(0.02, 1e-4, 0.4))
    nothing = torch.zeros_like(x.do)
    far = torch.arange(T) > 600
    q = x.q * (far.flip(0) if reverse else far)[None, :, None, None]  # only far tokens read it
    check(replace(x, q=q), variant, reverse, nothing)


@DIRECTIONS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(variant: str, layout: str, reverse: bool) -> None:
    """Row 10: x of any strides; `out` a part of something larger, which stays as it is around it."""
    x = make_inputs(B=2, T=66, H=3, K=16, V=24)
    whole = torch.full((2, 70, 3, 24), 7.0, device=device_of(variant))
    whole[:, 2:68] = x.do.to(whole)
    add(replace(x, q=LAYOUTS[layout](x.q)), whole[:, 2:68], variant, reverse)
    alone = add(x, x.do.clone().to(whole.device), variant, reverse)
    assert_same_bits(whole[:, 2:68], alone)
    assert (whole[:, :2] == 7).all() and (whole[:, 68:] == 7).all()


def test_it_completes_the_attention(variant: str) -> None:
    """The attention without its initial state, and this, are the attention with it; and so the gradients of k and v."""
    x = make_inputs(B=2, T=130, H=3, K=16, V=16, rates=(0.0, 0.02, 0.4)).double()
    dtype = torch.float64 if variant in ("reference", "cpu") else torch.float32
    y = Inputs(
        **{n: t.to(dtype) if isinstance(t, Tensor) and n != "decay" else t for n, t in vars(x).items()}
    )
    assert y.initial_state is not None
    shared = y.q, y.k, y.v, y.decay, y.scale
    device = device_of(variant)
    shared = tuple(t.to(device) if isinstance(t, Tensor) else t for t in shared)  # type: ignore[assignment]
    S, R, do = (t.to(device) for t in (y.initial_state, y.dstate, y.do))
    with_state, _ = ops.attention_forward(*shared, S, None, False, variant)
    o, _ = ops.attention_forward(*shared, None, None, False, variant)
    ops.attention_history(shared[0], S, shared[3], y.scale, False, o, variant)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(o, with_state, rtol=0, atol=tolerance * with_state.abs().max().item())
    _, dk, dv, _ = ops.attention_backward(do, R, *shared, None, None, variant)
    _, k_without, v_without, _ = ops.attention_backward(do, None, *shared, None, None, variant)
    ops.attention_history(shared[1], R, shared[3], 1.0, True, v_without, variant)
    ops.attention_history(shared[2], R.mT, shared[3], 1.0, True, k_without, variant)
    for got, want in ((k_without, dk), (v_without, dv)):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item())


def test_autograd_knows_that_it_writes(variant: str) -> None:
    """A tensor that was saved for a backward and is then added to is found out."""
    x = make_inputs(B=1, T=5, H=2, K=4, V=4).to(device_of(variant))
    assert x.initial_state is not None
    out = x.do.clone()
    before = out._version
    ops.attention_history(x.q, x.initial_state, x.decay, 1.0, False, out, variant)
    assert out._version > before


def test_truth_of_these_tests() -> None:
    """The formula above is what the block form adds for an initial state."""
    x = make_inputs(B=2, T=50, H=3, K=5, V=4, dtype=torch.float64)
    with_state, _ = reference.block_form(x.q, x.k, x.v, x.decay, scale=x.scale, initial_state=x.initial_state)
    without, _ = reference.block_form(x.q, x.k, x.v, x.decay, scale=x.scale)
    torch.testing.assert_close(exactly(x, without, False), with_state, rtol=0, atol=1e-12)
