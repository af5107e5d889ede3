"""moe_route, its gradient, the sorting of what it gives, and the router's losses."""

import pytest
import torch
from support import (
    DTYPES,
    affordable,
    assert_close_to_truth,
    assert_same_bits,
    device_of,
    dtype_id,
    dtypes_of,
    poisoned_memory,
)

from lightning_attn import load_balancing_loss, moe_route, router_z_loss
from lightning_attn.backends import load
from lightning_attn.dispatch import accumulation_dtype

pytestmark = pytest.mark.op("moe_route_forward")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
renormalized = pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "raw"])
SIZES = [(1, 1), (2, 1), (3, 2), (8, 8), (32, 2), (33, 5), (100, 1), (512, 8), (512, 512)]


def make_logits(T, E, dtype=torch.float32, *, seed=0):
    """Normal, on a grid of quarters: exact in every dtype, and full of ties."""
    random = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(T, E, generator=random, dtype=torch.float64)).round().div(4).to(dtype)


def chosen_by_sorting(logits, k):
    """Largest first, of equal ones the lowest."""
    keys = [sorted(range(logits.shape[1]), key=lambda e: (-row[e], e)) for row in logits.double().tolist()]
    return torch.tensor(keys, dtype=torch.int32).reshape(logits.shape)[:, :k]


def plain_route(logits, experts, renormalize):
    """The usual PyTorch, with the experts given."""
    p = logits.softmax(-1, dtype=accumulation_dtype(logits.dtype)).gather(1, experts.long())
    return p / p.sum(-1, keepdim=True) if renormalize else p


def true_route(logits, experts, renormalize):
    """In float64 (written otherwise, so that in float64 the baseline has an error of its own)."""
    z = torch.exp(logits - logits.amax(1, keepdim=True))
    p = z.gather(1, experts.long())
    return p / (p if renormalize else z).sum(1, keepdim=True)


def differentiate(form, logits, dweights):
    leaf = logits.detach().requires_grad_()
    weights = form(leaf)
    (dlogits,) = torch.autograd.grad(weights, leaf, dweights)
    return weights.detach().cpu(), dlogits.cpu()


@dtypes
@renormalized
@pytest.mark.parametrize("E, k", SIZES, ids=str)
def test_obeys_the_rule(variant, dtype, E, k, renormalize):
    """Rows 1, 6 and 28: the experts exactly, ties to the lowest; weights and the gradient of the logits by the rule."""
    logits = make_logits(affordable(variant, 70, 40 if k < 100 else 4), E, dtype)
    experts = chosen_by_sorting(logits, k)
    acc = accumulation_dtype(dtype)
    dweights = torch.randn(experts.shape, generator=torch.Generator().manual_seed(1), dtype=acc)
    device = device_of(variant)
    found = []

    def route(x):
        weights, chosen = moe_route(x, k, renormalize=renormalize, backend=variant)
        found.append(chosen.cpu())
        return weights

    with poisoned_memory():
        actual = differentiate(route, logits.to(device), dweights.to(device))
    assert_same_bits(found[0], experts, "experts")
    expected = differentiate(
        lambda x: true_route(x, experts, renormalize), logits.double(), dweights.double()
    )
    plain = differentiate(lambda x: plain_route(x, experts, renormalize), logits, dweights)
    for name, y, z, p in zip(("weights", "dlogits"), actual, expected, plain, strict=True):
        if dtype == torch.float64:  # the truth has an error too
            torch.testing.assert_close(y, z, rtol=1e-14, atol=1e-14)
        else:
            assert_close_to_truth(y, z, p, name=name)


def test_ties_go_to_the_lowest(backend):
    """Row 28: all equal; equal but for the sign of zero; a tie for the last place."""
    device = device_of(backend)
    logits = torch.tensor(
        [[1.0, 1, 1, 1], [0.0, -0.0, 0.0, -0.0], [-0.0, 0.0, -0.0, 0.0], [0, 2, 1, 1]], device=device
    )
    _, experts = moe_route(logits, 2, backend=backend)
    assert experts.tolist() == [[0, 1], [0, 1], [0, 1], [1, 2]]


