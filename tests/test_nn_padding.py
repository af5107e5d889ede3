"""Padding of LightningAttention: on either side and in between, it adds nothing and decays nothing."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nn_support import (
    DIM,
    HEADS,
    HIDDEN,
    differentiated,
    dtypes,
    here,
    layer,
    normal,
    on_cpu,
    ours,
    parameters_of,
    plain,
    recurrence,
    run_all,
    states,
)
from support import (
    assert_same_bits,
    device_of,
    dtype_id,
    poisoned_memory,
)
from torch import Tensor

MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]],
    "both": [[0, 0, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 0]],
    "holes": [[1, 0, 1, 0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 0, 1, 1, 0], [1, 1, 1, 1, 0, 1, 1, 1, 1]],
    "one token": [[0, 0, 0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1]],
    "no token": [[0, 0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 0]],
    "all": [[1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]],
}

masks = pytest.mark.parametrize("mask", [torch.tensor(m) for m in MASKS.values()], ids=list(MASKS))


@here
@dtypes
@masks
def test_padding(backend: str, dtype: torch.dtype, mask: Tensor) -> None:
    """Row 7: padding, wherever it is, adds nothing and decays nothing: outputs, states and gradients are
    those of the sequences without it; the outputs of padding are zero."""
    module = layer(dtype)

    def one_by_one(parameters: dict[str, Tensor], x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, last = torch.zeros_like(x), []
        for b, real in enumerate(mask != 0):
            row, end = plain(parameters, x[b, real][None], state[b : b + 1], module.decay)
            y = y.index_put((torch.tensor(b), real.nonzero().flatten()), row[0])
            last.append(end)
        return y, torch.cat(last)

    truth = partial(recurrence, rates=module.decay, mask=mask)
    call = ours(module, attention_mask=mask, backend=backend)
    for result in run_all(module, (3, 9), call, truth, one_by_one):
        assert not result["y"][mask == 0].any() and not result["d x"][mask == 0].any()


@on_cpu
@masks
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30, 0.0])
def test_junk_in_padding(backend: str, mask: Tensor, junk: float) -> None:
    """Row 7: what stands in padding changes no bit: not of real outputs, not of states, not of any gradient,
    even if the gradients of the padded outputs are junk as well."""
    module, real = layer(), mask[..., None] != 0
    first, dstate = states(3), states(3, seed=8)
    x, dy = normal(3, 9, HIDDEN), normal(3, 9, HIDDEN, seed=3)
    call = ours(module, attention_mask=mask, backend=backend)
    with poisoned_memory():
        expected, actual = (
            differentiated(call, parameters_of(module, torch.float32), x_, first, dy_, dstate)
            for x_, dy_ in ((x, dy.where(real, 0)), (x.where(real, junk), dy.where(real, 5.0)))
        )
    for name, value in actual.items():
        assert value.isfinite().all(), name
        assert_same_bits(value, expected[name], name)
    assert not actual["y"][mask == 0].any()


@here
def test_all_padding(backend: str) -> None:
    """Row 7: a sequence of padding only returns its state untouched, with no state zeros; its gradient passes
    through."""
    device = device_of(backend)
    module, mask = layer().to(device), torch.zeros(2, 6, device=device)
    x, first = torch.full((2, 6, HIDDEN), float("nan"), device=device), states(2).to(device).requires_grad_()
    y, last = module(x, state=first, return_state=True, attention_mask=mask, backend=backend)
    assert_same_bits(last, first, "state")
    assert_same_bits(y.detach(), torch.zeros(2, 6, HIDDEN), "y")
    (gradient,) = torch.autograd.grad(last, first, states(2, seed=8).to(device), retain_graph=True)
    assert_same_bits(gradient, states(2, seed=8), "gradient of the state")
    y.sum().backward()
    assert not any(p.grad.any() for p in module.parameters())
    y, last = module(x, return_state=True, attention_mask=mask, backend=backend)
    assert_same_bits(last.detach(), torch.zeros(2, HEADS, DIM, DIM), "state from nothing")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32], ids=dtype_id)
def test_mask_dtypes(dtype: torch.dtype) -> None:
    """Row 7: nonzero is a real token, in any dtype."""
    module, x, mask = layer(), normal(3, 9, HIDDEN), torch.tensor(MASKS["holes"])
    expected = module(x, attention_mask=mask)
    assert_same_bits(module(x, attention_mask=mask.to(dtype)), expected)
    assert_same_bits(module(x, attention_mask=3 * mask.to(dtype)), expected)


def test_mask_of_ones_is_no_mask() -> None:
    """Row 7: and the rule holds for both: their bits may differ, for masked sequences are packed."""
    module, x = layer(torch.float64), normal(3, 80, HIDDEN, dtype=torch.float64)
    for a, b in zip(
        module(x, return_state=True, attention_mask=torch.ones(3, 80)),
        module(x, return_state=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@given(
    st.lists(st.lists(st.booleans(), min_size=11, max_size=11), min_size=1, max_size=4), st.integers(0, 11)
)
def test_any_mask_split_anywhere(mask: list[list[bool]], cut: int) -> None:
    """Rows 7, 18: any padding, cut anywhere: in float64 the two calls are one, and both are the
    recurrence."""
    module, real = layer(torch.float64), torch.tensor(mask)
    x, first = normal(len(mask), 11, HIDDEN, dtype=torch.float64), states(len(mask), torch.float64)
    with torch.no_grad():
        whole = module(x, state=first, return_state=True, attention_mask=real)
        y1, middle = module(x[:, :cut], state=first, return_state=True, attention_mask=real[:, :cut])
        y2, last = module(x[:, cut:], state=middle, return_state=True, attention_mask=real[:, cut:])
        expected = recurrence(dict(module.named_parameters()), x, first, module.decay, real)
    for actual in (whole, (torch.cat([y1, y2], 1), last)):
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
