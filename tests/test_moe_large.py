"""Row 14: rows, outputs and weights of more than 2^31 elements, on the CPU, and on a GPU where there is one."""

import pytest
import torch
from gpu_support import DEVICE, GPU, draw, kernels, size, wait_for_room
from support import HALF, dtypes_of

from lightning_attn import grouped_gemm, moe_mlp
from lightning_attn.backends import load

HALF_DTYPE = next((dtype for dtype in HALF if dtype in dtypes_of("triton")), None)  # bfloat16, if it can

ROWS, COLUMNS = 46_400, 46_400  # 2.15e9 elements, of which only some are looked at


def assert_near(actual, expected):
    """Within the two roundings that separate products which are summed in another order."""
    difference = (actual.float() - expected).abs().max()
    assert difference <= 2 * torch.finfo(actual.dtype).eps * expected.abs().max()


@pytest.fixture
def offs():
    return torch.tensor([ROWS // 2, ROWS - 3], dtype=torch.int32)


def test_an_output_of_more_elements(offs):
    """Rows of both groups, and the zero rows after them, wherever they lie."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 8, generator=random, dtype=torch.bfloat16)
    w = torch.randn(2, COLUMNS, 8, generator=random, dtype=torch.bfloat16)
    y = grouped_gemm(x, w, offs, backend="cpu")
    for row in (0, ROWS // 2 - 1, ROWS // 2, ROWS - 4):
        assert_near(y[row], w[int(row >= ROWS // 2)].float() @ x[row].float())
    assert not y[-3:].any()


def test_weights_of_more_elements():
    """The last expert lies beyond 2^31: few rows and many."""
    E, D, F = 66, 4096, 4096
    base = torch.zeros(1, dtype=torch.int8)
    gate_up = (
        base.expand(2 * E * F * D).view(E, 2 * F, D)
        if base.numel() > 1
        else torch.zeros(E, 2 * F, D, dtype=torch.int8)
    )
    down = torch.zeros(E, D, F, dtype=torch.int8)
    gate_up[-1, :, :3], down[-1, :, :5] = 1, 2
    scales = torch.ones(E, 2 * F), torch.ones(E, D)
    for T in (2, 40):
        x = torch.ones(T, D)
        experts = torch.full((T, 1), E - 1, dtype=torch.int32)
        y = moe_mlp(x, (gate_up, scales[0]), (down, scales[1]), torch.ones(T, 1), experts, backend="cpu")
        act = torch.nn.functional.silu(torch.tensor(3.0)) * 3
        torch.testing.assert_close(y, torch.full((T, D), 5 * 2 * act.item()))


def test_routing_more_logits():
    """Rows beyond 2^31 logits, of strided ones that take little memory."""
    T, E = 5_000_000, 512
    logits = torch.zeros(E + T).as_strided((T, E), (1, 1))
    logits[-1, -1] = 1.0
    weights, experts = load("cpu").moe_route_forward(logits, 2, True)
    assert experts[-1].tolist() == [E - 1, 0] and experts[0].tolist() == [0, 1]
    assert weights[-1, 0] > weights[-1, 1]


@kernels
@pytest.mark.op("grouped_gemm_forward")
@pytest.mark.parametrize("N, K", [(size(40_000, 24), 64), (64, size(40_000, 40))], ids=["output", "input"])
def test_on_a_gpu(backend: str, N: int, K: int) -> None:
    """Rows of a large product and of the gradient of x are those of the product of the rows alone, near the ends too; so is the
    gradient of the weight of a group at the far end.
    """
    M = size(60_000, 90)
    wait_for_room(30)
    x, w, dy = (draw(*shape, dtype=HALF_DTYPE) for shape in ((M, K), (2, N, K), (M, N)))
    assert max(x.numel(), dy.numel()) > (2**31 if GPU else 0)
    offs = torch.tensor([M // 2, M - 3], dtype=torch.int32, device=DEVICE)

    def results(x, dy, offs):
        leaves = [t.detach().requires_grad_() for t in (x, w)]
        y = grouped_gemm(*leaves, offs, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    far = torch.arange(M - 20, M - 3, device=DEVICE)
    y, dx, dw = results(x, dy, offs)
    alone = results(x[far], dy[far], torch.tensor([0, 17], dtype=torch.int32, device=DEVICE))
    assert_near(y[far], alone[0].float())
    assert_near(dx[far], alone[1].float())
    assert not y[-3:].any() and not dx[-3:].any()
    rows = slice(M // 2, M - 3)
    expected = dy[rows].mT.float()[:8] @ x[rows].float()
    assert_near(dw[1, :8], expected)
