"""Differentiation: gradcheck, which outputs are used, and how often."""

import functools

import pytest
import torch
from support import (
    BACKENDS,
    HEAD_DIM,
    assert_close_to_truth,
    assert_same_bits,
    device_of,
    dtypes_of,
    make_inputs,
    make_norm_inputs,
)
from torch.autograd import gradcheck

from lightning_attn import gated_rms_norm, lightning_attention
from lightning_attn.backends import reference

FLOAT64_BACKENDS = [backend for backend in BACKENDS if torch.float64 in dtypes_of(backend)]
NAMES = ("q", "k", "v", "initial_state")


def leaves(x):
    return [getattr(x, name).detach().requires_grad_() for name in NAMES]


def attention(backend, x, **options):
    """lightning_attention as a function of q, k, v and the initial state."""

    def function(q, k, v, initial_state):
        return lightning_attention(
            q, k, v, x.decay, scale=x.scale, initial_state=initial_state, cu_seqlens=x.cu_seqlens,
            backend=backend, **options,
        )  # fmt: skip

    return function


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
@pytest.mark.parametrize("return_state", [True, False])
@pytest.mark.parametrize("lengths", [None, (2, 0, 4, 1)], ids=["dense", "packed"])
def test_gradcheck_of_q_k_v_and_state_through_o_and_state(backend, lengths, return_state):
    """Row 2: every element of the Jacobian against finite differences."""
    x = make_inputs(B=2, T=5, H=2, K=3, V=2, dtype=torch.float64, lengths=lengths).to(device_of(backend))
    assert gradcheck(attention(backend, x, return_state=return_state), leaves(x))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_gradcheck_across_a_block_edge(backend):
    """Row 2: the state carried from block to block passes gradients on."""
    x = make_inputs(B=1, T=66, H=1, K=2, V=3, dtype=torch.float64).to(device_of(backend))
    assert gradcheck(attention(backend, x, return_state=True), leaves(x))


@pytest.mark.parametrize("backend", FLOAT64_BACKENDS)
def test_gradcheck_of_gated_rms_norm(backend):
    """Row 2: x, gate and weight."""
    tensors = [
        t.to(device_of(backend)).requires_grad_() for t in make_norm_inputs((2, 3, 5), torch.float64)[:3]
    ]
    assert gradcheck(functools.partial(gated_rms_norm, backend=backend), tensors)