@renormalized
def test_an_expert_can_be_left_out(backend, renormalize):
    """A logit of -inf: weight zero, gradient zero, chosen last."""
    device = device_of(backend)
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0]], device=device, requires_grad=True)
    weights, experts = moe_route(logits, 3, renormalize=renormalize, backend=backend)
    assert experts.tolist() == [[3, 1, 0]] and weights[0, 2] == 0
    weights[0, 0].backward()
    assert logits.grad[0, [0, 2]].tolist() == [0, 0] and logits.grad[0, 3] > 0


def test_large_logits_do_not_overflow(backend):
    device = device_of(backend)
    logits = torch.tensor([[1e38, -1e38, 1e38], [-3e38, -3e38, -3e38]], device=device)
    weights, experts = moe_route(logits, 2, backend=backend)
    assert weights.tolist() == [[0.5, 0.5], [0.5, 0.5]] and experts.tolist() == [[0, 2], [0, 1]]
    logits = torch.tensor([[1e8, 1e8, 0.0]], device=device, requires_grad=True)
    weights, _ = moe_route(logits, 1, renormalize=False, backend=backend)
    assert weights.tolist() == [[0.5]]  # nothing is rounded at the magnitude of the logits
    weights.sum().backward()
    assert logits.grad.tolist() == [[0.25, -0.25, 0]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_raises(backend, bad, monkeypatch):
    """As everywhere on a CPU, on a GPU where it was asked for."""
    monkeypatch.setenv("LIGHTNING_ATTN_CHECK", "1")
    logits = torch.zeros(3, 4, device=device_of(backend))
    logits[1, 2] = bad
    with pytest.raises(ValueError, match=r"moe_route: expected a finite largest logit .* for token 1"):
        moe_route(logits, 2, backend=backend)
    with pytest.raises(ValueError, match="expected a finite largest logit"):
        moe_route(torch.full_like(logits, -torch.inf), 2, backend=backend)


@pytest.mark.parametrize("E, k", [(3, 2), (32, 32), (512, 4)], ids=str)
def test_nan_never_leads_out_of_range(variant, E, k):
    """What a kernel does where nothing is checked: k different experts that exist, whatever the logits hold."""
    logits = make_logits(40, E)
    random = torch.Generator().manual_seed(2)
    for value in (float("nan"), float("inf"), float("-inf")):
        logits = logits.where(torch.rand(40, E, generator=random) > 0.3, value)
    logits[7:11] = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0])[:, None]
    _, experts = load(variant).moe_route_forward(logits.to(device_of(variant)), k, True)
    assert ((experts >= 0) & (experts < E)).all()
    assert all(len(set(row)) == k for row in experts.tolist())


def test_no_tokens(backend):
    """Row 11."""
    logits = torch.zeros(0, 5, device=device_of(backend), requires_grad=True)
    weights, experts = moe_route(logits, 2, backend=backend)
    assert weights.shape == experts.shape == (0, 2)
    weights.sum().backward()
    assert logits.grad.shape == (0, 5)


def test_strides_do_not_matter(backend):
    """Row 10: sliced and transposed logits, an expanded gradient."""
    dense = make_logits(30, 7).to(device_of(backend))
    wide = dense.new_full((30, 12), float("nan"))
    for logits in (wide[:, 2:9].copy_(dense), dense.T.contiguous().T, dense[:1].expand(30, 7)):
        leaf, copy = (t.detach().requires_grad_() for t in (logits, logits.contiguous()))
        pairs = [moe_route(t, 3, backend=backend) for t in (leaf, copy)]
        for a, b in zip(*pairs, strict=True):
            assert_same_bits(a, b)
        dweights = torch.ones(1, 3, device=dense.device).expand(30, 3) * torch.tensor([1.0, 2, 3]).to(
            dense.device
        )
        gradients = [
            torch.autograd.grad(weights, t, dweights)[0]
            for t, (weights, _) in zip((leaf, copy), pairs, strict=True)
        ]
        assert_same_bits(*gradients)


