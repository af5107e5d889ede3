"""moe_mlp and its gradients against every expert on every token in float64."""

import pytest
import torch
from moe_support import (
    LEAVES,
    check_mlp,
    check_together,
    make_experts,
    mlp_baseline,
    mlp_truth,
    run_mlp,
)
from support import (
    DTYPES,
    affordable,
    assert_close_to_truth,
    assert_same_bits,
    device_of,
    dtype_id,
    poisoned_memory,
)

from lightning_attn import moe_mlp, moe_route

pytestmark = pytest.mark.op("moe_mlp_forward")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
layouts = pytest.mark.parametrize("layout", ["concatenated", "interleaved"])


@dtypes
@layouts
def test_obeys_the_rule(variant, dtype, layout):
    """Row 1: y and the gradients of x, gate_up, down and weights."""
    a = make_experts(T=affordable(variant, 300, 150), dtype=dtype, layout=layout)
    with poisoned_memory():  # row 6
        check_mlp(run_mlp(a, variant), a)


@dtypes
@pytest.mark.parametrize("T", [1, 2, 7, 33])
def test_few_tokens_obey_the_rule(variant, dtype, T):
    """Rows 1 and 11: a decode step, with idle experts, whose gradients are exactly zero (row 28)."""
    cases = [make_experts(T=T, E=16, D=64, F=32, dtype=dtype, seed=seed) for seed in range(-(-32 // T))]
    cases = cases[: affordable(variant, 32, 4)]
    actual = [run_mlp(a, variant) for a in cases]
    check_together(actual, cases)
    for a, result in zip(cases, actual, strict=True):
        idle = [e for e in range(16) if e not in a.experts]
        assert T > 7 or idle
        for name in ("dgate_up", "ddown"):
            assert not result[name][idle].any()


@dtypes
@pytest.mark.parametrize("D, F", [(1, 1), (7, 5), (33, 80), (64, 17), (16, 129)], ids=str)
def test_odd_sizes_obey_the_rule(backend, dtype, D, F):
    """Row 12."""
    a = make_experts(T=90, D=D, F=F, E=3, dtype=dtype)
    check_mlp(run_mlp(a, backend), a)


@pytest.mark.parametrize("E, k", [(1, 1), (2, 2), (5, 5), (32, 2), (512, 3)])
def test_any_number_of_experts(backend, E, k):
    """Row 28: one expert, all of them, very many."""
    a = make_experts(T=affordable(backend, 60, 6), D=16, F=16, E=E, k=k)
    check_mlp(run_mlp(a, backend), a)


@dtypes
def test_all_tokens_on_one_expert(backend, dtype):
    """Row 28: the others' gradients are exactly zero."""
    a = make_experts(T=200, E=4, k=1, only=(2,), dtype=dtype)
    actual = run_mlp(a, backend)
    check_mlp(actual, a)
    assert not actual["dgate_up"][[0, 1, 3]].any() and not actual["ddown"][[0, 1, 3]].any()


def test_one_expert_twice(backend):
    """Both weights of the token count."""
    a = make_experts(T=9, E=3, k=2, only=(1,))
    check_mlp(run_mlp(a, backend), a)


@dtypes
def test_no_tokens(backend, dtype):
    """Row 11: an empty result, and gradients of zero."""
    a = make_experts(T=0, dtype=dtype)
    with poisoned_memory():
        actual = run_mlp(a, backend)
    assert actual["y"].shape == (0, 48) and actual["dweights"].shape == (0, 2)
    assert not actual["dgate_up"].any() and not actual["ddown"].any()


@pytest.mark.parametrize("experts", [torch.int32, torch.int64], ids=dtype_id)
def test_dtypes_of_what_the_router_gives(backend, experts):
    """int64 experts, weights in x's dtype: the result of int32 and of float32 weights of the same values."""
    dtype = torch.float16
    a = make_experts(T=20, dtype=dtype).to(device_of(backend))
    weights = a.weights.to(dtype)
    args = a.x, a.gate_up, a.down
    expected = moe_mlp(*args, weights.float(), a.experts, backend=backend)
    assert_same_bits(moe_mlp(*args, weights, a.experts.to(experts), backend=backend), expected)
    weights.requires_grad_()
    (dweights,) = torch.autograd.grad(moe_mlp(*args, weights, a.experts, backend=backend).sum(), weights)
    assert dweights.dtype == dtype


def strided(name, t):
    """The same values at other strides."""
    if name == "x":  # rows inside wider ones of NaN
        wide = t.new_full((t.shape[0], t.shape[1] + 5), float("nan"))
        return wide[:, 3:-2].copy_(t)
    if name in ("gate_up", "down"):  # stored transposed, every other matrix
        stored = t.new_full((2 * t.shape[0], t.shape[2], t.shape[1]), float("nan"))
        return stored[::2].mT.copy_(t)
    return t.T.contiguous().T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
@layouts
def test_strides_do_not_matter(backend, dtype, layout):
    """Row 10: the rule holds, and where only the strides of x differ, so do the bits."""
    a = make_experts(T=80, dtype=dtype, layout=layout)
    names = (*LEAVES, "experts")
    b = a.to(device_of(backend))
    expected = moe_mlp(*(getattr(b, n) for n in names), layout=layout, backend=backend)
    x = strided("x", b.x)
    others = [getattr(b, n) for n in names[1:]]
    assert_same_bits(moe_mlp(x, *others, layout=layout, backend=backend), expected)
    everything = [strided(n, getattr(b, n)) for n in names]
    y = moe_mlp(*everything, layout=layout, backend=backend)
    assert_close_to_truth(y.cpu(), mlp_truth(a)["y"], mlp_baseline(a)["y"])
    leaves = [t.detach().requires_grad_() for t in everything[:4]]
    y = moe_mlp(*leaves, everything[4], layout=layout, backend=backend)
    expanded = b.dy[:1].expand_as(b.dy)
    gradients = torch.autograd.grad(y, leaves, expanded)
    plain = [getattr(b, n).detach().requires_grad_() for n in LEAVES]
    y = moe_mlp(*plain, b.experts, layout=layout, backend=backend)
    for g, h in zip(gradients, torch.autograd.grad(y, plain, expanded.contiguous()), strict=True):
        torch.testing.assert_close(g, h)


def test_nan_stays_with_its_token(backend):
    """Row 7: a token of NaN, the weights of an idle expert: no bit of another token's result changes."""
    a = make_experts(T=70, E=6, only=(0, 1, 3, 4)).to(device_of(backend))
    expected = moe_mlp(a.x, a.gate_up, a.down, a.weights, a.experts, backend=backend)
    x, gate_up, down = a.x.clone(), a.gate_up.clone(), a.down.clone()
    x[13] = float("nan")
    gate_up[[2, 5]] = float("nan")
    down[[2, 5]] = float("inf")
    y = moe_mlp(x, gate_up, down, a.weights, a.experts, backend=backend)
    others = torch.arange(70, device=y.device) != 13
    assert y[13].isnan().all()
    assert_same_bits(y[others], expected[others])


@dtypes
def test_two_runs_give_the_same_bits(variant, dtype):
    """Row 21: outputs and gradients, on three threads, wherever buffers lie."""
    torch.set_num_threads(3)
    a = make_experts(T=affordable(variant, 500, 40), E=3, dtype=dtype)
    first = run_mlp(a, variant)
    ballast = []
    for n in range(affordable(variant, 4, 2)):
        ballast.append(torch.empty(1000 * n + 1))
        for name, y in run_mlp(a, variant).items():
            assert_same_bits(y, first[name], name)


def test_other_tokens_do_not_matter(backend):
    """A token's result is the same to the last bits of its dtype alone, first, or among others."""
    a = make_experts(T=40, dtype=torch.float32).to(device_of(backend))
    whole = moe_mlp(a.x, a.gate_up, a.down, a.weights, a.experts, backend=backend)
    flipped = moe_mlp(a.x.flip(0), a.gate_up, a.down, a.weights.flip(0), a.experts.flip(0), backend=backend)
    torch.testing.assert_close(flipped.flip(0), whole)
    alone = moe_mlp(a.x[7:8], a.gate_up, a.down, a.weights[7:8], a.experts[7:8], backend=backend)
    torch.testing.assert_close(alone, whole[7:8])


@pytest.mark.parametrize(
    "needed", [("x",), ("weights",), ("gate_up",), ("down",), ("x", "down")], ids="-".join
)
def test_only_the_gradients_that_are_wanted(backend, needed):
    """Row 19: each alone equals that of all of them, and the graph can be gone through twice."""
    a = make_experts().to(device_of(backend))
    expected = run_mlp(a, backend)
    leaves = {n: getattr(a, n).detach().requires_grad_(n in needed) for n in LEAVES}
    y = moe_mlp(*leaves.values(), a.experts, backend=backend)
    wanted = [leaves[n] for n in needed]
    for _ in range(2):
        gradients = torch.autograd.grad(y, wanted, a.dy, retain_graph=True)
        for n, g in zip(needed, gradients, strict=True):
            assert_same_bits(g.cpu(), expected["d" + n], n)


def test_a_second_derivative_raises(backend):
    """Row 3."""
    a = make_experts(T=5).to(device_of(backend))
    x = a.x.detach().requires_grad_()
    y = moe_mlp(x, a.gate_up, a.down, a.weights, a.experts, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


@layouts
@pytest.mark.parametrize("dtype", [torch.float64], ids=dtype_id)
def test_gradcheck(backend, dtype, layout):
    """Row 2, through the router too."""
    a = make_experts(T=6, D=4, F=3, E=4, dtype=dtype)
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=dtype).requires_grad_()

    def block(x, gate_up, down, logits):
        weights, experts = moe_route(logits, 2, backend=backend)
        return moe_mlp(x, gate_up, down, weights, experts, layout=layout, backend=backend)

    leaves = [t.clone().requires_grad_() for t in (a.x, a.gate_up, a.down)]
    assert torch.autograd.gradcheck(block, (*leaves, logits))


@pytest.mark.parametrize("T", [2, 30])
def test_a_gate_beyond_float16_has_gradients(backend, T):
    """Far below zero it is shut: y and the gradients are zero, not NaN."""
    device = device_of(backend)
    x = torch.full((T, 64), 200.0, dtype=torch.float16, device=device, requires_grad=True)
    gate_up = torch.cat([torch.full((1, 8, 64), -8.0), torch.full((1, 8, 64), 0.001)], 1).half().to(device)
    down = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0)).half().to(device)
    experts = torch.zeros(T, 1, dtype=torch.int32, device=device)
    y = moe_mlp(x, gate_up, down, torch.ones(T, 1, device=device), experts, backend=backend)
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert not y.any() and not dx.any()


def test_what_no_32_bits_hold_is_no_expert(backend, monkeypatch):
    """Where nothing is checked, an expert out of range adds nothing, whatever its lowest bits say."""
    monkeypatch.setattr("lightning_attn.ops.moe.check_values", lambda x: False)
    a = make_experts(T=20).to(device_of(backend))
    for far in (2**32, -(2**32), 2**33 + 5, 5, -1):
        experts = torch.full_like(a.experts, 0, dtype=torch.int64) + far
        y = moe_mlp(a.x, a.gate_up, a.down, a.weights, experts, backend=backend)
        assert not y.any(), far


def test_vmap_loses_no_gradient(backend):
    """It raises where one would be lost, and gives values where there is none."""
    a = make_experts(T=6, E=3).to(device_of(backend))
    x = torch.stack([a.x, 2 * a.x])

    def call(x):
        return moe_mlp(x, a.gate_up, a.down, a.weights, a.experts, backend=backend)

    torch.testing.assert_close(torch.vmap(call)(x), torch.stack([call(x[0]), call(x[1])]))
    x.requires_grad_()
    with pytest.raises(ValueError, match="moe_mlp: expected x without requires_grad inside vmap"):
        torch.vmap(call)(x)
    with torch.no_grad():
        torch.vmap(call)(x)
