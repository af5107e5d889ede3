"""Values and gradients against the float64 recurrence."""

import pytest
import torch
from support import (
    DTYPES,
    HALF,
    Inputs,
    assert_close_to_truth,
    assert_result,
    check,
    differentiate,
    dtype_id,
    error,
    make_inputs,
    norm_results,
    run,
    truth,
)

from lightning_attn import lightning_attention_decode
from lightning_attn.backends import reference
from lightning_attn.dispatch import accumulation_dtype

# Around the edges of a block of 64 tokens.
LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 191]
HEAD_DIMS = [
    (1, 1), (1, 256), (256, 1), (2, 3), (7, 9), (16, 16), (15, 33), (31, 17), (64, 64), (65, 48), (80, 96),
    (96, 129), (127, 63), (128, 128), (131, 160), (192, 100), (255, 253), (256, 256),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("T", LENGTHS)
def test_every_output_and_gradient_obeys_the_rule_around_block_edges(variant, T, dtype):
    """Row 1: error at most twice that of plain PyTorch in the same dtype, for o, the state and every gradient."""
    x = make_inputs(T=T, dtype=dtype)
    check(run(x, variant), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("K", "V"), HEAD_DIMS)
def test_head_dims_from_1_to_256_and_k_unlike_v(variant, K, V, dtype):
    """Rows 1 and 12: any head dimensions, odd ones and K != V among them."""
    x = make_inputs(B=1, T=70, H=2, K=K, V=V, dtype=dtype, scale=K**-0.5)
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
    x = make_inputs(B=1, T=1000, H=2, K=40, V=33, dtype=dtype, rates=(0.01, 0.2))
    check(run(x, variant), x)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_long_and_short_documents_cut_among_threads_obey_the_rule(variant, threads):
    """Rows 1 and 11: some documents are cut into segments, their neighbours are not."""
    torch.set_num_threads(threads)
    x = make_inputs(lengths=(3, 700, 0, 64, 430, 1), H=1, K=48, V=40, rates=(0.004,))
    check(run(x, variant), x)


@pytest.mark.parametrize("rates", [(0.0,), (1e-6, 1e-3), (1.0, 10.0), (100.0, 1e4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=dtype_id)
def test_slopes_from_0_to_1e4_obey_the_rule(variant, rates, dtype):
    """Row 16: no decay, slow and fast decay, and decay that underflows within one token."""
    x = make_inputs(T=150, H=2, dtype=dtype, rates=rates)
    check(run(x, variant), x)


@pytest.mark.parametrize("form", ["recurrence", "quadratic", "block_form"])
@pytest.mark.parametrize("lengths", [None, (70, 0, 1, 64)], ids=["dense", "packed"])
def test_the_three_forms_of_the_reference_agree_in_float64(form, lengths):
    """Row 1: recurrence, quadratic and block form are one function, with one set of gradients."""
    x = make_inputs(T=135, lengths=lengths, dtype=torch.float64)
    for name, y in differentiate(getattr(reference, form), x).items():
        assert error(y, truth(x)[name]) <= 1e-12, name


@pytest.mark.parametrize("block_size", [1, 3, 64, 1000])
def test_the_block_form_gives_the_same_for_every_block_size(block_size):
    """Row 1: the block is no part of the definition."""
    x = make_inputs(T=67, dtype=torch.float64)

    def form(*args, **kwargs):
        return reference.block_form(*args, **kwargs, block_size=block_size)

    for name, y in differentiate(form, x).items():
        assert error(y, truth(x)[name]) <= 1e-12, name


# ---- decode ---------------------------------------------------------------------------------------------------


def decode(x: Inputs, backend: str, state_dtype: torch.dtype) -> tuple[dict, dict, dict]:
    """(actual, truth, baseline) of o and the state after one call on a state of that dtype."""
    state = x.initial_state.to(state_dtype)
    expected = reference.recurrence(
        x.q.double(), x.k.double(), x.v.double(), x.decay, scale=x.scale, initial_state=state.double()
    )
    wide = state.to(accumulation_dtype(x.q.dtype))
    o, new = reference.block_form(x.q, x.k, x.v, x.decay, scale=x.scale, initial_state=wide)
    actual = lightning_attention_decode(x.q, x.k, x.v, x.decay, state, scale=x.scale, backend=backend)
    return (
        {"o": actual, "state": state},
        dict(zip(("o", "state"), expected, strict=True)),
        {"o": o, "state": new.to(state_dtype)},
    )


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_decode_obeys_the_rule(variant, dtype, T):
    """Row 1: o and the state in place, for one new token and for a few."""
    assert_result(
        *decode(make_inputs(B=3, T=T, H=4, K=40, V=24, dtype=dtype), variant, accumulation_dtype(dtype))
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
def test_decode_on_a_bfloat16_state_obeys_the_rule(variant, dtype):
    """Row 1: a state kept in bfloat16 is rounded once per call."""
    assert_result(*decode(make_inputs(B=3, T=3, H=4, K=40, V=24, dtype=dtype), variant, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("K", "V"), HEAD_DIMS)
def test_decode_takes_head_dims_from_1_to_256_and_k_unlike_v(variant, K, V, dtype):
    """Rows 1 and 12: any head dimensions."""
    assert_result(
        *decode(make_inputs(B=2, T=1, H=2, K=K, V=V, dtype=dtype), variant, accumulation_dtype(dtype))
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_decode_of_many_heads_on_several_threads_obeys_the_rule(variant, threads):
    """Row 1: enough state for every thread."""
    torch.set_num_threads(threads)
    assert_result(*decode(make_inputs(B=5, T=1, H=7, K=64, V=64), variant, torch.float32))


# ---- gated RMS norm -------------------------------------------------------------------------------------------


def norm_inputs(shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    x, gate, weight, dy = normal(*shape), 3 * normal(*shape), 1 + normal(shape[-1]), normal(*shape)
    return [x.to(dtype), gate.to(dtype), weight.to(weight_dtype), dy.to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "shape", [(1,), (3, 1), (2, 3, 7), (5, 16), (4, 33), (2, 2, 3, 64), (70, 129), (9, 1000)]
)
def test_gated_rms_norm_obeys_the_rule(variant, shape, dtype):
    """Rows 1 and 12: y and the gradients of x, gate and weight, for any number of leading dimensions."""
    actual, expected, plain = norm_results(*norm_inputs(shape, dtype, dtype), eps=1e-6, backend=variant)
    for name, y in actual.items():
        assert_close_to_truth(y, expected[name], plain[name], name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gated_rms_norm_takes_a_float32_weight(variant, dtype):
    """Row 1: the weight's gradient is float32 too."""
    actual, expected, plain = norm_results(
        *norm_inputs((6, 40), dtype, torch.float32), eps=0.1, backend=variant
    )
    for name, y in actual.items():
        assert_close_to_truth(y, expected[name], plain[name], name=name)
