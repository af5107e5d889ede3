"""Values and gradients against the float64 recurrence."""

import functools
from dataclasses import replace

import pytest
import torch
from support import (
    DTYPES,
    HALF,
    Inputs,
    affordable,
    assert_close_to_truth,
    check,
    check_norm,
    device_of,
    differentiate,
    dtype_id,
    error,
    make_inputs,
    make_norm_inputs,
    run,
    run_norm,
    truth,
)
from torch import Tensor

from lightning_attn import lightning_attention_decode
from lightning_attn.backends import reference
from lightning_attn.dispatch import accumulation_dtype

# Around the edges of a block of 64 tokens.
LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 191]
HEAD_DIMS = [
    (1, 1), (1, 48), (48, 1), (2, 3), (16, 16), (15, 33), (31, 17), (64, 64), (65, 48), (80, 96), (127, 63),
    (128, 128), (131, 160), (256, 256),
]  # fmt: skip
DTYPES_AND_HEAD_DIMS = [
    *((dtype, K, V) for dtype in (torch.float32, torch.bfloat16) for K, V in HEAD_DIMS),
    *((dtype, K, V) for dtype in (torch.float64, torch.float16) for K, V in HEAD_DIMS[1:14:3]),
    *((dtype, K, V) for dtype in HALF for K, V in ((1, 256), (256, 1))),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T", LENGTHS)
def test_every_output_and_gradient_obeys_the_rule_around_block_edges(variant, T, dtype):
    """Row 1: error at most twice that of plain PyTorch in the same dtype, for o, the state and every gradient."""
    x = make_inputs(B=affordable(variant, max(2, 64 // T), 8 if T < 3 else 2), T=T, dtype=dtype)
    check(run(x, variant), x)


@pytest.mark.parametrize(("dtype", "K", "V"), DTYPES_AND_HEAD_DIMS, ids=dtype_id)
def test_head_dims_from_1_to_256_and_k_unlike_v(variant, dtype, K, V):
    """Rows 1 and 12: any head dimensions, odd ones and K != V among them."""
    B = 2 if K * V > 2**14 else max(4, 64 // min(K, V))  # enough numbers for errors to compare
    B = affordable(variant, B, min(B, 8))
    x = make_inputs(B=B, T=70, H=3, K=K, V=V, dtype=dtype, scale=K**-0.5)
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


# ---- decode ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=512)
def decode_results(x: Inputs, state_dtype: torch.dtype) -> tuple[Tensor, tuple, tuple]:
    """A state of that dtype, and (o, new state) in float64 and in plain PyTorch."""
    state = x.initial_state.to(state_dtype)
    y = x.double()
    exact = reference.recurrence(y.q, y.k, y.v, y.decay, scale=y.scale, initial_state=state.double())
    wide = state.to(accumulation_dtype(x.q.dtype))
    plain = reference.block_form(x.q, x.k, x.v, x.decay, scale=x.scale, initial_state=wide)
    return state, exact, plain


def check_decode(x: Inputs, backend: str, state_dtype: torch.dtype) -> None:
    """The rule for o and the state after one call on a state of that dtype."""
    state, exact, plain = decode_results(x, state_dtype)
    device = device_of(backend)
    on_device = [t.to(device, copy=True) for t in (x.q, x.k, x.v, x.decay, state)]
    o = lightning_attention_decode(*on_device, scale=x.scale, backend=backend)
    assert_close_to_truth(o.cpu(), exact[0], plain[0], x.v.dtype, "o", 2)
    new = on_device[-1].cpu()
    assert_close_to_truth(new, exact[1], plain[1].to(state_dtype), state_dtype, "state", 1)


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_decode_obeys_the_rule(variant, dtype, T):
    """Row 1: o and the state in place, for one new token and for a few."""
    B = affordable(variant, 64, 8)
    check_decode(make_inputs(B=B, T=T, H=4, K=40, V=24, dtype=dtype), variant, accumulation_dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_decode_of_large_states_that_fade_fast_obeys_the_rule(variant, dtype):
    """Rows 1 and 16: as in a prefill."""
    x = make_inputs(B=8, T=1, H=4, K=40, V=24, dtype=dtype, rates=(0.1, 0.5, 2.0, 5.0))
    x = replace(x, initial_state=1e3 * x.initial_state)
    check_decode(x, variant, accumulation_dtype(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
def test_decode_on_a_bfloat16_state_obeys_the_rule(variant, dtype):
    """Row 1: a state kept in bfloat16 is rounded once per call."""
    B = affordable(variant, 64, 8)
    check_decode(make_inputs(B=B, T=3, H=4, K=40, V=24, dtype=dtype), variant, torch.bfloat16)


@pytest.mark.parametrize(("dtype", "K", "V"), DTYPES_AND_HEAD_DIMS, ids=dtype_id)
def test_decode_takes_head_dims_from_1_to_256_and_k_unlike_v(variant, dtype, K, V):
    """Rows 1 and 12: any head dimensions."""
    B = 16 if K * V > 2**14 else max(64, 512 // min(K, V))
    B = affordable(variant, B, 16)
    x = make_inputs(B=B, T=1, H=2, K=K, V=V, dtype=dtype)
    check_decode(x, variant, accumulation_dtype(dtype))


@pytest.mark.parametrize("threads", [1, 3])
def test_decode_of_many_heads_on_several_threads_obeys_the_rule(variant, threads):
    """Row 1: enough state for every thread."""
    torch.set_num_threads(threads)
    B = affordable(variant, 35, 5)
    check_decode(make_inputs(B=B, T=1, H=7, K=64, V=64), variant, torch.float32)


# ---- gated RMS norm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "shape", [(300,), (300, 1), (2, 30, 7), (25, 16), (16, 33), (2, 2, 3, 64), (24, 129)], ids=str
)
def test_gated_rms_norm_obeys_the_rule(variant, shape, dtype):
    """Rows 1 and 12: y and the gradients of x, gate and weight, for any number of leading dimensions."""
    inputs = make_norm_inputs(shape, dtype)
    check_norm(run_norm(inputs, 0.1, variant), inputs, 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gated_rms_norm_takes_a_float32_weight(variant, dtype):
    """Row 1: the weight's gradient is float32 too."""
    inputs = make_norm_inputs((20, 40), dtype, torch.float32)
    check_norm(run_norm(inputs, 1e-6, variant), inputs, 1e-6)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_gated_rms_norm_of_many_rows_on_several_threads_obeys_the_rule(variant, threads):
    """Row 1: enough rows for every thread, whose sums of the weight's gradient are added."""
    torch.set_num_threads(threads)
    inputs = make_norm_inputs((311, 300), torch.float32)
    check_norm(run_norm(inputs, 1e-6, variant), inputs, 1e-6)
