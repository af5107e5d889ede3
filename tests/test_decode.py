"""Decode against the float64 recurrence: o, and the state in place."""

from dataclasses import replace

import pytest
import torch
from decode_support import check_decode
from support import DTYPES, HALF, affordable, dtype_id, make_inputs

from lightning_attn.dispatch import accumulation_dtype

pytestmark = pytest.mark.op("attention_decode")


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


@pytest.mark.parametrize("threads", [1, 3])
def test_decode_of_many_heads_on_several_threads_obeys_the_rule(variant, threads):
    """Row 1: enough state for every thread."""
    torch.set_num_threads(threads)
    B = affordable(variant, 35, 5)
    check_decode(make_inputs(B=B, T=1, H=7, K=64, V=64), variant, torch.float32)