def second_derivative(function, x, wrt):
    """Of a loss with a gradient penalty, as training code writes it."""
    tensors = leaves(x)
    o = function(*tensors)
    first = torch.autograd.grad(o.sum(), tensors, create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    return torch.autograd.grad(o.sum() + penalty, tensors[wrt])[0]


@pytest.mark.parametrize("wrt", range(4), ids=NAMES)
def test_a_gradient_penalty_is_right_or_raises(backend, wrt):
    """Row 3: the penalty's share is never silently missing."""
    x = make_inputs(B=1, T=6, H=2, K=3, V=4, dtype=torch.float32)

    def definition(q, k, v, initial_state):
        return reference.recurrence(q, k, v, x.decay, scale=x.scale, initial_state=initial_state)[0]

    try:
        actual = second_derivative(
            attention(backend, x.to(device_of(backend))), x.to(device_of(backend)), wrt
        )
    except RuntimeError:
        return
    expected, plain = second_derivative(definition, x.double(), wrt), second_derivative(definition, x, wrt)
    assert_close_to_truth(actual.cpu(), expected, plain)


def test_a_gradient_of_a_gradient_with_respect_to_the_outer_gradient_raises(backend):
    """Row 3: a second derivative by way of the gradient that comes in."""
    x = make_inputs(B=1, T=6, H=2, K=3, V=4).to(device_of(backend))
    tensors = leaves(x)
    do = x.do.clone().requires_grad_()
    first = torch.autograd.grad(attention(backend, x)(*tensors), tensors, do, create_graph=True)
    with pytest.raises(RuntimeError, match="once|twice"):
        torch.autograd.grad(first[0].sum(), do)


def test_a_gradient_penalty_on_gated_rms_norm_is_right_or_raises(backend):
    """Row 3: the penalty's share is never silently missing."""
    tensors = [t.to(device_of(backend)) for t in make_norm_inputs((4, 6), torch.float32)[:3]]

    def second(function, tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        y = function(*tensors)
        first = torch.autograd.grad(y.sum(), tensors, create_graph=True)
        return torch.autograd.grad(y.sum() + sum(g.square().sum() for g in first), tensors)

    def definition(x, gate, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight * gate.sigmoid()

    try:
        actual = second(functools.partial(gated_rms_norm, backend=backend), tensors)
    except RuntimeError:
        return
    expected, plain = second(definition, [t.double() for t in tensors]), second(definition, tensors)
    for y, e, p in zip(actual, expected, plain, strict=True):
        assert_close_to_truth(y, e, p)


def used(function, x, outputs, dtype=None):
    """The gradients when only these of o and the state go into the loss; of q where no output is: of <q, q>."""
    tensors = [t.to(dtype) if dtype else t for t in leaves(x)]
    tensors = [t.detach().requires_grad_() for t in tensors]
    results = dict(zip(("o", "state"), function(*tensors), strict=True))
    gradients = {"o": x.do, "state": x.dstate}
    return torch.autograd.grad(
        [results[n] for n in outputs], tensors, [gradients[n] for n in outputs], materialize_grads=True
    )


@pytest.mark.parametrize("lengths", [None, (65, 0, 30)], ids=["dense", "packed"])
@pytest.mark.parametrize("outputs", [("o",), ("state",), ("o", "state")], ids="+".join)
def test_gradients_are_right_whichever_output_is_used(backend, outputs, lengths):
    """Row 19: only o, only the state, or both."""
    x = make_inputs(T=95, lengths=lengths)
    y = x.to(device_of(backend))
    actual = used(attention(backend, y, return_state=True), y, outputs)

    def form(function):
        return lambda q, k, v, initial_state: function(
            q, k, v, x.decay, scale=x.scale, initial_state=initial_state, cu_seqlens=x.cu_seqlens
        )

    expected = used(form(reference.recurrence), x, outputs, torch.float64)
    plain = used(form(reference.block_form), x, outputs)
    for name, *tensors in zip(NAMES, actual, expected, plain, strict=True):
        a, e, p = (t.cpu() for t in tensors)
        assert_close_to_truth(a, e, p, name=f"d{name}", head_dim=HEAD_DIM[f"d{name}"])


def test_a_call_whose_outputs_go_unused_gives_no_gradient(backend):
    """Row 19: neither o nor the state is used."""
    x = make_inputs(B=1, T=9, H=2).to(device_of(backend))
    tensors = leaves(x)
    attention(backend, x, return_state=True)(*tensors)
    gradients = torch.autograd.grad(tensors[0].sum(), tensors, allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1:] == (None, None, None)


class NoGradient(torch.autograd.Function):
    """Uses both its inputs and gives neither a gradient."""

    @staticmethod
    def forward(ctx, o, state):
        return o.sum() + state.sum()

    @staticmethod
    def backward(ctx, grad):
        return None, None


def test_outputs_whose_gradients_are_none_give_zero_or_no_gradient(backend):
    """Row 19: both gradients that come in are undefined."""
    x = make_inputs(B=1, T=9, H=2).to(device_of(backend))
    tensors = leaves(x)
    loss = NoGradient.apply(*attention(backend, x, return_state=True)(*tensors))
    gradients = torch.autograd.grad(loss + tensors[0].sum(), tensors, allow_unused=True)
    assert torch.equal(gradients[0], torch.ones_like(tensors[0]))
    assert all(g is None or not g.any() for g in gradients[1:])


def test_a_retained_graph_gives_the_same_gradients_twice(backend):
    """Row 19: the first backward leaves what the second needs as it was."""
    x = make_inputs(T=70).to(device_of(backend))
    tensors = leaves(x)
    outputs = attention(backend, x, return_state=True)(*tensors)
    before = [t.detach().clone() for t in tensors]
    first = torch.autograd.grad(outputs, tensors, (x.do, x.dstate), retain_graph=True)
    second = torch.autograd.grad(outputs, tensors, (x.do, x.dstate))
    for a, b in zip((*first, *before), (*second, *tensors), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("wanted", NAMES)
def test_one_input_alone_may_require_grad(backend, wanted):
    """Row 19: the others are constants; the gradient is the same."""
    x = make_inputs(T=70).to(device_of(backend))
    every = torch.autograd.grad(
        attention(backend, x, return_state=True)(*(tensors := leaves(x))), tensors, (x.do, x.dstate)
    )
    alone = [getattr(x, name).clone().requires_grad_(name == wanted) for name in NAMES]
    outputs = attention(backend, x, return_state=True)(*alone)
    torch.autograd.backward(outputs, (x.do, x.dstate))
    for name, tensor, gradient in zip(NAMES, alone, every, strict=True):
        assert (tensor.grad is not None) == (name == wanted)
        if name == wanted:
            assert_same_bits(tensor.grad, gradient)


def test_an_input_changed_in_place_after_the_forward_is_noticed(backend):
    """Row 19: a backward on changed inputs raises instead of giving wrong gradients."""
    x = make_inputs(B=1, T=9, H=2).to(device_of(backend))
    k = x.k.clone()
    q = x.q.clone().requires_grad_()
    o = lightning_attention(q, k, x.v, x.decay, backend=backend)
    k.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_vmap_loses_no_gradient(backend):
    """Inside vmap a tensor from outside does not show that it requires grad: attention raises instead of leaving it out."""
    x = make_inputs(B=2, T=5, H=2, K=4, V=4).to(device_of(backend))

    def call(q):
        return lightning_attention(q, x.k, x.v, x.decay, backend=backend)

    q = torch.stack([x.q, 2 * x.q])
    torch.testing.assert_close(torch.vmap(call)(q), torch.stack([call(q[0]), call(q[1])]))
    with pytest.raises(ValueError, match="lightning_attention: expected q without requires_grad inside vmap"):
        torch.vmap(call)(q.requires_grad_())
