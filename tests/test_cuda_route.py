"""Routing and sorting by csrc/cuda: against the definition, and at every edge that the kernels have of their own."""

import functools
from collections.abc import Iterator

import pytest
import torch
from support import BACKENDS, assert_close_to_truth, assert_same_bits, device_of, dtype_id, poisoned_memory
from torch import Tensor

from lightning_attn.backends import cuda, reference
from lightning_attn.backends.cuda import route

pytestmark = pytest.mark.skipif("cuda" not in BACKENDS, reason="neither a GPU nor the emulator is there")
emulated = pytest.mark.skipif(not cuda.EMULATED, reason="the device has its own limits")

DEVICE = device_of("cuda")
EXPERTS = (1, 2, 3, 16, 31, 32, 33, 100, 512)
SIZES = [(E, k) for E in EXPERTS for k in sorted({1, min(2, E), E})]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POISON = torch.iinfo(torch.int32).max  # of integers in `poisoned_memory`
both = pytest.mark.parametrize("renormalize", [True, False], ids=["renormalized", "of_all"])


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """What a kernel does not write is NaN, or no place."""
    with poisoned_memory():
        yield


@functools.cache
def make_logits(T: int, E: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal, of which a quarter are rounded to halves: rows have ties. Never written to."""
    random = torch.Generator().manual_seed(T + 1000 * E)
    x = torch.randn(T, E, generator=random) * 3
    return torch.where(torch.rand(T, E, generator=random) < 0.25, (2 * x).round() / 2, x).to(dtype)


def by_stable_sort(logits: Tensor, k: int) -> Tensor:
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k].int()


def plain_weights(logits: Tensor, experts: Tensor, renormalize: bool) -> Tensor:
    chosen = logits.softmax(-1).gather(1, experts.long())
    return chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen


def routed(logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """By the kernel, and checked against float64."""
    weights, experts = (x.cpu() for x in cuda.moe_route_forward(logits.to(DEVICE), k, renormalize))
    assert experts.is_contiguous() and weights.is_contiguous()
    assert experts.dtype == torch.int32 and torch.equal(experts, by_stable_sort(logits, k))
    exact = reference.moe_route_forward(logits.double(), k, renormalize)[0]
    plain = plain_weights(logits.float(), experts, renormalize)
    assert_close_to_truth(weights, exact, plain, name="weights")
    return weights, experts


# ---- forward ----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("E", "k"), SIZES)
def test_weights_and_experts(E: int, k: int, renormalize: bool) -> None:
    """More tokens than a block has warps, unless that takes long."""
    routed(make_logits(3 if k > 100 else 37, E), k, renormalize)


@both
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize("E", [3, 32, 33, 128, 200, 512])
def test_halves(E: int, dtype: torch.dtype, renormalize: bool) -> None:
    """Values are rounded before they are ranked, and only then."""
    routed(make_logits(21, E, dtype), min(8, E), renormalize)


@pytest.mark.parametrize("T", [0, 1, 7, 8, 9, 1000])
def test_tokens(T: int) -> None:
    weights, experts = routed(make_logits(T, 32), 2, True)
    assert weights.shape == experts.shape == (T, 2)


@emulated
def test_more_tokens_than_a_grid_has_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 15: blocks take the rest in turn."""
    monkeypatch.setattr(route, "GRID_LIMIT", 2)
    logits = make_logits(75, 40)
    weights, experts = routed(logits, 3, False)
    dweights = make_logits(75, 3)
    dlogits = cuda.moe_route_backward(dweights, logits, weights, experts, False)
    check_backward(dlogits, dweights, logits, experts, False)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rows_apart_and_rows_one_over_the_other(dtype: torch.dtype, renormalize: bool) -> None:
    """Any stride of rows: a slice, one that lies at an odd address, and 0."""
    logits = make_logits(20, 70, dtype)
    wide = torch.full((20, 99), torch.nan, dtype=dtype, device=DEVICE)
    wide[:, 5:75] = logits.to(DEVICE)
    expected = cuda.moe_route_forward(logits.to(DEVICE), 4, renormalize)
    for a, b in zip(cuda.moe_route_forward(wide[:, 5:75], 4, renormalize), expected, strict=True):
        assert_same_bits(a, b)
    same = logits[:1].to(DEVICE).expand(20, 70)
    for a, b in zip(cuda.moe_route_forward(same, 4, renormalize), expected, strict=True):
        assert_same_bits(a, b[:1].expand(20, 4).contiguous())


@both
@pytest.mark.parametrize("E", [1, 31, 32, 33, 100, 512])
def test_equal_logits_go_to_the_lowest_experts(E: int, renormalize: bool) -> None:
    """And -0 is 0; two that differ by less than a normal number do differ."""
    k = min(E, 40)
    expected = torch.arange(k, dtype=torch.int32).expand(5, k)
    zeros = torch.zeros(5, E)
    zeros[:, ::2] = -0.0
    for logits in (torch.full((5, E), 1.5), zeros):
        assert torch.equal(routed(logits, k, renormalize)[1], expected)
    tiny = torch.zeros(5, E)
    tiny[:, -1] = 1e-45
    assert (routed(tiny, 1, renormalize)[1] == E - 1).all()


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("E", [1, 3, 33, 512])
def test_what_is_not_finite(E: int, dtype: torch.dtype, renormalize: bool) -> None:
    """-inf is a logit as any other; wherever a NaN or inf stands, the experts are distinct ones that there are."""
    k = min(E, 35)
    closed = make_logits(9, E, dtype).clone()
    closed[:, ::3] = -torch.inf
    if E > 1:
        routed(closed, k, renormalize)
    bad = torch.stack(
        [torch.full((E,), x, dtype=dtype) for x in (torch.nan, torch.inf, -torch.inf)]
        + [
            torch.where(torch.arange(E) % n == 0, x, closed[0])
            for n in (2, 3)
            for x in (torch.nan, torch.inf)
        ]
    )
    bad[0, E // 2 :] = -torch.nan
    weights, experts = (x.cpu() for x in cuda.moe_route_forward(bad.to(DEVICE), k, renormalize))
    assert weights.isnan().all()  # as those of a softmax
    for row in experts.tolist():
        assert len(set(row)) == k and all(0 <= e < E for e in row)
    finite = make_logits(4, E, dtype).clone()
    finite[1, E // 2] = torch.nan
    weights, experts = (x.cpu() for x in cuda.moe_route_forward(finite.to(DEVICE), k, renormalize))
    assert weights.isnan().any(-1).tolist() == [False, True, False, False]
    assert k == E or not (experts[1] == E // 2).any()  # ranked last
    kept = torch.tensor([0, 2, 3])
    assert torch.equal(experts[kept], by_stable_sort(finite[kept], k))


# ---- backward ---------------------------------------------------------------------------------------------------


def check_backward(
    dlogits: Tensor, dweights: Tensor, logits: Tensor, experts: Tensor, renormalize: bool
) -> None:
    """Against float64, beside autograd through plain PyTorch."""
    exact = reference.moe_route_forward(logits.double(), experts.shape[1], renormalize)[0]
    truth = reference.moe_route_backward(dweights.double(), logits.double(), exact, experts, renormalize)
    x = logits.float().requires_grad_()
    (gradient,) = torch.autograd.grad(plain_weights(x, experts, renormalize), x, dweights)
    assert dlogits.is_contiguous()
    assert_close_to_truth(dlogits, truth, gradient.to(logits.dtype), name="dlogits")


def backward(logits: Tensor, k: int, renormalize: bool) -> None:
    on_device = logits.to(DEVICE)
    weights, experts = cuda.moe_route_forward(on_device, k, renormalize)
    dweights = torch.randn(len(logits), k, generator=torch.Generator().manual_seed(1))
    wide = torch.full((len(logits), k + 3), torch.nan, device=DEVICE)
    wide[:, 1 : 1 + k] = dweights.to(DEVICE)
    dlogits = cuda.moe_route_backward(wide[:, 1 : 1 + k], on_device, weights, experts, renormalize)
    check_backward(dlogits.cpu(), dweights, logits, experts.cpu(), renormalize)


@both
@pytest.mark.parametrize(("E", "k"), [*SIZES, (100, 40), (512, 64)])
def test_gradients(E: int, k: int, renormalize: bool) -> None:
    backward(make_logits(3 if k > 100 else 37, E), k, renormalize)


@both
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=dtype_id)
@pytest.mark.parametrize("E", [3, 32, 33, 128, 200, 512])
def test_gradients_of_halves(E: int, dtype: torch.dtype, renormalize: bool) -> None:
    backward(make_logits(21, E, dtype), min(8, E), renormalize)


@both
def test_gradients_of_strided_and_closed_rows(renormalize: bool) -> None:
    """A slice of logits, and experts that can never be chosen."""
    logits = make_logits(20, 70).clone()
    logits[:, 3:50] = -torch.inf
    backward(logits, 5, renormalize)
    wide = torch.full((20, 99), torch.nan)
    wide[:, 5:75] = make_logits(20, 70)
    backward(wide[:, 5:75], 5, renormalize)


@both
def test_experts_that_are_not_there_have_no_gradient(renormalize: bool) -> None:
    """Garbage leads out of no tensor."""
    logits = make_logits(11, 33)
    weights, experts = reference.moe_route_forward(logits, 3, renormalize)
    dweights = torch.ones(11, 3)
    wrong = experts.clone()
    wrong[:, 1] = torch.tensor([-1, 33, 64, 2**31 - 1, -(2**31), 1000, 63, 34, -33, -32, 40])
    outputs = [
        cuda.moe_route_backward(*(x.to(DEVICE) for x in (dweights, logits, weights, e)), renormalize).cpu()
        for e in (experts, wrong)
    ]
    others = torch.ones(11, 33, dtype=torch.bool).scatter_(1, experts[:, 1:2].long(), False)
    assert_same_bits(outputs[0][others], outputs[1][others])


# ---- sort ---------------------------------------------------------------------------------------------------------


def check_sort(experts: Tensor, E: int) -> None:
    order, position, offs = (x.cpu() for x in cuda.moe_sort(experts.to(DEVICE), E))
    wanted = reference.moe_sort(experts, E)
    assert [x.shape for x in (order, position, offs)] == [x.shape for x in wanted]
    assert order.dtype == position.dtype == offs.dtype == torch.int32
    assert torch.equal(offs, wanted[2]) and torch.equal(position, wanted[1])
    assert torch.equal(order[: offs[-1]], wanted[0][: offs[-1]])
    assert (order[offs[-1] :] == POISON).all()  # nobody's pairs stand nowhere


def drawn(T: int, k: int, low: int, high: int) -> Tensor:
    random = torch.Generator().manual_seed(T * k + high)
    return torch.randint(low, high, (T, k), generator=random, dtype=torch.int32)


@pytest.mark.parametrize("E", EXPERTS)
@pytest.mark.parametrize(
    ("T", "k"), [(0, 2), (1, 1), (1, 2), (5, 3), (32, 2), (511, 3), (4096, 1), (4097, 1), (1400, 6)]
)
def test_sorts(T: int, k: int, E: int) -> None:
    """In one block, and in more; two in a row are equal."""
    check_sort(drawn(T, k, 0, E), E)


@pytest.mark.parametrize("T", [1, 33, 3000, 9001])
def test_garbage_stands_nowhere(T: int) -> None:
    experts = drawn(T, 1, -3, 43)
    experts[T // 2 :: 7] = torch.iinfo(torch.int32).min
    experts[T // 3 :: 11] = torch.iinfo(torch.int32).max
    check_sort(experts, 40)
    check_sort(torch.full((T, 1), -1, dtype=torch.int32), 40)
    check_sort(torch.full((T, 1), 40, dtype=torch.int32), 40)


@pytest.mark.parametrize("T", [7, 4096, 12289])
@pytest.mark.parametrize("expert", [0, 31, 99])
def test_all_on_one_expert(expert: int, T: int) -> None:
    check_sort(torch.full((T, 1), expert, dtype=torch.int32), 100)


@pytest.mark.parametrize("T", [900, 5000])
def test_experts_without_pairs(T: int) -> None:
    """The first, the last and most of those between."""
    few = torch.tensor([3, 64, 65, 300, 301, 510], dtype=torch.int32)
    check_sort(few[drawn(T, 2, 0, len(few)).long()], 512)


def test_more_chunks_than_a_block_has_threads() -> None:
    """The sum over chunks goes on where it was, for the one that is left."""
    check_sort(drawn(route.CHUNK * 256 + 17, 1, -1, 3), 3)


def test_what_is_routed_is_sorted() -> None:
    """In the layouts that the one leaves and the other takes."""
    _, experts = cuda.moe_route_forward(make_logits(1000, 32).to(DEVICE), 2, True)
    check_sort(experts.cpu(), 32)
    order, position, _ = cuda.moe_sort(experts, 32)
    pairs = torch.arange(2000, dtype=torch.int32, device=DEVICE)
    assert torch.equal(order[position.view(-1).long()], pairs)
    assert experts.view(-1)[order.long()].diff().ge(0).all()
