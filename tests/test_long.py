"""Long sequences, slow and fast decay, and large offsets."""

import functools

import pytest
import torch
from support import (
    COMPILED,
    HALF,
    HEAD_DIM,
    affordable,
    assert_close_to_truth,
    assert_result,
    assert_same_bits,
    device_of,
    differentiate,
    dtype_id,
    dtypes_of,
    make_inputs,
    run,
    truth,
)

from lightning_attn import lightning_attention, lightning_attention_decode
from lightning_attn.backends import reference

KERNELS = [backend for backend in COMPILED if backend != "reference"]


# The error of a long sum grows with the number of its roundings: here plain PyTorch takes blocks of 64 as the
# kernels do, so that both round a state equally often.
plain_blocks = functools.partial(reference.block_form, block_size=64)
exact_blocks = functools.partial(reference.block_form, block_size=128)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=dtype_id)
@pytest.mark.parametrize("threads", [1, 5])
def test_thousands_of_tokens_that_hardly_decay_obey_the_rule(variant, dtype, threads):
    """Rows 1 and 16: sums of thousands of terms, for outputs and gradients."""
    torch.set_num_threads(threads)
    x = make_inputs(
        B=1, T=affordable(variant, 4000, 1000), H=3, K=24, V=16, dtype=dtype, rates=(0.0, 1e-4, 0.02)
    )
    assert_result(run(x, variant), truth(x), long_baseline(x))


@functools.cache
def long_baseline(x):
    return differentiate(plain_blocks, x)


def normal(*shape, count):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random) for _ in range(count)]


SLOPES = (0.0, 1e-6, 1e-3, 1e4)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_million_tokens_with_slopes_from_0_to_1e4(backend):
    """Row 16: finite, and as near to float64 as plain PyTorch is, head by head."""
    tensors = normal(1, 1 << 20, len(SLOPES), 4, count=3)
    decay = torch.tensor(SLOPES)
    expected = exact_blocks(*(x.double() for x in tensors), decay)
    plain = plain_blocks(*tensors, decay)
    on_device = (x.to(device_of(backend)) for x in (*tensors, decay))
    actual = lightning_attention(*on_device, return_state=True, backend=backend)
    for name, y, e, p in zip(("o", "state"), actual, expected, plain, strict=True):
        assert y.isfinite().all()
        assert_close_to_truth(y.cpu(), e, p, name=name, head_dim=HEAD_DIM[name])


@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_of_a_quarter_million_tokens_with_slopes_from_0_to_1e4(backend):
    """Row 16: each gradient is a forward of other operands, the last two of them in reversed time:
    dq of (do, v, k), dk of (v, do, q), dv of (k, q, do). So nothing has to be kept for autograd.
    """
    q, k, v, do = normal(1, 1 << 18, len(SLOPES), 4, count=4)
    decay = torch.tensor(SLOPES)
    device = device_of(backend)
    leaves = [x.to(device, copy=True).requires_grad_() for x in (q, k, v)]
    o = lightning_attention(*leaves, decay.to(device), backend=backend)
    actual = torch.autograd.grad(o, leaves, do.to(device))
    operands = {"dq": (do, v, k), "dk": (v, do, q), "dv": (k, q, do)}
    for (name, xs), y in zip(operands.items(), actual, strict=True):
        xs = xs if name == "dq" else [x.flip(1) for x in xs]
        expected, plain = exact_blocks(*(x.double() for x in xs), decay)[0], plain_blocks(*xs, decay)[0]
        if name != "dq":
            expected, plain = expected.flip(1), plain.flip(1)
        assert y.isfinite().all()
        assert_close_to_truth(y.cpu(), expected, plain, name=name, head_dim=2)


@pytest.mark.parametrize("rate", [0.0, 1e-6, 1e-3, 0.7, 1e4])
def test_a_constant_sequence_gives_the_geometric_series(variant, rate):
    """Row 16: k = v = 1 sum to (1 - e^{-st}) / (1 - e^{-s})."""
    T = affordable(variant, 20000, 2000)
    one = torch.ones(1, T, 1, 1, device=device_of(variant))
    decay = torch.tensor([rate], device=one.device)
    o = lightning_attention(one, one, one, decay, backend=variant).cpu().flatten()
    s = decay.cpu().double()
    t = torch.arange(1, T + 1, dtype=torch.float64)
    expected = torch.expm1(-s * t) / torch.expm1(-s) if rate else t
    plain = plain_blocks(*(torch.ones(1, T, 1, 1) for _ in range(3)), decay.cpu())[0].flatten()
    assert_close_to_truth(o, expected, plain)


def far_apart(*values: torch.Tensor) -> list[torch.Tensor]:
    """Views of one storage whose first dimension steps 2^30 elements, so that the third is beyond 2^31."""
    step = 1 << 30
    storage = torch.empty(2 * step + 4096, dtype=values[0].dtype, device=values[0].device)  # hardly touched
    views, start = [], 0
    for x in values:
        strides = (step, *x.stride()[1:])
        views.append(storage.as_strided(x.shape, strides, start).copy_(x))
        start += x[0].numel()
    return views


def half_of(backend: str, op: str) -> torch.dtype:
    """A 16-bit dtype in which the backend takes a raw function: bfloat16, or else float16."""
    return next(dtype for dtype in HALF if dtype in dtypes_of(backend, op))


@pytest.mark.parametrize("dim", [0, 1], ids=["batch", "tokens"])
def test_offsets_beyond_2_to_the_31_elements(backend, dim):
    """Row 14: rows of the batch, or tokens, 2^30 elements apart."""
    dtype = half_of(backend, "attention_backward")
    x = make_inputs(B=3, T=3, H=2, K=8, V=8, dtype=dtype).to(device_of(backend))
    tensors = [t.transpose(0, dim).contiguous() for t in (x.q, x.k, x.v, x.do)]
    q, k, v, do = (t.transpose(0, dim) for t in far_apart(*tensors))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    o = lightning_attention(*leaves, x.decay, backend=backend)
    dense = [getattr(x, n).clone().requires_grad_() for n in "qkv"]
    expected = lightning_attention(*dense, x.decay, backend=backend)
    assert_same_bits(o, expected)
    gradients = torch.autograd.grad(o, leaves, do)
    for a, b in zip(gradients, torch.autograd.grad(expected, dense, x.do), strict=True):
        assert_same_bits(a, b)


@pytest.mark.op("attention_decode")
def test_states_beyond_2_to_the_31_elements(backend):
    """Row 14: rows of a cache 2^30 elements apart."""
    dtype = half_of(backend, "attention_decode")
    x = make_inputs(B=3, T=1, H=2, K=8, V=8, dtype=dtype).to(device_of(backend))
    dense = x.initial_state.to(torch.bfloat16)
    (state,) = far_apart(dense)
    o = lightning_attention_decode(x.q, x.k, x.v, x.decay, state, backend=backend)
    expected = lightning_attention_decode(x.q, x.k, x.v, x.decay, dense, backend=backend)
    assert_same_bits(o, expected)
    assert_same_bits(state, dense)
