"""The gated RMS norm and its gradients against NumPy in float64, or in 28 decimal digits."""

import pytest
import torch
from support import DTYPES, check_norm, dtype_id, make_norm_inputs, run_norm


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
