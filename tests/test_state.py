"""The state alone, forward and backward in time, without outputs: against the truth and beside the functions with outputs."""

import itertools
from dataclasses import replace

import pytest
import torch
from support import (
    BACKENDS,
    DTYPES,
    HEAD_DIM,
    LAYOUTS,
    Inputs,
    affordable,
    assert_close_to_truth,
    assert_same_bits,
    baseline,
    device_of,
    dtype_id,
    dtypes_of,
    error,
    make_inputs,
    poisoned_memory,
    truth,
)
from torch import Tensor

from lightning_attn import backends, lightning_attention, ops
from lightning_attn.backends import reference

pytestmark = pytest.mark.op("attention_state")

RATES = (0.0, 1e-6, 0.01, 0.3, 5.0, 1e4)
DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def state(x: Inputs, backend: str, reverse: bool) -> Tensor:
    """Of k and v from the initial state; backward in time of q and do from the gradient of the state."""
    y = x.to(device_of(backend))
    k, v, initial = (y.q, y.do, y.dstate) if reverse else (y.k, y.v, y.initial_state)
    return ops.attention_state(k, v, y.decay, y.scale, initial, reverse, backend).cpu()


def scaled(x: Inputs) -> Inputs:
    """Inputs whose state is that of x with `scale` in its sum."""
    return replace(x, k=x.k * x.scale)


def expected(x: Inputs, reverse: bool) -> tuple[Tensor, Tensor]:
    """The truth and plain PyTorch in the inputs' dtype."""
    if not x.q.shape[1]:
        before = x.dstate if reverse else x.initial_state
        return before.double(), before
    if reverse:
        return truth(x)["dinitial_state"], baseline(x)["dinitial_state"]
    y = scaled(x.double())
    _, exact = reference.block_form(y.q, y.k, y.v, y.decay, initial_state=y.initial_state, block_size=16)
    z = scaled(x)
    _, plain = reference.block_form(z.q, z.k, z.v, z.decay, initial_state=z.initial_state)
    return exact, plain


def check(actual: Tensor, x: Inputs, reverse: bool) -> None:
    assert_close_to_truth(actual, *expected(x, reverse), name="state", head_dim=HEAD_DIM["state"])


@DIRECTIONS
@dtypes
@pytest.mark.parametrize("T", [0, 1, 63, 64, 65, 1000])
def test_state_obeys_the_rule(variant: str, T: int, dtype: torch.dtype, reverse: bool) -> None:
    """Row 1: of all rates, K unlike V, with nothing left unwritten."""
    x = make_inputs(B=2, T=T, H=6, K=20, V=33, dtype=dtype, rates=RATES)
    with poisoned_memory():
        actual = state(x, variant, reverse)
    check(actual, x, reverse)


@DIRECTIONS
@dtypes
@pytest.mark.parametrize("T", [0, 65, 1000])
def test_without_a_state_before_it_is_zero(variant: str, T: int, dtype: torch.dtype, reverse: bool) -> None:
    """Row 1: and for T = 0 the result is."""
    x = make_inputs(B=3, T=T, H=2, K=33, V=20, dtype=dtype)
    zero = replace(x, initial_state=torch.zeros_like(x.dstate), dstate=torch.zeros_like(x.dstate))
    y = x.to(device_of(variant))
    k, v = (y.q, y.do) if reverse else (y.k, y.v)
    with poisoned_memory():
        actual = ops.attention_state(k, v, y.decay, y.scale, None, reverse, variant).cpu()
    check(actual, zero, reverse)


@DIRECTIONS
@dtypes
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.5])
def test_a_sequence_that_threads_share_obeys_the_rule(
    variant: str, rate: float, dtype: torch.dtype, reverse: bool
) -> None:
    """Row 15: cut where there is but one head; also where only the end of it has a weight."""
    x = make_inputs(
        B=1, T=affordable(variant, 3000, 700), H=1, K=40, V=33, dtype=dtype, rates=(rate,), scale=0.3
    )
    check(state(x, variant, reverse), x, reverse)


@DIRECTIONS
@pytest.mark.parametrize(("T", "B"), [(0, 2), (65, 2), (700, 1)])
def test_it_is_the_state_of_the_attention_and_the_gradient_of_its_initial_state(
    variant: str, T: int, B: int, reverse: bool
) -> None:
    """Row 1: within rounding; on the CPU, on one thread, to the bit."""
    torch.set_num_threads(1)
    x = make_inputs(B=B, T=T, H=3, K=17, V=24, scale=1.0, rates=(0.0, 0.02, 0.4))
    y = x.to(device_of(variant))
    kernels = backends.load(variant)
    shared = y.q, y.k, y.v, y.decay, y.scale, y.initial_state, None
    if reverse:
        other = kernels.attention_backward(y.do, y.dstate, *shared)[3].cpu()
    else:
        other = kernels.attention_forward(*shared, True)[1].cpu()
    actual = state(x, variant, reverse)
    if variant == "cpu":
        assert_same_bits(actual, other)
    exact, plain = expected(x, reverse)
    assert error(actual, other, 1) <= 2 * error(plain, exact, 1) + torch.finfo(torch.float32).eps


