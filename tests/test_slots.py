"""Decode on a cache of states that sequences own by slot."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import HALF, assert_same_bits, device_of, dtype_id, make_inputs

from lightning_attn import lightning_attention_decode

pytestmark = pytest.mark.op("attention_decode")

S = 9  # rows of the cache


def cache_of(x, dtype=torch.float32):
    random = torch.Generator().manual_seed(1)
    shape = (S, *x.initial_state.shape[1:])
    return torch.randn(shape, generator=random).to(dtype).to(x.q.device)


def decode(x, state, slots, backend, rows=slice(None)):
    q, k, v = (t[rows] for t in (x.q, x.k, x.v))
    return lightning_attention_decode(q, k, v, x.decay, state, slots=slots, scale=x.scale, backend=backend)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=dtype_id)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
def test_slots_give_what_gathered_states_give(variant, dtype, integers):
    """Row 17: each sequence its row of the cache, in the order of the slots."""
    x = make_inputs(B=5, T=2, H=3, K=9, V=17, dtype=dtype).to(device_of(variant))
    slots = torch.tensor([7, 0, 3, 8, 2], dtype=integers, device=x.q.device)
    state = cache_of(x)
    gathered = state[slots.long()].clone()
    o = decode(x, state, slots, variant)
    assert_same_bits(o, decode(x, gathered, None, variant))
    assert_same_bits(state[slots.long()], gathered)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@given(slots=st.lists(st.one_of(st.just(-1), st.integers(0, S - 1)), min_size=5, max_size=5).filter(
    lambda slots: len({s for s in slots if s >= 0}) == sum(s >= 0 for s in slots)
))  # fmt: skip
def test_padding_gives_zeros_and_untouched_rows_keep_every_bit(backend, state_dtype, slots):
    """Row 17: -1 touches no state; a row that no slot names stays as it was."""
    x = make_inputs(B=5, T=2, H=3, K=9, V=17).to(device_of(backend))
    state = cache_of(x, state_dtype)
    before = state.clone()
    o = decode(x, state, torch.tensor(slots, device=x.q.device), backend)
    for b, slot in enumerate(slots):
        if slot < 0:
            assert not o[b].any()
        else:
            assert o[b].all()
            assert not torch.equal(state[slot], before[slot])
    for row in set(range(S)) - set(slots):
        assert_same_bits(state[row], before[row])


@given(order=st.permutations(range(5)))
def test_the_order_of_the_sequences_does_not_matter(backend, order):
    """Row 17: permuted sequences with their slots give permuted outputs and the same cache, to the last bit."""
    x = make_inputs(B=5, T=2, H=3, K=9, V=17).to(device_of(backend))
    slots = torch.tensor([7, -1, 3, 8, 2], device=x.q.device)
    first, second = cache_of(x), cache_of(x)
    o = decode(x, first, slots, backend)
    permuted = decode(x, second, slots[list(order)], backend, rows=list(order))
    assert_same_bits(permuted, o[list(order)])
    assert_same_bits(second, first)


def test_permuted_rows_of_the_cache_do_not_matter(variant):
    """Row 17: where a state lies in the cache is of no consequence."""
    x = make_inputs(B=5, T=2, H=3, K=9, V=17).to(device_of(variant))
    slots = torch.tensor([7, 0, 3, 8, 2], device=x.q.device)
    first = cache_of(x)
    permutation = torch.tensor([4, 8, 0, 2, 6, 1, 7, 3, 5], device=x.q.device)
    second = first[permutation].clone()
    moved = torch.argsort(permutation)[slots]
    assert_same_bits(decode(x, second, moved, variant), decode(x, first, slots, variant))
    assert_same_bits(second, first[permutation])


@pytest.mark.parametrize("slots", [(0, 0), (3, 3), (-1, 4, 2, 4), (-2, 0), (0, S), (S + 1, 1)], ids=str)
def test_slots_that_are_duplicated_or_out_of_range_are_refused_and_no_state_changes(
    backend, slots, monkeypatch
):
    """Rows 13 and 17: two sequences cannot own one state."""
    monkeypatch.setenv("LIGHTNING_ATTN_CHECK", "1")  # a GPU's slots are looked at only then
    x = make_inputs(B=len(slots), T=1, H=2).to(device_of(backend))
    state = cache_of(x)
    before = state.clone()
    slots = torch.tensor(slots, device=x.q.device)
    with pytest.raises(ValueError, match="slots"):
        decode(x, state, slots, backend)
    assert_same_bits(state, before)


def test_padding_may_repeat(variant):
    """Row 17: -1 is no duplicate."""
    x = make_inputs(B=4, T=1, H=2).to(device_of(variant))
    state = cache_of(x)
    o = decode(x, state, torch.tensor([-1, 5, -1, -1], device=x.q.device), variant)
    assert o[1].all() and not o[[0, 2, 3]].any()


def test_the_state_is_updated_in_place_and_autograd_knows(backend):
    """Row 17: the tensor that was passed holds the new state, and its version has moved on."""
    x = make_inputs(B=2, T=1, H=2).to(device_of(backend))
    state = x.initial_state.clone()
    pointer, version = state.data_ptr(), state._version
    lightning_attention_decode(x.q, x.k, x.v, x.decay, state, backend=backend)
    assert state.data_ptr() == pointer
    assert state._version > version
    assert not torch.equal(state, x.initial_state)
