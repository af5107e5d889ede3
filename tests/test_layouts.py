"""Strides: any layout of the inputs, the gradients and the states gives what contiguous ones give."""

from dataclasses import replace

import pytest
import torch
from support import (
    HALF,
    HEAD_DIM,
    LAYOUTS,
    affordable,
    assert_close_to_truth,
    assert_same_bits,
    baseline,
    check,
    check_norm,
    device_of,
    differentiate,
    differentiate_norm,
    dtype_id,
    make_inputs,
    make_norm_inputs,
    truth,
)

from lightning_attn import gated_rms_norm, lightning_attention, lightning_attention_decode
from lightning_attn.backends import reference

SHAPE = {"B": 4, "T": 70, "H": 3, "K": 9, "V": 17}


def on(backend):
    """The public function on one backend, as `differentiate` wants it."""
    return lambda *args, **kwargs: lightning_attention(*args, **kwargs, return_state=True, backend=backend)


def with_layout(x, layout, names):
    """The values of x, some of them stored otherwise."""
    views = {n: LAYOUTS[layout](getattr(x, n)) for n in names}
    for name, view in views.items():
        assert not view.is_contiguous() or view.storage_offset(), name
        assert torch.equal(view, getattr(x, name))
    return replace(x, **views)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_operands_and_of_the_gradient(variant, layout, dtype):
    """Row 10: strided, sliced and odd-offset q, k, v and do."""
    x = make_inputs(**SHAPE, dtype=dtype)
    y = with_layout(x.to(device_of(variant)), layout, ("q", "k", "v", "do"))
    check({n: t.cpu() for n, t in differentiate(on(variant), y).items()}, x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_may_differ_from_operand_to_operand(backend, layout):
    """Row 10: each operand's strides are its own."""
    x = make_inputs(**SHAPE)
    y = with_layout(x.to(device_of(backend)), layout, ("k",))
    y = with_layout(y, "heads_before_tokens", ("v", "do"))
    check({n: t.cpu() for n, t in differentiate(on(backend), y).items()}, x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_states_and_of_their_gradients(backend, layout):
    """Row 10: the initial state and the gradient of the returned one."""
    x = make_inputs(**SHAPE)
    y = with_layout(x.to(device_of(backend)), layout, ("initial_state", "dstate"))
    check({n: t.cpu() for n, t in differentiate(on(backend), y).items()}, x)


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "tokens_first"])
def test_any_layout_of_packed_documents(backend, layout):
    """Row 10: with cu_seqlens too."""
    x = make_inputs(lengths=(5, 0, 66, 1), H=3, K=9, V=17)
    y = with_layout(x.to(device_of(backend)), layout, ("q", "k", "v", "do"))
    check({n: t.cpu() for n, t in differentiate(on(backend), y).items()}, x)


def test_a_long_sequence_shared_by_threads_in_any_layout(variant):
    """Row 10: heads before tokens, cut into segments."""
    x = make_inputs(B=1, T=affordable(variant, 800, 200), H=1, K=40, V=33)
    y = with_layout(x.to(device_of(variant)), "slice_of_tokens_and_heads", ("q", "k", "v", "do"))
    check({n: t.cpu() for n, t in differentiate(on(variant), y).items()}, x)


@pytest.mark.parametrize("expanded", ["batch", "tokens", "heads", "batch and heads"])
def test_expanded_operands_and_states_with_stride_0(backend, expanded):
    """Row 10: the gradient of what was expanded is the sum over its copies."""
    B, T, H = (SHAPE[n] for n in "BTH")
    b, t, h = (1 if name in expanded else n for name, n in (("batch", B), ("tokens", T), ("heads", H)))
    one = make_inputs(B=b, T=t, H=h, K=9, V=17)
    full = make_inputs(**SHAPE)
    x = replace(full, q=one.q, k=one.k, v=one.v, initial_state=one.initial_state)

    def expand(form):
        def expanded_form(q, k, v, decay, *, initial_state, **kwargs):
            q, k, v = (y.expand(B, T, H, -1) for y in (q, k, v))
            return form(q, k, v, decay, initial_state=initial_state.expand(B, H, -1, -1), **kwargs)

        return expanded_form

    expected = differentiate(expand(reference.recurrence), x.double())
    plain = differentiate(expand(reference.block_form), x)
    actual = differentiate(expand(on(backend)), x.to(device_of(backend)))
    for name, y in actual.items():
        assert_close_to_truth(y.cpu(), expected[name], plain[name], name=name, head_dim=HEAD_DIM[name])


def test_expanded_gradients_with_stride_0(backend):
    """Row 10: the gradient of a sum is one number, expanded."""
    x = make_inputs(**SHAPE)
    one = torch.ones(())
    y = replace(x, do=one.expand(x.do.shape), dstate=one.expand(x.dstate.shape))
    expected, plain = truth(y), baseline(y)
    device = device_of(backend)
    expanded = replace(y.to(device), do=one.to(device).expand(x.do.shape))
    for name, z in differentiate(on(backend), expanded).items():
        assert_close_to_truth(z.cpu(), expected[name], plain[name], name=name, head_dim=HEAD_DIM[name])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