@DIRECTIONS
@dtypes
def test_what_is_far_counts_until_its_weight_is_zero(variant: str, dtype: torch.dtype, reverse: bool) -> None:
    """Row 16: all tokens but those at a distance are zero, so that the state has nothing else."""
    T, rate = (
        450,
        1.6 if dtype == torch.float64 else 0.2,
    )  # weights of e^-624 to e^-690 and e^-78 to e^-86: normal
    x = make_inputs(B=2, T=T, H=1, K=20, V=33, dtype=dtype, rates=(rate,), state=True)
    far = torch.zeros(T, dtype=torch.bool)
    far[20:60] = True
    far = (far.flip(0) if reverse else far)[None, :, None, None]
    none = torch.zeros_like(x.initial_state)
    x = replace(x, k=x.k.where(far, 0.0), q=x.q.where(far, 0.0), initial_state=none, dstate=none)
    actual = state(x, variant, reverse)
    assert actual.abs().max() > 0
    check(actual, x, reverse)


@DIRECTIONS
@pytest.mark.parametrize("threads", [1, 2])
def test_tokens_without_weight_are_not_read(threads: int, reverse: bool) -> None:
    """Row 7: on "cpu" they may be anything, and the state before them too; whole blocks of them are left out."""
    if "cpu" not in BACKENDS:
        pytest.skip("the cpu backend was not built")
    torch.set_num_threads(threads)
    for dtype, reach in ((torch.float32, 104), (torch.float64, 746), (torch.bfloat16, 104)):
        T, rate = 3000, 0.5
        x = make_inputs(B=1, T=T, H=1, K=40, V=33, dtype=dtype, rates=(rate,))
        far = torch.arange(T) < T - int(reach / rate) - 64
        far = (far.flip(0) if reverse else far)[None, :, None, None]
        nan = torch.full_like(x.dstate, torch.nan)
        dirty = {name: getattr(x, name).masked_fill(far, torch.nan) for name in ("q", "k", "v", "do")}
        actual = state(replace(x, **dirty, initial_state=nan, dstate=nan), "cpu", reverse)
        assert_same_bits(actual, state(x, "cpu", reverse))


@DIRECTIONS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(backend: str, layout: str, reverse: bool) -> None:
    """Row 10: of the operands and of the state."""
    x = make_inputs(B=4, T=70, H=3, K=9, V=17)
    y = x.to(device_of(backend))
    k, v, initial = (y.q, y.do, y.dstate) if reverse else (y.k, y.v, y.initial_state)
    views = (LAYOUTS[layout](t) for t in (k, v))
    actual = ops.attention_state(*views, y.decay, y.scale, LAYOUTS[layout](initial), reverse, backend)
    assert actual.is_contiguous()
    check(actual.cpu(), x, reverse)


@DIRECTIONS
@pytest.mark.parametrize(("B", "T", "H"), [(0, 5, 2), (2, 5, 0), (0, 0, 2)])
def test_of_nothing(variant: str, B: int, T: int, H: int, reverse: bool) -> None:
    """Row 11: no sequences or no heads."""
    x = make_inputs(B=B, T=T, H=H)
    assert state(x, variant, reverse).shape == x.dstate.shape


@DIRECTIONS
def test_no_input_is_changed_or_aliased(variant: str, reverse: bool) -> None:
    """Row 9: also where the state passes through."""
    for T in (0, 70):
        x = make_inputs(B=1, T=T, H=2).to(device_of(variant))
        tensors = [x.q, x.do, x.decay, x.dstate]
        before = [t.clone() for t in tensors]
        y = ops.attention_state(x.q, x.do, x.decay, x.scale, x.dstate, reverse, variant)
        for t, kept in zip(tensors, before, strict=True):
            assert_same_bits(t, kept)
        y.fill_(torch.nan)
        assert_same_bits(x.dstate, before[-1])


def test_errors_name_the_public_function() -> None:
    """Row 13."""
    if "cpu" not in BACKENDS:
        pytest.skip("the cpu backend was not built")
    wide = make_inputs(B=1, T=2, H=1, K=257, V=4)
    with pytest.raises(
        ValueError, match="^lightning_attention: expected a backend that can run it, got 'cpu'"
    ):
        state(wide, "cpu", False)
    x = make_inputs(B=1, T=2, H=1)
    with pytest.raises(ValueError, match="^lightning_attention: .*decay"):
        state(replace(x, decay=-x.decay - 1), "cpu", False)


SEGMENTS = [
    (dtype, count, reverse)
    for dtype, count, reverse in itertools.product(
        dtypes_of("triton") if "triton" in BACKENDS else [], (1, 2, 5), (False, True)
    )
]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "triton"])
@pytest.mark.parametrize(("dtype", "count", "reverse"), SEGMENTS, ids=dtype_id)
def test_segments_of_triton(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype, count: int, reverse: bool
) -> None:
    """Rows 1 and 6: states that cross from one to the next, of lengths that are no multiple of a block too."""
    from triton_support import in_segments, of_length

    from lightning_attn.backends.triton import config

    x = make_inputs(B=2, T=300, H=2, K=20, V=33, dtype=dtype, rates=(0.01, 0.5))
    for cut in (in_segments(count), of_length(-(-300 // count))):
        monkeypatch.setattr(config, "segments", cut)
        with poisoned_memory():
            check(state(x, backend, reverse), x, reverse)


def test_auto_is_the_kernels() -> None:
    """The operator chooses as the public function does."""
    x = make_inputs(B=2, T=65, H=2, scale=1.0)
    _, other = lightning_attention(
        x.q, x.k, x.v, x.decay, scale=1.0, initial_state=x.initial_state, return_state=True
    )
    assert_close_to_truth(state(x, "auto", False), *expected(x, False))
    assert error(state(x, "auto", False), other) < 1e-6
