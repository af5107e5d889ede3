"""Row 14 without a GPU: outputs and weights of more than 2^31 elements, on the CPU backend."""

import pytest
import torch

from lightning_attn import grouped_gemm, moe_mlp
from lightning_attn.backends import load

ROWS, COLUMNS = 46_400, 46_400  # 2.15e9 elements, of which only some are looked at


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
        torch.testing.assert_close(y[row], w[int(row >= ROWS // 2)] @ x[row], rtol=0.02, atol=0.02)
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