def test_slices_of_one_packed_projection(variant, dtype):
    """Row 10: q, k and v side by side in one tensor, which takes one gradient."""
    x = make_inputs(**SHAPE, dtype=dtype)
    y = x.to(device_of(variant))
    qkv = torch.cat([y.q, y.k, y.v], -1).requires_grad_()
    q, k, v = qkv.split([9, 9, 17], -1)
    o = lightning_attention(
        q, k, v, y.decay, scale=y.scale, initial_state=y.initial_state, return_state=True, backend=variant
    )
    (gradient,) = torch.autograd.grad(o, qkv, (y.do, y.dstate))
    parts = dict(zip(("dq", "dk", "dv"), gradient.cpu().split([9, 9, 17], -1), strict=True))
    for name, z in parts.items():
        assert_close_to_truth(z, truth(x)[name], baseline(x)[name], name=name, head_dim=2)


def test_one_tensor_may_be_several_operands(variant):
    """Row 10: q, k and v are the same memory."""
    x = make_inputs(B=2, T=70, H=3, K=16, V=16)
    x = replace(x, k=x.q, v=x.q)
    check({n: t.cpu() for n, t in differentiate(on(variant), x.to(device_of(variant))).items()}, x)


def test_outputs_are_contiguous_and_alias_no_input(backend):
    """Row 10: whatever the layout of the inputs; with an empty sequence the state is a copy too."""
    for T in (0, 5):
        x = make_inputs(B=2, T=T, H=3).to(device_of(backend))
        q, k, v = (LAYOUTS["heads_before_tokens"](t) for t in (x.q, x.k, x.v))
        outputs = lightning_attention(
            q, k, v, x.decay, initial_state=x.initial_state, return_state=True, backend=backend
        )
        for y in outputs:
            assert y.is_contiguous()
            pointers = {t.untyped_storage().data_ptr() for t in (q, k, v, x.initial_state)} - {0}
            assert y.untyped_storage().data_ptr() not in pointers


# ---- decode ---------------------------------------------------------------------------------------------------


@pytest.mark.op("attention_decode")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_operands_of_decode(variant, layout, dtype):
    """Row 10: bit for bit what contiguous operands give."""
    x = make_inputs(B=3, T=2, H=3, K=9, V=17, dtype=dtype).to(device_of(variant))
    y = with_layout(x, layout, ("q", "k", "v"))
    results = []
    for z in (x, y):
        state = x.initial_state.clone()
        o = lightning_attention_decode(z.q, z.k, z.v, z.decay, state, scale=z.scale, backend=variant)
        results.append((o, state))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


@pytest.mark.op("attention_decode")
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("layout", ["heads first", "every other row", "heads of a wider cache", "odd offset"])
def test_decode_updates_a_view_of_a_larger_cache_in_place(variant, layout, state_dtype):
    """Row 10: the strides of rows and heads are free, and what lies between stays as it was."""
    x = make_inputs(B=3, T=2, H=3, K=9, V=17).to(device_of(variant))
    N, H, K, V = x.initial_state.shape
    new = torch.full((2 * N * (H + 2) * K * V + 1,), -7.0, dtype=state_dtype, device=x.q.device)
    view = {
        "heads first": lambda: new[: N * H * K * V].view(H, N, K, V).transpose(0, 1),
        "every other row": lambda: new[: 2 * N * H * K * V].view(2 * N, H, K, V)[::2],
        "heads of a wider cache": lambda: new[: N * (H + 2) * K * V].view(N, H + 2, K, V)[:, 1:-1],
        "odd offset": lambda: new[1 : 1 + N * H * K * V].view(N, H, K, V),
    }[layout]().copy_(x.initial_state)
    dense = view.clone(memory_format=torch.contiguous_format)
    inside = torch.zeros_like(new, dtype=torch.bool)
    inside.as_strided(view.shape, view.stride(), view.storage_offset())[:] = True

    o = lightning_attention_decode(x.q, x.k, x.v, x.decay, view, backend=variant)
    expected = lightning_attention_decode(x.q, x.k, x.v, x.decay, dense, backend=variant)
    assert_same_bits(o, expected)
    assert_same_bits(view, dense)
    assert (new[~inside] == -7).all()


# ---- gated RMS norm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_operands_of_gated_rms_norm(variant, layout, dtype):
    """Row 10: x, gate and dy, in views that are a matrix of rows and in views that are not."""
    x, gate, weight, dy = make_norm_inputs((2, 5, 3, 19), dtype)
    views = [LAYOUTS[layout](t.to(device_of(variant))) for t in (x, gate)]
    weights = torch.full((2 * 19,), torch.nan, dtype=dtype, device=device_of(variant))[::2].copy_(weight)

    def form(*args, **kwargs):
        return gated_rms_norm(*args, **kwargs, backend=variant)

    tensors = [*views, weights, LAYOUTS[layout](dy.to(device_of(variant)))]
    check_norm(differentiate_norm(form, tensors, 1e-6), (x, gate, weight, dy), 1e-6)


def test_expanded_operands_of_gated_rms_norm(variant):
    """Row 10: one gate for all rows, one row for all, and the gradient of a sum."""
    x, gate, weight, _ = make_norm_inputs((7, 19), torch.float32)
    dense = [x, gate[:1].expand(7, 19), weight, torch.ones(7, 19)]
    device = device_of(variant)
    tensors = [
        x.to(device),
        gate[:1].to(device).expand(7, 19),
        weight.to(device),
        torch.ones((), device=device).expand(7, 19),
    ]

    def form(*args, **kwargs):
        return gated_rms_norm(*args, **kwargs, backend=variant)

    check_norm(differentiate_norm(form, tensors, 1e-6), dense, 1e-6)
