"""Nothing to do, or next to nothing: no tokens, no sequences, no heads."""

import pytest
import torch
from support import (
    DTYPES,
    LAYOUTS,
    assert_same_bits,
    check,
    device_of,
    dtype_id,
    make_inputs,
    make_norm_inputs,
    offsets,
    poisoned_memory,
    run,
    run_norm,
)

from lightning_attn import lightning_attention, lightning_attention_decode
from lightning_attn.dispatch import accumulation_dtype


def attend(x, backend):
    """Outputs and gradients, without the truth's need for tokens."""
    y = x.to(device_of(backend))
    leaves = [getattr(y, n).clone().requires_grad_() for n in ("q", "k", "v", "initial_state")]
    q, k, v, initial = leaves
    with poisoned_memory():
        o, state = lightning_attention(
            q, k, v, y.decay, scale=y.scale, initial_state=initial, cu_seqlens=y.cu_seqlens, return_state=True,
            backend=backend,
        )  # fmt: skip
        gradients = torch.autograd.grad((o, state), leaves, (y.do, y.dstate))
    return o, state, gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "shape",
    [{"B": 2, "T": 0}, {"lengths": (0,)}, {"lengths": (0, 0, 0)}],
    ids=["no tokens", "one empty document", "all documents empty"],
)
def test_without_tokens_the_state_and_its_gradient_pass_through(variant, shape, dtype):
    """Row 11: o is empty, the state is the initial state, and its gradient that of the returned state."""
    x = make_inputs(**shape, H=3, K=5, V=6, dtype=dtype)
    o, state, (dq, dk, dv, dinitial) = attend(x, variant)
    assert o.shape == x.v.shape and o.dtype == dtype
    assert (dq.shape, dk.shape, dv.shape) == (x.q.shape, x.k.shape, x.v.shape)
    assert_same_bits(state, x.initial_state)
    assert_same_bits(dinitial, x.dstate)


@pytest.mark.parametrize("shape", [{"B": 2, "T": 0}, {"lengths": (0, 0)}], ids=["dense", "packed"])
def test_without_tokens_and_initial_state_the_state_is_zero(variant, shape):
    """Row 11: zero, not what the memory held."""
    x = make_inputs(**shape, state=False).to(device_of(variant))
    with poisoned_memory():
        _, state = lightning_attention(
            x.q, x.k, x.v, x.decay, cu_seqlens=x.cu_seqlens, return_state=True, backend=variant
        )
    assert state.shape == x.dstate.shape and state.dtype == torch.float32 and not state.any()


@pytest.mark.parametrize(
    "shape",
    [{"B": 0, "T": 5}, {"B": 0, "T": 0}, {"lengths": ()}, {"B": 2, "T": 5, "H": 0}],
    ids=["no batch", "no batch and no tokens", "no documents", "no heads"],
)
def test_without_sequences_or_heads_everything_is_empty(variant, shape):
    """Row 11: outputs, states and gradients of the right shapes with nothing in them."""
    x = make_inputs(**shape)
    o, state, gradients = attend(x, variant)
    assert o.shape == x.v.shape and state.shape == x.initial_state.shape
    expected = [t.shape for t in (x.q, x.k, x.v, x.initial_state)]
    assert [g.shape for g in gradients] == expected
    assert all(t.numel() == 0 for t in (o, state, *gradients))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "lengths",
    [(1,), (64,), (0, 65), (65, 0), (63, 0, 0, 1, 64)],
    ids=lambda lengths: "-".join(map(str, lengths)),
)
def test_empty_documents_leave_their_neighbours_alone(variant, lengths, dtype):
    """Row 11: an empty document keeps its state; those around it are as if it were not there."""
    x = make_inputs(lengths=lengths, H=2, dtype=dtype)
    result = run(x, variant)
    check(result, x)
    for n, length in enumerate(lengths):
        if length == 0:
            assert_same_bits(result["state"][n], x.initial_state[n])
            assert_same_bits(result["dinitial_state"][n], x.dstate[n])


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=dtype_id)
def test_cu_seqlens_of_either_integer_type_and_any_stride(variant, integers):
    """Row 11: int32 and int64 offsets, also every other element of a tensor."""
    x = make_inputs(lengths=(5, 0, 66), H=2)
    cu_seqlens = torch.full((8,), -7, dtype=integers)[::2].copy_(offsets((5, 0, 66)))
    y = x.to(device_of(variant))
    o = lightning_attention(
        y.q, y.k, y.v, y.decay, initial_state=y.initial_state, scale=y.scale, backend=variant,
        cu_seqlens=cu_seqlens.to(device_of(variant)),
    )  # fmt: skip
    assert_same_bits(o, run(x, variant)["o"])


@pytest.mark.op("attention_decode")
@pytest.mark.parametrize(("B", "T", "H"), [(0, 1, 2), (3, 0, 2), (3, 1, 0), (0, 0, 2)])
def test_decode_of_nothing_returns_nothing_and_keeps_the_state(variant, B, T, H):
    """Row 11: no sequences, no tokens or no heads."""
    x = make_inputs(B=B, T=T, H=H).to(device_of(variant))
    state = x.initial_state.clone()
    o = lightning_attention_decode(x.q, x.k, x.v, x.decay, state, backend=variant)
    assert o.shape == x.v.shape
    assert_same_bits(state, x.initial_state)


@pytest.mark.op("attention_decode")
def test_decode_of_padding_only_keeps_every_state(variant):
    """Rows 11 and 17: all slots -1, with states of others about."""
    x = make_inputs(B=3, T=2).to(device_of(variant))
    state = torch.randn(5, *x.initial_state.shape[1:], device=x.q.device)
    before = state.clone()
    slots = torch.full((3,), -1, device=x.q.device)
    with poisoned_memory():
        o = lightning_attention_decode(x.q, x.k, x.v, x.decay, state, slots=slots, backend=variant)
    assert not o.any()
    assert_same_bits(state, before)


@pytest.mark.op("attention_decode")
def test_decode_with_no_states_at_all_takes_padding(variant):
    """Row 11: S = 0, and every sequence is padding."""
    x = make_inputs(B=3, T=2).to(device_of(variant))
    slots = torch.full((3,), -1, device=x.q.device)
    state = x.initial_state[:0].clone()
    o = lightning_attention_decode(x.q, x.k, x.v, x.decay, state, slots=slots, backend=variant)
    assert not o.any()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)], ids=str)
def test_gated_rms_norm_of_no_rows_is_empty_and_the_weight_has_zero_gradient(variant, shape):
    """Row 11: nothing is normalised."""
    inputs = make_norm_inputs(shape, torch.float32)
    with poisoned_memory():
        result = run_norm(inputs, 1e-6, variant)
    assert result["y"].shape == result["dx"].shape == result["dgate"].shape == shape
    assert not result["dweight"].any() and result["dweight"].shape == (8,)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter_where_there_are_no_tokens(backend, layout):
    """Rows 10 and 11: views of nothing."""
    x = make_inputs(B=2, T=0, H=2).to(device_of(backend))
    q, k, v = (LAYOUTS[layout](t) for t in (x.q, x.k, x.v))
    o, state = lightning_attention(
        q, k, v, x.decay, initial_state=x.initial_state, return_state=True, backend=backend
    )
    assert o.shape == x.v.shape and state.dtype == accumulation_dtype(x.q.dtype)
    assert_same_bits(state, x.initial_state)
