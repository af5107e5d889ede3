"""Experts in int8: what quantize_experts makes, and moe_mlp with it against the dequantised experts in float64."""

import pytest
import torch
from moe_support import LEAVES, make_experts, mlp_baseline, mlp_truth
from support import DTYPES, affordable, assert_close_to_truth, assert_same_bits, device_of, dtype_id

from lightning_attn import moe_mlp, quantize_experts

pytestmark = pytest.mark.op("moe_mlp_forward")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def dequantized(pair, dtype):
    q, scale = pair
    return (q.double() * scale.double()[..., None]).to(dtype)


@dtypes
def test_each_row_has_its_scale(dtype):
    """|w - scale q| <= scale / 2, the largest of each row is 127; a row of zeros stays one."""
    a = make_experts(dtype=dtype)
    gate_up = a.gate_up.clone()
    gate_up[1, 3] = 0
    gate_up[2, 4] *= 1e3 if dtype != torch.float16 else 1e2
    for w, (q, scale) in zip((gate_up, a.down), quantize_experts(gate_up, a.down), strict=True):
        assert q.dtype == torch.int8 and scale.dtype == torch.float32
        assert q.shape == w.shape and scale.shape == w.shape[:2]
        assert (
            (w.double() - dequantized((q, scale), torch.float64)).abs() <= scale.double()[..., None] * 0.5001
        ).all()
        largest = q.int().abs().amax(2)
        assert ((largest == 127) | (w == 0).all(2)).all()


def test_what_is_not_finite_raises():
    a = make_experts()
    down = a.down.clone()
    down[3, 1, 2] = float("nan")
    with pytest.raises(
        ValueError, match="quantize_experts: expected down to be finite in float32, got a row of expert 3"
    ):
        quantize_experts(a.gate_up, down)


@dtypes
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("T", [3, 40, 300])
def test_obeys_the_rule(variant, dtype, layout, T):
    """Row 1: a decode step, a small batch, a prefill; the error is bounded as that of plain PyTorch with the same experts
    dequantised.
    """
    a = make_experts(T=affordable(variant, T, min(T, 120)), D=64, F=48, dtype=dtype, layout=layout)
    pairs = quantize_experts(a.gate_up, a.down)
    b = make_experts(
        T=len(a.x), D=64, F=48, dtype=dtype, layout=layout
    )  # its own memory of the truth is of other experts
    exact = _with(a, *(dequantized(pair, torch.float64) for pair in pairs))
    rounded = _with(a, *(dequantized(pair, dtype) for pair in pairs))
    device = device_of(variant)
    on_device = [tuple(t.to(device) for t in pair) for pair in pairs]
    x, weights, experts = (t.to(device) for t in (b.x, b.weights, b.experts))
    y = moe_mlp(x, *on_device, weights, experts, layout=layout, backend=variant).cpu()
    expected = mlp_truth(exact.double() if dtype != torch.float64 else exact)["y"]
    assert_close_to_truth(y, expected, mlp_baseline(rounded)["y"])


def _with(a, gate_up, down):
    from dataclasses import replace

    return replace(a, gate_up=gate_up, down=down)


def test_two_runs_give_the_same_bits(backend):
    """Row 21."""
    a = make_experts(T=40).to(device_of(backend))
    pairs = quantize_experts(a.gate_up, a.down)
    first = moe_mlp(a.x, *pairs, a.weights, a.experts, backend=backend)
    for _ in range(3):
        assert_same_bits(moe_mlp(a.x, *pairs, a.weights, a.experts, backend=backend), first)


def test_is_not_differentiable(backend):
    a = make_experts(T=4).to(device_of(backend))
    pairs = quantize_experts(a.gate_up, a.down)
    for name in ("x", "weights"):
        tensors = {n: getattr(a, n).clone() for n in LEAVES}
        tensors[name].requires_grad_()
        with pytest.raises(ValueError, match=f"moe_mlp: expected {name} without requires_grad"):
            moe_mlp(tensors["x"], *pairs, tensors["weights"], a.experts, backend=backend)
        with torch.no_grad():
            moe_mlp(tensors["x"], *pairs, tensors["weights"], a.experts, backend=backend)


@pytest.mark.parametrize("T", [5, 40])
def test_float16_sums_do_not_overflow_before_they_are_scaled(variant, T):
    """Sums of int8 are large, their scales small."""
    device = device_of(variant)
    gate_up, down = torch.full((1, 4, 256), 1e-5, device=device), torch.ones(1, 256, 2, device=device)
    x = torch.full((T, 256), 600.0, dtype=torch.float16, device=device)
    experts = torch.zeros(T, 1, dtype=torch.int32, device=device)
    y = moe_mlp(
        x, *quantize_experts(gate_up, down), torch.ones(T, 1, device=device), experts, backend=variant
    )
    expected = 2 * torch.nn.functional.silu(torch.tensor(1.536)) * 1.536
    torch.testing.assert_close(
        y.cpu(), torch.full((T, 256), expected.item(), dtype=torch.float16), rtol=2e-3, atol=0
    )


def test_compiles_in_one_graph(no_compiled_code):
    a = make_experts()
    call = torch.compile(quantize_experts, fullgraph=True, backend="aot_eager")
    for x, y in zip(call(a.gate_up, a.down), quantize_experts(a.gate_up, a.down), strict=True):
        assert_same_bits(x[0], y[0])
        assert_same_bits(x[1], y[1])
