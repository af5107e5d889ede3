"""Row 5: the mixture of experts under torch.compile(fullgraph=True), equal to eager bit by bit, for any number of tokens."""

import pytest
import torch
from moe_support import make_experts, make_groups
from support import assert_same_bits
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_attn import (
    SparseMoE,
    grouped_gemm,
    load_balancing_loss,
    moe_mlp,
    moe_route,
    quantize_experts,
    router_z_loss,
)

pytestmark = pytest.mark.usefixtures("no_compiled_code")

TOKENS = (64, 65, 100, 3)  # the first call compiles, the second finds that T changes, the rest reuse its code


def compiled(function):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


def assert_all_same(actual, expected):
    for n, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a, b, f"output {n}")


def block(x, gate_up, down, logits):
    weights, experts = moe_route(logits, 2)
    y = moe_mlp(x, gate_up, down, weights, experts, layout="interleaved")
    return y, load_balancing_loss(logits, experts) + router_z_loss(logits)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_block(training):
    """Forward, and with the gradients of all."""
    call, counter = compiled(block)
    for T in TOKENS:
        a = make_experts(T=T)
        logits = torch.randn(T, 5, generator=torch.Generator().manual_seed(T))
        results = []
        for function in (call, block):
            leaves = [t.detach().clone().requires_grad_(training) for t in (a.x, a.gate_up, a.down, logits)]
            y, loss = function(*leaves)
            gradients = torch.autograd.grad([y, loss], leaves, [a.dy, torch.ones(())]) if training else ()
            results.append([y.detach(), loss.detach(), *gradients])
        assert_all_same(*results)
    assert counter.frame_count <= 3


def test_grouped_gemm():
    """Other groups of as many rows compile nothing anew."""
    call, counter = compiled(grouped_gemm)
    for counts in ((30, 0, 34), (0, 64, 0), (64, 0, 0)):
        a = make_groups(counts, N=20, K=16)
        assert_same_bits(call(a.x, a.w, a.offs), grouped_gemm(a.x, a.w, a.offs))
    assert counter.frame_count == 1


def test_module_and_int8():
    torch.manual_seed(0)
    moe = SparseMoE(16, 24, 4, 2)
    x = torch.randn(3, 10, 16)
    call, _ = compiled(moe)
    with torch.no_grad():
        assert_same_bits(call(x), moe(x))
        pairs = quantize_experts(moe.gate_up_proj, moe.down_proj)
        weights, experts = moe_route(moe.gate(x[0]), 2)
        call, _ = compiled(moe_mlp)
        assert_same_bits(call(x[0], *pairs, weights, experts), moe_mlp(x[0], *pairs, weights, experts))
