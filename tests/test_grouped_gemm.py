"""grouped_gemm and its gradients in float64's company."""

import pytest
import torch
from moe_support import check_gemm, make_groups, run_gemm
from support import (
    DTYPES,
    affordable,
    assert_same_bits,
    device_of,
    dtype_id,
    poisoned_memory,
)

from lightning_attn import grouped_gemm

pytestmark = pytest.mark.op("grouped_gemm_forward")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
# Whole tiles and tails, and every number of rows that a tail's tile begins or ends with.
COUNTS = {
    "even": (40, 40, 40),
    "empty": (0, 30, 0, 0, 65, 0),
    "one": (1,),
    "few": (1, 0, 2, 3, 4, 5),
    "tails": (15, 16, 17, 31, 32, 33, 63, 64, 65),
    "whole": (127, 128, 129),
    "one group": (0, 300, 0),
    "nothing": (0, 0),
}


@dtypes
@pytest.mark.parametrize("counts", COUNTS)
def test_obeys_the_rule(variant, dtype, counts):
    """Rows 1, 6, 11, 28: y and the gradients of x and w, with rows after the last group, which are zero, as is the gradient
    of the matrix of an empty group.
    """
    a = make_groups(COUNTS[counts], N=70, K=48, dtype=dtype, rest=5)
    with poisoned_memory():
        actual = run_gemm(a, variant)
    check_gemm(actual, a)
    assert not actual["y"][-5:].any() and not actual["dx"][-5:].any()
    empty = [e for e, n in enumerate(COUNTS[counts]) if n == 0]
    assert not actual["dw"][empty].any()


@dtypes
@pytest.mark.parametrize("N, K", [(1, 1), (3, 7), (17, 33), (130, 129), (256, 64)], ids=str)
def test_odd_sizes_obey_the_rule(backend, dtype, N, K):
    """Row 12."""
    a = make_groups((9, 70, 0, 2), N=N, K=K, dtype=dtype)
    check_gemm(run_gemm(a, backend), a)


@dtypes
@pytest.mark.parametrize("K", [64, 33], ids=["aligned", "unaligned"])
def test_gradients_written_past_the_caches(variant, dtype, K, monkeypatch):
    """Of matrices with few rows, or none: on a CPU those of large gradients."""
    if variant == "cpu":
        monkeypatch.setattr("lightning_attn.backends.cpu.moe_steps.LARGE", 0)
    a = make_groups((4, 0, 1, 2, 3), N=70, K=K, dtype=dtype)
    with poisoned_memory():
        actual = run_gemm(a, variant)
    check_gemm(actual, a)
    assert not actual["dw"][1].any()


def test_many_groups(backend):
    """512 of them, of which some are empty."""
    counts = tuple(n % 3 * (n < affordable(backend, 512, 9) or n > 508) for n in range(512))
    a = make_groups(counts, N=16, K=16)
    check_gemm(run_gemm(a, backend), a)


def test_nothing_to_sum_is_zero(backend):
    """K = 0, and no rows at all."""
    device = device_of(backend)
    offs = torch.tensor([2, 3], dtype=torch.int32, device=device)
    with poisoned_memory():
        y = grouped_gemm(
            torch.ones(4, 0, device=device), torch.ones(2, 5, 0, device=device), offs, backend=backend
        )
    assert y.shape == (4, 5) and not y.any()
    y = grouped_gemm(
        torch.ones(0, 3, device=device), torch.ones(2, 5, 3, device=device), 0 * offs, backend=backend
    )
    assert y.shape == (0, 5)


