"""Values and gradients of the attention against the float64 recurrence."""

from dataclasses import replace

import pytest
import torch
from support import (
    DTYPES,
    affordable,
    check,
    differentiate,
    dtype_id,
    error,
    make_inputs,
    run,
    truth,
)

from lightning_attn.backends import reference

# Around the edges of a block of 64 tokens.
LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 191]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T", LENGTHS)
def test_every_output_and_gradient_obeys_the_rule_around_block_edges(variant, T, dtype):
    """Row 1: error at most twice that of plain PyTorch in the same dtype, for o, the state and every gradient."""
    x = make_inputs(B=affordable(variant, max(2, 64 // T), 8 if T < 3 else 2), T=T, dtype=dtype)
    check(run(x, variant), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_packed_documents_obey_the_rule(variant, dtype):
    """Rows 1 and 11: documents of many lengths, empty ones among them, each with its own state."""
    x = make_inputs(lengths=(5, 0, 64, 1, 63, 0, 130, 65), dtype=dtype)
    check(run(x, variant), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_sequence_without_an_initial_state_starts_from_zero(variant, dtype):
    """Row 1: no initial state is a state of zeros."""
    x = make_inputs(T=100, state=False, dtype=dtype)
    check(run(x, variant), x)


@pytest.mark.parametrize("scale", [0.125, -3.0, 0.0])
def test_the_scale_applies_to_o_and_to_what_flows_back_through_o(variant, scale):
    """Row 1: o and its gradients are scaled, the state and its gradient are not."""
    x = make_inputs(T=90, scale=scale)
    check(run(x, variant), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_one_long_sequence_cut_among_threads_obeys_the_rule(variant, threads, dtype):
    """Row 1: few heads and a long sequence, so that the threads share it in segments."""
    torch.set_num_threads(threads)
    x = make_inputs(B=1, T=affordable(variant, 1000, 300), H=2, K=40, V=33, dtype=dtype, rates=(0.01, 0.2))
    check(run(x, variant), x)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_long_and_short_documents_cut_among_threads_obey_the_rule(variant, threads):
    """Rows 1 and 11: some documents are cut into segments, their neighbours are not."""
    torch.set_num_threads(threads)
    lengths = affordable(variant, (3, 700, 0, 64, 430, 1), (3, 200, 0, 64, 130, 1))
    x = make_inputs(lengths=lengths, H=1, K=48, V=40, rates=(0.004,))
    check(run(x, variant), x)


@pytest.mark.parametrize("rates", [(0.0,), (1e-6, 1e-3), (1.0, 10.0), (100.0, 1e4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_slopes_from_0_to_1e4_obey_the_rule(variant, rates, dtype):
    """Row 16: no decay, slow and fast decay, and decay that underflows within one token."""
    x = make_inputs(T=150, H=2, dtype=dtype, rates=rates)
    check(run(x, variant), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T", [1, 3, 65])
def test_large_states_that_fade_fast_obey_the_rule(variant, T, dtype):
    """Rows 1 and 16: what is left of a state that decays by orders of magnitude keeps its precision."""
    x = make_inputs(B=4, T=T, H=4, dtype=dtype, rates=(0.1, 0.5, 2.0, 5.0))
    x = replace(x, initial_state=1e3 * x.initial_state, dstate=1e3 * x.dstate)
    check(run(x, variant), x)


@pytest.mark.parametrize("form", ["recurrence", "quadratic", "block_form"])
@pytest.mark.parametrize("lengths", [None, (70, 0, 1, 64)], ids=["dense", "packed"])
def test_the_three_forms_of_the_reference_agree_in_float64(form, lengths):
    """Row 1: recurrence, quadratic and block form are one function, with one set of gradients."""
    x = make_inputs(T=135, lengths=lengths, dtype=torch.float64)
    for name, y in differentiate(getattr(reference, form), x).items():
        assert error(y, truth(x)[name]) <= 1e-12, name


@pytest.mark.parametrize("block_size", [1, 16, 64, 1000])
def test_the_block_form_gives_the_same_for_every_block_size(block_size):
    """Row 1: the block is no part of the definition."""
    x = make_inputs(T=67, dtype=torch.float64)

    def form(*args, **kwargs):
        return reference.block_form(*args, **kwargs, block_size=block_size)

    for name, y in differentiate(form, x).items():
        assert error(y, truth(x)[name]) <= 1e-12, name