def test_a_second_derivative_raises(backend):
    """Row 3."""
    logits = make_logits(5, 4).to(device_of(backend)).requires_grad_()
    (dlogits,) = torch.autograd.grad(
        moe_route(logits, 2, backend=backend)[0][:, 0].sum(), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="second derivative"):
        dlogits.sum().backward()


# ---- sorting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "T, E, k, low, high",
    [
        (0, 5, 2, 0, 5),
        (1, 1, 1, 0, 1),
        (50, 3, 3, 0, 3),
        (300, 32, 2, 0, 32),
        (40, 512, 2, 0, 512),
        (90, 8, 2, 3, 4),  # all on one
        (200, 6, 2, -2, 9),  # some that are none
    ],
    ids=str,
)
def test_sorting_is_stable(variant, T, E, k, low, high):
    """Rows 6, 11, 28: order, position and offsets against Python's sort; what is no expert has no position."""
    experts = torch.randint(low, high, (T, k), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    pairs = [(e, p) for p, e in enumerate(experts.flatten().tolist()) if 0 <= e < E]
    expected = [p for _, p in sorted(pairs)]
    with poisoned_memory():
        order, position, offs = (t.cpu() for t in load(variant).moe_sort(experts.to(device_of(variant)), E))
    assert order[: len(expected)].tolist() == expected
    places = torch.full((T * k,), -1, dtype=torch.int32)
    places[expected] = torch.arange(len(expected), dtype=torch.int32)
    assert_same_bits(position, places.view(T, k), "position")
    counts = torch.bincount(torch.tensor([e for e, _ in pairs], dtype=torch.long), minlength=E)
    assert_same_bits(offs, counts.cumsum(0).int(), "offs")


@pytest.mark.parametrize("T", [1500, 5000])
def test_sorting_of_many(variant, T):
    """More than one program's share."""
    experts = torch.randint(0, 33, (affordable(variant, T, 1500), 2), dtype=torch.int32)
    order, position, offs = (t.cpu() for t in load(variant).moe_sort(experts.to(device_of(variant)), 33))
    assert_same_bits(order, experts.flatten().argsort(stable=True).int(), "order")
    assert offs[-1] == experts.numel() and position.flatten()[order.long()].equal(
        torch.arange(len(order)).int()
    )


# ---- the losses -----------------------------------------------------------------------------------------------


def test_load_balancing_loss():
    """The formula by loops; k / E^2 at balance; E^2 times it is transformers' loss."""
    from transformers.models.minimax.modeling_minimax import load_balancing_loss_func

    logits = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    _, experts = moe_route(logits, 2)
    f = [(experts == e).sum().item() / 60 for e in range(4)]
    m = logits.softmax(1).mean(0)
    expected = sum(f[e] * m[e] for e in range(4)) / 4
    loss = load_balancing_loss(logits, experts)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(16 * loss, load_balancing_loss_func((logits,), 4, 2))
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)))
    balanced = torch.tensor([[0, 1], [2, 3]])
    torch.testing.assert_close(load_balancing_loss(torch.zeros(2, 4), balanced).item(), 2 / 16)


def test_router_z_loss():
    logits = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = (logits.exp().sum(1).log() ** 2).mean()
    loss = router_z_loss(logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)))


def test_losses_of_no_tokens_are_zero():
    assert load_balancing_loss(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int32)) == 0
    assert router_z_loss(torch.zeros(0, 4)) == 0


def test_choices_are_counted_exactly():
    """More than 2^24 of one expert."""
    T = 2**24 + 2**20
    loss = load_balancing_loss(torch.zeros(T, 1), torch.zeros(T, 1, dtype=torch.int32))
    torch.testing.assert_close(loss, torch.tensor(1.0))


def test_losses_of_16_bit_logits_are_float32():
    logits = torch.zeros(3, 4, dtype=torch.bfloat16)
    assert load_balancing_loss(logits, torch.zeros(3, 1, dtype=torch.int64)).dtype == torch.float32
    assert router_z_loss(logits).dtype == torch.float32


def test_dtypes_that_backends_take(backend):
    """float64 where there is no GPU behind it; float32 everywhere."""
    assert torch.float32 in dtypes_of(backend, "moe_route_forward")
