"""Autocast: what is cast, what is not, and the dtypes that come back.

Within autocast a call is the call on inputs cast by hand, bit by bit; so are its gradients, cast back.
"""

import pytest
import torch
from support import HALF, ON_CPU, Inputs, assert_same_bits, device_of, dtype_id, make_inputs
from torch import Tensor

from lightning_attn import (
    GatedRMSNorm,
    LightningAttention,
    decay,
    gated_rms_norm,
    lightning_attention,
    lightning_attention_decode,
)

Leaves = tuple[Tensor, Tensor, Tensor, Tensor]

half = pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
inputs_dtype = pytest.mark.parametrize("given", [torch.float32, *HALF], ids=lambda d: f"from-{dtype_id(d)}")


def autocast(dtype: torch.dtype, backend: str = "auto") -> torch.autocast:
    return torch.autocast(device_of(backend), dtype=dtype)


def leaves_of(x: Inputs, dtype: torch.dtype) -> Leaves:
    """q, k, v of this dtype, and initial_state: fresh, and each requires grad."""
    q, k, v = (t.to(dtype, copy=True).requires_grad_() for t in (x.q, x.k, x.v))
    return q, k, v, x.initial_state.clone().requires_grad_()


def attend(
    x: Inputs, q: Tensor, k: Tensor, v: Tensor, initial: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return lightning_attention(
        q, k, v, x.decay, scale=x.scale, initial_state=initial, return_state=True, backend=backend
    )


@half
@inputs_dtype
@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
def test_attention(backend: str, dtype: torch.dtype, given: torch.dtype, inside: bool) -> None:
    """Row 20: o in autocast's dtype, states and decay in float32, each gradient in the dtype of its input."""
    x = make_inputs(B=2, T=70, H=3, K=16, V=24).to(device_of(backend))
    leaves = leaves_of(x, given)
    with autocast(dtype, backend):
        o, state = attend(x, *leaves, backend)
        if inside:
            actual = torch.autograd.grad((o, state), leaves, (x.do.to(dtype), x.dstate))
    if not inside:
        actual = torch.autograd.grad((o, state), leaves, (x.do.to(dtype), x.dstate))
    assert o.dtype == dtype and state.dtype == torch.float32
    assert [g.dtype for g in actual] == [given, given, given, torch.float32]

    cast = [t.detach().to(dtype).requires_grad_() for t in leaves[:3]]
    by_hand = *cast, leaves[3]
    expected_o, expected_state = attend(x, *by_hand, backend)
    assert_same_bits(o, expected_o, "o")
    assert_same_bits(state, expected_state, "state")
    gradients = torch.autograd.grad((expected_o, expected_state), by_hand, (x.do.to(dtype), x.dstate))
    for a, b in zip(actual, gradients, strict=True):
        assert_same_bits(a, b.to(a.dtype), "gradient")


@half
def test_decay_is_not_rounded(backend: str, dtype: torch.dtype) -> None:
    """Row 20: a decay that a 16-bit dtype would round is used as it is: what is left of the first of 4,000
    tokens tells."""
    T, eps = 4000, torch.finfo(dtype).eps
    device = device_of(backend)
    rate = torch.tensor([0.005]).to(dtype).float()
    rate += 0.49 * (torch.nextafter(rate.to(dtype), torch.ones(1, dtype=dtype)) - rate)
    if_rounded = torch.exp((rate - rate.to(dtype)) * (T - 1)).item()
    assert abs(if_rounded - 1) > 4 * eps
    q, k, v = (torch.zeros(1, T, 1, 1, device=device) for _ in range(3))
    k[0, 0] = v[0, 0] = 1
    with autocast(dtype, backend):
        _, state = lightning_attention(q, k, v, rate.to(device), return_state=True, backend=backend)
    exact = torch.exp(-(T - 1) * rate.double())
    assert abs(state.item() / exact.item() - 1) < eps


@pytest.mark.parametrize("backend", ON_CPU)
@half
def test_float64_is_left_alone(backend: str, dtype: torch.dtype) -> None:
    """Row 20: as PyTorch's own operators do, autocast does not touch float64."""
    x = make_inputs(B=2, T=20, H=3, K=16, V=24, dtype=torch.float64)
    leaves = leaves_of(x, torch.float64)
    with autocast(dtype, backend):
        o, state = attend(x, *leaves, backend)
        y = gated_rms_norm(o, o.detach() * 2, torch.ones(24, dtype=torch.float64), backend=backend)
        q, k, v = (t.detach() for t in leaves[:3])
        step = lightning_attention_decode(q, k, v, x.decay, state.detach().clone(), backend=backend)
    assert o.dtype == state.dtype == y.dtype == step.dtype == torch.float64
    gradients = torch.autograd.grad((y, state), leaves, (torch.ones_like(y), x.dstate))
    assert all(g.dtype == torch.float64 for g in gradients)
    assert_same_bits(o, attend(x, *leaves, backend)[0], "o")


@half
def test_mixed_inputs(backend: str, dtype: torch.dtype) -> None:
    """Row 20: inputs of several dtypes, an error elsewhere, are cast to one. Autocast switched off again is
    off."""
    x = make_inputs(B=2, T=20, H=3, K=16, V=24).to(device_of(backend))
    q, k, v = x.q.to(dtype), x.k.half(), x.v
    with pytest.raises(TypeError, match="expected [kv] of q's dtype"):
        lightning_attention(q, k, v, x.decay, backend=backend)
    with autocast(dtype, backend):
        o = lightning_attention(q, k, v, x.decay, backend=backend)
        expected = lightning_attention(q, k.to(dtype), v.to(dtype), x.decay, backend=backend)
        assert_same_bits(o, expected, "o")
        with torch.autocast(device_of(backend), enabled=False):
            assert lightning_attention(x.q, x.k, x.v, x.decay, backend=backend).dtype == torch.float32
            with pytest.raises(TypeError, match="expected [kv] of q's dtype"):
                lightning_attention(q, k, v, x.decay, backend=backend)


@pytest.mark.op("attention_decode")
@half
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=lambda d: f"state-{dtype_id(d)}")
def test_decode(backend: str, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    """Row 20: the caller's own state is updated, in its own dtype; o is in autocast's."""
    x = make_inputs(B=2, T=2, H=3, K=16, V=24).to(device_of(backend))
    states = [x.initial_state.to(state_dtype, copy=True) for _ in range(2)]
    with autocast(dtype, backend):
        o = lightning_attention_decode(x.q, x.k, x.v, x.decay, states[0], backend=backend)
    q, k, v = (t.to(dtype) for t in (x.q, x.k, x.v))
    expected = lightning_attention_decode(q, k, v, x.decay, states[1], backend=backend)
    assert_same_bits(o, expected, "o")
    assert states[0].dtype == state_dtype
    assert_same_bits(*states, "state")
    assert not torch.equal(states[0], x.initial_state.to(state_dtype))


@half
@inputs_dtype
def test_gated_rms_norm(backend: str, dtype: torch.dtype, given: torch.dtype) -> None:
    """Row 20: y in autocast's dtype; a float32 weight stays one; each gradient in the dtype of its input."""
    random = torch.Generator().manual_seed(0)
    device = device_of(backend)
    x, gate, dy = (torch.randn(4, 5, 33, generator=random).to(device, given) for _ in range(3))
    weight = torch.randn(33, generator=random).to(device)
    leaves = [t.requires_grad_() for t in (x, gate, weight)]
    with autocast(dtype, backend):
        y = gated_rms_norm(*leaves, backend=backend)
    actual = torch.autograd.grad(y, leaves, dy.to(dtype))
    assert y.dtype == dtype
    assert [g.dtype for g in actual] == [given, given, torch.float32]

    by_hand = [x.detach().to(dtype).requires_grad_(), gate.detach().to(dtype).requires_grad_(), weight]
    expected = gated_rms_norm(*by_hand, backend=backend)
    assert_same_bits(y, expected, "y")
    for a, b in zip(actual, torch.autograd.grad(expected, by_hand, dy.to(dtype)), strict=True):
        assert_same_bits(a, b.to(a.dtype), "gradient")


@half
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_module(backend: str, dtype: torch.dtype, masked: bool) -> None:
    """Row 20: a float32 module under autocast is the module of autocast's dtype: output, float32 state, and
    gradients, which are float32 like the parameters."""
    torch.manual_seed(0)
    module = LightningAttention(20, 3, 8, layer_idx=1, num_layers=4)
    with torch.no_grad():
        for p in module.parameters():  # so that it does not matter where a weight is rounded
            p.copy_(torch.randn_like(p).to(dtype))
    narrow = LightningAttention(20, 3, 8, layer_idx=1, num_layers=4, dtype=dtype)
    narrow.load_state_dict(module.state_dict())
    device = device_of(backend)
    module, narrow = module.to(device), narrow.to(device)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, 30, 20, generator=random).to(device)
    dy = torch.randn(2, 30, 20, generator=random).to(device, dtype)
    initial, dstate = (torch.randn(2, 3, 8, 8, generator=random).to(device) for _ in range(2))
    mask = torch.rand(2, 30, generator=random).to(device) > 0.3 if masked else None

    def run(module: LightningAttention, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        leaves = [x.requires_grad_(), initial.clone().requires_grad_(), *module.parameters()]
        y, state = module(leaves[0], state=leaves[1], return_state=True, attention_mask=mask, backend=backend)
        return y, state, torch.autograd.grad((y, state), leaves, (dy, dstate))

    with autocast(dtype, backend):
        y, state, gradients = run(module, x.clone())
    assert y.dtype == dtype and state.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in gradients)
    expected_y, expected_state, expected_gradients = run(narrow, x.to(dtype))
    assert_same_bits(y, expected_y, "y")
    assert_same_bits(state, expected_state, "state")
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert_same_bits(a.to(b.dtype), b, "gradient")


@half
def test_norm_module(dtype: torch.dtype) -> None:
    """Row 20: GatedRMSNorm keeps its float32 weight under autocast."""
    norm = GatedRMSNorm(33)
    x = torch.randn(4, 33, generator=torch.Generator().manual_seed(0))
    with autocast(dtype):
        y = norm(x, x.to(dtype))
    y.float().sum().backward()
    assert y.dtype == dtype and norm.weight.dtype == norm.weight.grad.dtype == torch.float32


def test_other_devices_autocast() -> None:
    """Row 20: autocast of another device type casts nothing here."""
    x = make_inputs(B=2, T=20, H=3, K=16, V=24)
    with torch.autocast("xpu", dtype=torch.bfloat16):
        assert lightning_attention(x.q, x.k, x.v, x.decay).dtype == torch.float32
    meta = [t.to("meta") for t in (x.q, x.k, x.v, decay.alibi(3))]
    with autocast(torch.bfloat16):
        assert lightning_attention(*meta).shape == x.v.shape
