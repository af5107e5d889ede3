"""Sequences split and packed in any way give what the whole gives."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    HALF,
    Inputs,
    Result,
    affordable,
    assert_close_to_truth,
    assert_same_bits,
    baseline,
    check,
    device_of,
    dtype_id,
    make_inputs,
    run,
    truth,
)

from lightning_attn import lightning_attention, lightning_attention_decode


def check_forward(o: torch.Tensor, state: torch.Tensor, x: Inputs) -> None:
    """The rule for o and the state, without gradients."""
    for name, y, dim in (("o", o, 2), ("state", state, 1)):
        assert_close_to_truth(y.cpu(), truth(x)[name], baseline(x)[name], name=name, head_dim=dim)


def attend_in_pieces(x: Inputs, cuts: list[int], decode: list[bool], backend: str) -> tuple:
    """o and the state, each piece between cuts by a prefill or by a decode call."""
    x = x.to(device_of(backend))
    state, outputs = x.initial_state.clone(), []
    for (a, b), by_decode in zip(pairwise(cuts), decode, strict=True):
        q, k, v = (t[:, a:b] for t in (x.q, x.k, x.v))
        if by_decode:
            o = lightning_attention_decode(q, k, v, x.decay, state, scale=x.scale, backend=backend)
        else:
            o, state = lightning_attention(
                q, k, v, x.decay, scale=x.scale, initial_state=state, return_state=True, backend=backend
            )
        outputs.append(o)
    return torch.cat(outputs, 1), state


T = 150
pieces = st.lists(st.integers(0, T), max_size=6).flatmap(
    lambda cuts: st.tuples(
        st.just([0, *sorted(cuts), T]),
        st.lists(st.booleans(), min_size=len(cuts) + 1, max_size=len(cuts) + 1),
    )
)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
@given(pieces=pieces)
def test_prefill_split_anywhere_and_continued_by_decode_equals_the_whole(backend, dtype, pieces):
    """Row 18: any cuts, empty pieces among them; each piece by a prefill or by a decode call."""
    x = make_inputs(B=affordable(backend, 2, 1), T=T, H=2, K=16, V=24, dtype=dtype)
    check_forward(*attend_in_pieces(x, *pieces, backend), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=dtype_id)
@pytest.mark.parametrize("prompt", [0, 1, 63, 64, 65])
def test_prefill_then_one_token_at_a_time_equals_the_whole(variant, prompt, dtype):
    """Row 18: as a server does it."""
    total = prompt + 12
    x = make_inputs(B=affordable(variant, 16, 4), T=total, H=2, K=16, V=24, dtype=dtype)
    cuts = [0, *range(prompt, total + 1)]
    check_forward(*attend_in_pieces(x, cuts, [False] + [True] * 12, variant), x)


@pytest.mark.parametrize("cuts", [(1,), (64,), (30, 64, 65), (100, 100)], ids=str)
def test_gradients_flow_through_the_states_between_pieces(backend, cuts):
    """Row 18: backward through a chain of prefills is that of the whole."""
    x = make_inputs(B=2, T=130, H=2)
    y = x.to(device_of(backend))
    leaves = [getattr(y, n).clone().requires_grad_() for n in ("q", "k", "v", "initial_state")]
    q, k, v, state = leaves
    outputs = []
    for a, b in pairwise((0, *cuts, 130)):
        o, state = lightning_attention(
            q[:, a:b], k[:, a:b], v[:, a:b], y.decay,
            scale=y.scale, initial_state=state, return_state=True, backend=backend,
        )  # fmt: skip
        outputs.append(o)
    o = torch.cat(outputs, 1)
    gradients = torch.autograd.grad((o, state), leaves, (y.do, y.dstate))
    names = ("dq", "dk", "dv", "dinitial_state")
    result: Result = {"o": o, "state": state, **dict(zip(names, gradients, strict=True))}
    check({name: t.detach().cpu() for name, t in result.items()}, x)


documents = st.lists(
    st.one_of(st.integers(0, 5), st.integers(60, 70), st.integers(0, 140)), min_size=1, max_size=7
)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
@given(lengths=documents)
def test_documents_packed_in_any_way_equal_themselves_alone(backend, dtype, lengths):
    """Row 18: outputs, states and all gradients of any packing, against documents computed one by one."""
    x = make_inputs(lengths=tuple(lengths), H=affordable(backend, 2, 1), K=16, V=24, dtype=dtype)
    if sum(lengths) > 0:  # else autograd has no truth, see test_edges
        check(run(x, backend), x)


def alone(x: Inputs, lengths: tuple[int, ...], n: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    a = sum(lengths[:n])
    q, k, v = (t[:, a : a + lengths[n]] for t in (x.q, x.k, x.v))
    return lightning_attention(
        q, k, v, x.decay, scale=x.scale, initial_state=x.initial_state[n : n + 1], return_state=True,
        backend=backend,
    )  # fmt: skip


@given(lengths=documents, order=st.randoms(use_true_random=False))
def test_the_order_of_the_documents_does_not_matter(backend, uncut, lengths, order):
    """Row 18: a mixed batch in any order; where no document is cut, to the last bit."""
    x = make_inputs(lengths=tuple(lengths), H=2, K=16, V=24).to(device_of(backend))
    permutation = list(range(len(lengths)))
    order.shuffle(permutation)
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    index = torch.cat([torch.arange(starts[n], starts[n] + lengths[n]) for n in permutation]).to(x.q.device)
    shuffled = torch.tensor([0, *(lengths[n] for n in permutation)]).cumsum(0).to(x.q.device)

    def call(q, k, v, initial_state, cu_seqlens):
        return lightning_attention(
            q, k, v, x.decay, initial_state=initial_state, cu_seqlens=cu_seqlens, return_state=True,
            backend=backend,
        )  # fmt: skip

    o, state = call(x.q, x.k, x.v, x.initial_state, x.cu_seqlens)
    q, k, v = (t[:, index] for t in (x.q, x.k, x.v))
    o_, state_ = call(q, k, v, x.initial_state[permutation], shuffled)
    assert_same_bits(o_, o[:, index])
    assert_same_bits(state_, state[permutation])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
def test_a_packed_document_equals_itself_alone_to_the_last_bit(variant, uncut, dtype):
    """Row 18: where no document is cut."""
    lengths = (70, 0, 1, 129, 64)
    x = make_inputs(lengths=lengths, H=2, K=17, V=24, dtype=dtype).to(device_of(variant))
    o, state = lightning_attention(
        x.q, x.k, x.v, x.decay, scale=x.scale, initial_state=x.initial_state, cu_seqlens=x.cu_seqlens,
        return_state=True, backend=variant,
    )  # fmt: skip
    for n, length in enumerate(lengths):
        a = sum(lengths[:n])
        own_o, own_state = alone(x, lengths, n, variant)
        assert_same_bits(o[:, a : a + length], own_o)
        assert_same_bits(state[n : n + 1], own_state)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
def test_the_rows_of_a_batch_equal_themselves_alone(variant, uncut, dtype):
    """Row 18: under the rule, and in kernels of our own to the last bit where no sequence is cut."""
    x = make_inputs(B=4, T=70, H=2, K=17, V=24, dtype=dtype)
    y = x.to(device_of(variant))

    def attend(rows):
        return lightning_attention(
            y.q[rows], y.k[rows], y.v[rows], y.decay, scale=y.scale, initial_state=y.initial_state[rows],
            return_state=True, backend=variant,
        )  # fmt: skip

    rows = [slice(b, b + 1) for b in range(4)]
    o, final = (torch.cat(parts) for parts in zip(*map(attend, rows), strict=True))
    check_forward(o, final, x)
    if variant == "reference":
        return
    for a, b in zip((o, final), attend(slice(None)), strict=True):
        assert_same_bits(a, b)


@pytest.mark.op("attention_decode")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
def test_the_rows_of_a_decoded_batch_equal_themselves_alone(variant, dtype):
    """Row 18: under the rule, and in kernels of our own to the last bit."""
    x = make_inputs(B=4, T=3, H=2, K=17, V=24, dtype=dtype)
    y = x.to(device_of(variant))

    def decode(rows):
        state = y.initial_state[rows].clone()
        o = lightning_attention_decode(
            y.q[rows], y.k[rows], y.v[rows], y.decay, state, scale=y.scale, backend=variant
        )
        return o, state

    o, state = (torch.cat(parts) for parts in zip(*(decode(slice(b, b + 1)) for b in range(4)), strict=True))
    check_forward(o, state, x)
    if variant == "reference":
        return
    for a, b in zip((o, state), decode(slice(None)), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
def test_the_heads_of_a_call_equal_themselves_alone(variant, dtype):
    """Row 18: as tensor parallelism cuts them."""
    x = make_inputs(B=2, T=70, H=4, K=17, V=24, dtype=dtype)
    parts = []
    for heads in (slice(0, 1), slice(1, 4)):
        y = x.to(device_of(variant))
        parts.append(
            lightning_attention(
                y.q[:, :, heads],
                y.k[:, :, heads],
                y.v[:, :, heads],
                y.decay[heads],
                scale=y.scale,
                initial_state=y.initial_state[:, heads],
                return_state=True,
                backend=variant,
            )
        )
    check_forward(torch.cat([o for o, _ in parts], 2), torch.cat([s for _, s in parts], 1), x)
