"""Tensors of more than 2^31 elements, and grids of more programs than a dimension of a grid may have (rows 14 and 15),
really allocated and really run where there is a GPU.
"""

from collections.abc import Callable

import pytest
import torch
from gpu_support import DEVICE, GPU, differ, draw, kernels, size, wait_for_room
from support import (
    BACKENDS,
    HALF,
    assert_close_to_truth,
    assert_same_bits,
    check,
    check_norm,
    dtypes_of,
    make_inputs,
    make_norm_inputs,
    run,
)
from torch import Tensor

from lightning_attn import decay, gated_rms_norm, lightning_attention, lightning_attention_decode
from lightning_attn.backends import reference

pytestmark = pytest.mark.gpu

MANY = 2**31
HALF_DTYPE = next((dtype for dtype in HALF if dtype in dtypes_of("triton")), None)  # bfloat16, if it can
D = size(128, 16)
GRID = size(65_535, 7)  # without a GPU grids are folded that early


@pytest.fixture(autouse=True)
def small_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU and "triton" in BACKENDS:
        from lightning_attn.backends.triton import launch

        monkeypatch.setattr(launch, "GRID_LIMIT", GRID)


def enough(per_row: int) -> int:
    """Rows of so many elements for more than 2^31 of them, and few without a GPU."""
    return size(MANY // per_row + 9, 9)


def some(rows: int) -> Tensor:
    """The first rows, the last ones, and those around which an offset of 32 bits, signed or not, or half of it ends."""
    near = [0, 1, rows // 4, rows // 2 - 1, rows // 2, rows - 9, rows - 2, rows - 1]
    return torch.tensor(sorted(set(near)), device=DEVICE)


# ---- row 14 ---------------------------------------------------------------------------------------------------


@kernels
def test_operands_of_more_elements(backend: str, uncut: None) -> None:
    """Row 14: a large batch; rows of it, wherever they lie, give what they give alone, to the last bit."""
    T, H = size(64, 3), 2
    B = enough(T * H * D)
    wait_for_room(40)
    q, k, v, do = (draw(B, T, H, D, dtype=HALF_DTYPE, seed=n) for n in range(4))
    assert q.numel() > (MANY if GPU else 0)
    rates = decay.alibi(H).to(DEVICE)

    def attend(*tensors: Tensor) -> list[Tensor]:
        leaves, do = [t.requires_grad_() for t in tensors[:3]], tensors[3]
        o = lightning_attention(*leaves, rates, scale=D**-0.5, backend=backend)
        return [o.detach(), *torch.autograd.grad(o, leaves, do)]

    rows = some(B)
    alone = attend(*(t[rows] for t in (q, k, v, do)))
    for name, whole, few in zip(("o", "dq", "dk", "dv"), attend(q, k, v, do), alone, strict=True):
        assert_same_bits(whole[rows], few, name)


@kernels
def test_states_of_more_elements(backend: str, uncut: None) -> None:
    """Row 14: initial and final states and their gradients."""
    T, H = 2, 2
    B = enough(H * D * D)
    wait_for_room(40)
    q, k, v, do = (draw(B, T, H, D, dtype=HALF_DTYPE, seed=n) for n in range(4))
    initial, dstate = (draw(B, H, D, D, dtype=torch.float32, seed=n) for n in (4, 5))
    assert initial.numel() > (MANY if GPU else 0)
    rates = decay.alibi(H).to(DEVICE)

    def attend(q: Tensor, k: Tensor, v: Tensor, initial: Tensor, do: Tensor, dstate: Tensor) -> list[Tensor]:
        leaves = [t.requires_grad_() for t in (q, k, v, initial)]
        o, state = lightning_attention(
            *leaves[:3], rates, initial_state=initial, return_state=True, backend=backend
        )
        return [o.detach(), state.detach(), *torch.autograd.grad((o, state), leaves, (do, dstate))]

    rows = some(B)
    alone = attend(*(t[rows] for t in (q, k, v, initial, do, dstate)))
    results = attend(q, k, v, initial, do, dstate)
    names = ("o", "state", "dq", "dk", "dv", "dinitial_state")
    for name, whole, few in zip(names, results, alone, strict=True):
        assert_same_bits(whole[rows], few, name)


@kernels
@pytest.mark.op("attention_decode")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_cache_of_more_elements(backend: str, dtype: torch.dtype) -> None:
    """Row 14: slots anywhere in it; no other state changes."""
    H = 2
    S = enough(H * D * D)
    wait_for_room(12)
    cache = draw(S, H, D, D, dtype=dtype)
    assert cache.numel() > (MANY if GPU else 0)
    slots = some(S).flip(0)
    B = len(slots)
    q, k, v = (draw(B, 1, H, D, dtype=torch.float16, seed=n) for n in range(1, 4))
    rates, dense = decay.alibi(H).to(DEVICE), cache[slots]
    untouched = torch.ones(S, dtype=torch.bool, device=DEVICE)
    untouched[slots] = False
    before = cache.sum((1, 2, 3))
    o = lightning_attention_decode(q, k, v, rates, cache, slots=slots, backend=backend)
    assert_same_bits(o, lightning_attention_decode(q, k, v, rates, dense, backend=backend), "o")
    assert_same_bits(cache[slots], dense, "states")
    assert torch.equal(cache.sum((1, 2, 3))[untouched], before[untouched])


@kernels
def test_a_norm_of_more_elements(backend: str) -> None:
    """Row 14: rows give what they give alone. Only these have a gradient, so that of the weight is theirs."""
    rows = enough(D)
    wait_for_room(32)
    x, gate = (draw(rows, D, dtype=HALF_DTYPE, seed=n) for n in range(2))
    weight = 1 + draw(D, dtype=HALF_DTYPE, seed=2)
    assert x.numel() > (MANY if GPU else 0)
    index = some(rows)
    dy = torch.zeros_like(x)
    dy[index] = draw(len(index), D, dtype=HALF_DTYPE, seed=3)

    def norm(*tensors: Tensor) -> list[Tensor]:
        leaves, dy = [t.detach().requires_grad_() for t in tensors[:3]], tensors[3]
        y = gated_rms_norm(*leaves, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    y, dx, dgate, dweight = norm(x, gate, weight, dy)
    few = [x[index], gate[index], weight, dy[index]]
    for name, whole, alone in zip(("y", "dx", "dgate"), (y, dx, dgate), norm(*few), strict=False):
        assert_same_bits(whole[index], alone, name)
    assert int(dx.count_nonzero(1).bool().sum()) == len(index)
    result = {"y": y[index], "dx": dx[index], "dgate": dgate[index], "dweight": dweight}
    check_norm({name: t.cpu() for name, t in result.items()}, [t.detach().cpu() for t in few], 1e-6)


# ---- row 15 ---------------------------------------------------------------------------------------------------


@kernels
def test_more_heads_than_a_grid_has_programs_along_a_dimension(backend: str) -> None:
    """Row 15: every output and gradient of every head obeys the rule."""
    H = 3
    x = make_inputs(B=GRID // H + 2, T=3, H=H, K=16, V=16, dtype=torch.float16)
    assert x.q.shape[0] * H > GRID
    check(run(x, backend), x)


def halves(call: Callable[..., list[Tensor]], *tensors: Tensor) -> list[Tensor]:
    """What a call gives for each half of the rows."""
    parts = [call(*(t.detach().chunk(2)[n] for t in tensors)) for n in range(2)]
    return [torch.cat(pair) for pair in zip(*parts, strict=True)]


@kernels
def test_more_segments_than_a_grid_has_programs_along_a_dimension(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 15: the first pass and the scan too; to the bits of two calls that have half as many each."""
    from triton_support import of_length

    from lightning_attn.backends.triton import config

    monkeypatch.setattr(config, "segments", of_length(20))
    B, T, H = GRID + 1, 30, 1
    q, k, v, do = (draw(B, T, H, 16, dtype=torch.float16, seed=n) for n in range(4))
    rates = torch.tensor([0.1], device=DEVICE)

    def attend(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
        leaves = [t.requires_grad_() for t in (q, k, v)]
        o, state = lightning_attention(*leaves, rates, return_state=True, backend=backend)
        return [o.detach(), state.detach(), *torch.autograd.grad(o, leaves, do)]

    for a, b in zip(attend(q, k, v, do), halves(attend, q, k, v, do), strict=True):
        assert not differ(a, b)


@kernels
@pytest.mark.op("attention_decode")
def test_a_larger_batch_than_a_grid_has_programs_along_a_dimension(backend: str) -> None:
    """Row 15: every output and every state obeys the rule."""
    x = make_inputs(B=GRID + 1, T=1, H=1, K=16, V=16, dtype=torch.float16)
    y, exact = x.to(DEVICE), x.double()
    state = y.initial_state.clone()
    o = lightning_attention_decode(y.q, y.k, y.v, y.decay, state, scale=y.scale, backend=backend)
    options = {"scale": x.scale}
    expected = reference.recurrence(
        exact.q, exact.k, exact.v, exact.decay, initial_state=exact.initial_state, **options
    )
    plain = reference.block_form(x.q, x.k, x.v, x.decay, initial_state=x.initial_state, **options)
    for name, a, e, p in zip(("o", "state"), (o, state), expected, plain, strict=True):
        assert_close_to_truth(a.cpu(), e, p, name=name)


@kernels
def test_more_rows_than_a_grid_has_programs_along_a_dimension(backend: str) -> None:
    """Row 15: a program holds a row of the norm; to the bits of two calls that have half as many each."""
    x, gate, weight, dy = (t.to(DEVICE) for t in make_norm_inputs((2, 1025), torch.float16))
    x, gate, dy = (t.repeat(GRID // 2 + 1, 1) for t in (x, gate, dy))
    x += torch.arange(len(x), device=DEVICE)[:, None] % 97 / 97

    def norm(x: Tensor, gate: Tensor, dy: Tensor) -> list[Tensor]:
        leaves = [t.requires_grad_() for t in (x, gate)]
        y = gated_rms_norm(*leaves, weight, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    for a, b in zip(norm(x, gate, dy), halves(norm, x, gate, dy), strict=True):
        assert not differ(a, b)