def layouts_of(a):
    """x and w with other strides: w stored transposed, sliced, one matrix for all groups."""
    wide = a.x.new_full((len(a.x), a.x.shape[1] + 3), float("nan"))
    yield wide[:, 1:-2].copy_(a.x), a.w
    yield a.x, a.w.mT.contiguous().mT
    stored = a.w.new_full((2 * len(a.w), a.w.shape[1] + 1, a.w.shape[2] + 1), float("nan"))
    yield a.x, stored[::2, 1:, :-1].copy_(a.w)
    yield a.x.T.contiguous().T, a.w.permute(2, 0, 1).contiguous().permute(1, 2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
def test_strides_do_not_matter(backend, dtype):
    """Row 10: forward and gradients, with a gradient that is one row expanded."""
    a = make_groups((30, 0, 45, 7), N=40, K=24, dtype=dtype, rest=2).to(device_of(backend))
    dy = a.dy[:1].expand_as(a.dy)

    def results(x, w):
        leaves = [t.detach().requires_grad_() for t in (x, w)]
        y = grouped_gemm(*leaves, a.offs, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    expected = results(a.x, a.w)
    for x, w in layouts_of(a):
        for y, z in zip(results(x, w), expected, strict=True):
            torch.testing.assert_close(y, z)


def test_one_matrix_for_all_groups(backend):
    """Row 10: stride 0 between the matrices."""
    a = make_groups((30, 45), N=40, K=24).to(device_of(backend))
    w = a.w[:1].expand(2, -1, -1)
    y = grouped_gemm(a.x, w, a.offs, backend=backend)
    torch.testing.assert_close(y, a.x @ a.w[0].T)


def test_nan_in_dead_rows_and_idle_matrices(backend):
    """Row 7: no bit of the result or of a gradient changes."""
    a = make_groups((30, 0, 45), N=40, K=24, rest=6).to(device_of(backend))

    def results(x, w, dy):
        leaves = [t.detach().requires_grad_() for t in (x, w)]
        y = grouped_gemm(*leaves, a.offs, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    expected = results(a.x, a.w, a.dy)
    x, w, dy = a.x.clone(), a.w.clone(), a.dy.clone()
    x[-6:], dy[-6:], w[1] = float("nan"), float("inf"), float("nan")
    for y, z in zip(results(x, w, dy), expected, strict=True):
        assert_same_bits(y, z)


def test_neighbouring_groups_do_not_mix(backend):
    """Row 7: NaN in one group's rows stays in its rows, and in the gradient of its matrix."""
    a = make_groups((30, 40, 45), N=40, K=24).to(device_of(backend))
    x = a.x.clone()
    x[30:70] = float("nan")
    leaves = [x.requires_grad_(), a.w.detach().requires_grad_()]
    y = grouped_gemm(*leaves, a.offs, backend=backend)
    _, dw = torch.autograd.grad(y, leaves, a.dy)
    assert y[30:70].isnan().all() and not y[:30].isnan().any() and not y[70:].isnan().any()
    assert dw[1].isnan().all() and not dw[[0, 2]].isnan().any()


@dtypes
def test_two_runs_give_the_same_bits(variant, dtype):
    """Row 21."""
    torch.set_num_threads(3)
    a = make_groups(affordable(variant, (300, 0, 700), (70, 0, 65)), N=64, K=64, dtype=dtype)
    first = run_gemm(a, variant)
    for _ in range(3):
        for name, y in run_gemm(a, variant).items():
            assert_same_bits(y, first[name], name)


def test_a_second_derivative_raises(backend):
    """Row 3."""
    a = make_groups((3, 4), N=5, K=6).to(device_of(backend))
    x = a.x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(grouped_gemm(x, a.w, a.offs, backend=backend).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("need", ["x", "w"])
def test_one_gradient_alone(backend, need):
    """Row 19."""
    a = make_groups((3, 40), N=5, K=6).to(device_of(backend))
    expected = run_gemm(a, backend)
    leaf = getattr(a, need).detach().requires_grad_()
    arguments = {"x": a.x, "w": a.w} | {need: leaf}
    y = grouped_gemm(*arguments.values(), a.offs, backend=backend)
    for _ in range(2):
        (g,) = torch.autograd.grad(y, leaf, a.dy, retain_graph=True)
        assert_same_bits(g.cpu(), expected["d" + need])
