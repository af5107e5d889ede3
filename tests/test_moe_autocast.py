"""Row 20: the mixture of experts within autocast is the call on inputs cast by hand, bit by bit; so are its gradients, cast back."""

import pytest
import torch
from moe_support import LEAVES, make_experts, make_groups
from support import HALF, assert_same_bits, device_of, dtype_id

from lightning_attn import grouped_gemm, moe_mlp, quantize_experts

half = pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
inside = pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])


@pytest.mark.op("moe_mlp_forward")
@half
@inside
def test_moe_mlp(backend, dtype, inside):
    """The router's weights stay float32."""
    a = make_experts(T=30).to(device_of(backend))
    leaves = [getattr(a, name).detach().requires_grad_() for name in LEAVES]
    with torch.autocast(device_of(backend), dtype=dtype):
        y = moe_mlp(*leaves, a.experts, backend=backend)
        if inside:
            gradients = torch.autograd.grad(y, leaves, a.dy.to(dtype))
    if not inside:
        gradients = torch.autograd.grad(y, leaves, a.dy.to(dtype))
    assert y.dtype == dtype and all(g.dtype == torch.float32 for g in gradients)

    by_hand = [t.detach().to(dtype).requires_grad_() for t in leaves[:3]] + [leaves[3]]
    expected = moe_mlp(*by_hand, a.experts, backend=backend)
    assert_same_bits(y, expected, "y")
    for g, h in zip(gradients, torch.autograd.grad(expected, by_hand, a.dy.to(dtype)), strict=True):
        assert_same_bits(g, h.float(), "gradient")


@pytest.mark.op("grouped_gemm_forward")
@half
def test_grouped_gemm(backend, dtype):
    a = make_groups((3, 0, 40), N=24, K=16).to(device_of(backend))
    leaves = [t.detach().requires_grad_() for t in (a.x, a.w)]
    with torch.autocast(device_of(backend), dtype=dtype):
        y = grouped_gemm(*leaves, a.offs, backend=backend)
    gradients = torch.autograd.grad(y, leaves, a.dy.to(dtype))
    by_hand = [t.detach().to(dtype).requires_grad_() for t in leaves]
    expected = grouped_gemm(*by_hand, a.offs, backend=backend)
    assert_same_bits(y, expected)
    for g, h in zip(gradients, torch.autograd.grad(expected, by_hand, a.dy.to(dtype)), strict=True):
        assert_same_bits(g, h.float(), "gradient")


@pytest.mark.op("moe_mlp_forward")
@half
def test_int8(backend, dtype):
    """x is cast, the pairs are not."""
    a = make_experts(T=9).to(device_of(backend))
    pairs = quantize_experts(a.gate_up, a.down)
    with torch.autocast(device_of(backend), dtype=dtype):
        y = moe_mlp(a.x, *pairs, a.weights, a.experts, backend=backend)
    assert_same_bits(y, moe_mlp(a.x.to(dtype), *pairs, a.weights, a.experts, backend=backend))


@pytest.mark.op("moe_mlp_forward")
@pytest.mark.parametrize("dtype", [torch.float64], ids=dtype_id)
def test_float64_is_left_alone(backend, dtype):
    a = make_experts(T=9, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe_mlp(a.x, a.gate_up, a.down, a.weights, a.experts, backend=backend)
    assert_same_bits(y, moe_mlp(a.x, a.gate_up, a.down, a.weights, a.experts, backend=backend))


@pytest.mark.op("moe_mlp_forward")
def test_weights_of_the_dtype_that_x_had(backend):
    """They are allowed without autocast, and so within."""
    a = make_experts(T=9, dtype=torch.float16).to(device_of(backend))
    weights = a.weights.half()
    with torch.autocast(
        device_of(backend), dtype=torch.bfloat16 if backend in ("cpu", "reference") else torch.float16
    ):
        y = moe_mlp(a.x, a.gate_up, a.down, weights, a.experts, backend=backend)
    by_hand = [t.to(y.dtype) for t in (a.x, a.gate_up, a.down)]
    assert_same_bits(y, moe_mlp(*by_hand, weights.float(), a.experts, backend=backend))
