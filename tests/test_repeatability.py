"""The same call gives the same bits."""

import pytest
import torch
from support import (
    COMPILED,
    DTYPES,
    affordable,
    assert_same_bits,
    check,
    device_of,
    dtype_id,
    dtypes_of,
    make_inputs,
    make_norm_inputs,
    run,
    run_norm,
)

from lightning_attn import lightning_attention_decode

SHAPES = {
    "many heads": {"B": 2, "T": 130, "H": 5, "K": 16, "V": 24},
    "one long sequence": {"B": 1, "T": 1500, "H": 1, "K": 40, "V": 33},
    "packed": {"lengths": (3, 700, 0, 64, 430), "H": 1, "K": 40, "V": 33},
}
FEWER = {
    "many heads": {"B": 1, "T": 130, "H": 3, "K": 16, "V": 24},
    "one long sequence": {"B": 1, "T": 400, "H": 1, "K": 40, "V": 33},
    "packed": {"lengths": (3, 130, 0, 64, 130), "H": 1, "K": 40, "V": 33},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES)
def test_repeated_calls_agree_to_the_last_bit(variant, shape, dtype):
    """Row 21: outputs and gradients, whichever thread took which part."""
    torch.set_num_threads(3)
    x = make_inputs(**affordable(variant, SHAPES, FEWER)[shape], dtype=dtype)
    first = run(x, variant)
    ballast = []
    for n in range(4):
        ballast.append(torch.empty(1000 * n + 1))  # so that buffers come to lie elsewhere
        for name, y in run(x, variant).items():
            assert_same_bits(y, first[name], name)


@pytest.mark.op("attention_decode")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_repeated_decode_agrees_to_the_last_bit(variant, dtype):
    """Row 21: the in-place state starts from the same bits."""
    torch.set_num_threads(3)
    x = make_inputs(
        B=affordable(variant, 7, 2), T=2, H=affordable(variant, 5, 2), K=64, V=65, dtype=dtype
    ).to(device_of(variant))

    def results():
        state = x.initial_state.clone()
        o = lightning_attention_decode(x.q, x.k, x.v, x.decay, state, backend=variant)
        return [o, state]

    first = results()
    for _ in range(4):
        for a, b in zip(results(), first, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_repeated_norm_agrees_to_the_last_bit(variant, dtype):
    """Row 21: y and the gradients."""
    torch.set_num_threads(3)
    norm = make_norm_inputs((150, 257), dtype)
    first = run_norm(norm, 1e-6, variant)
    for _ in range(4):
        for name, y in run_norm(norm, 1e-6, variant).items():
            assert_same_bits(y, first[name], name)


@pytest.mark.parametrize("backend", COMPILED)  # Triton's interpreter itself is one thread's
def test_calls_from_several_python_threads_do_not_disturb_each_other(backend):
    """Row 21: workspaces belong to their thread."""
    from concurrent.futures import ThreadPoolExecutor

    cases = [
        make_inputs(B=1, T=T, H=2, K=K, V=V, dtype=dtype)
        for T, K, V, dtype in (
            (130, 16, 24, torch.float32),
            (70, 64, 17, torch.bfloat16),
            (200, 33, 40, dtypes_of(backend)[0]),  # the widest
        )
    ]
    expected = [run(x, backend) for x in cases]
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda n: run(cases[n % 3], backend), range(30)))
    for n, result in enumerate(results):
        for name, y in result.items():
            assert_same_bits(y, expected[n % 3][name], name)
    check(results[0], cases[0])
