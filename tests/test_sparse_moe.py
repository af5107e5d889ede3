"""The module SparseMoE: against transformers' block, the names of its parameters, int8, dtypes and devices."""

import copy
import pickle

import pytest
import torch
from moe_support import plain_mlp
from support import HALF, assert_same_bits, device_of, dtype_id
from torch import nn

from lightning_attn import SparseMoE, moe_mlp, moe_route

D, F, E, K = 48, 40, 6, 2


@pytest.fixture
def moe():
    torch.manual_seed(0)
    return SparseMoE(D, F, E, K)


def inputs(*shape, dtype=torch.float32):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.op("moe_mlp_forward")
def test_is_its_parts(moe, backend):
    """Any leading dimensions; the router's logits on request."""
    moe.to(device_of(backend))
    x = inputs(3, 5).to(device_of(backend))
    y, logits = moe(x, return_router_logits=True, backend=backend)
    weights, experts = moe_route(moe.gate(x.view(-1, D)), K, backend=backend)
    expected = moe_mlp(x.view(-1, D), moe.gate_up_proj, moe.down_proj, weights, experts, backend=backend)
    assert y.shape == x.shape and logits.shape == (15, E)
    assert_same_bits(y.view(-1, D), expected)
    torch.testing.assert_close(moe(x[0, 0], backend=backend), y[0, 0])


@pytest.mark.op("moe_mlp_forward")
def test_equals_transformers(backend):
    """Output and every gradient, in float32, with the same weights."""
    from transformers import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxSparseMoeBlock

    torch.manual_seed(0)
    config = MiniMaxConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
    block = MiniMaxSparseMoeBlock(config)
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    moe = SparseMoE(D, F, E, K)
    moe.load_state_dict(block.state_dict())  # fused names
    moe.to(device_of(backend))
    x = inputs(2, 30)
    mine, theirs = x.to(device_of(backend), copy=True).requires_grad_(), x.clone().requires_grad_()
    y, expected = moe(mine, backend=backend), block(theirs)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-5)
    (y**2).sum().backward()
    (expected**2).sum().backward()
    torch.testing.assert_close(mine.grad.cpu(), theirs.grad, rtol=1e-4, atol=1e-4)
    pairs = zip(
        moe.parameters(),
        (block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight),
        strict=True,
    )
    for p, q in pairs:
        torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=1e-4, atol=1e-4)


def test_names_of_the_checkpoint(moe):
    """w1, w3 and w2 go out and come back, views of the parameters; what is missing or too much is named."""
    state = moe.checkpoint_state_dict()
    assert set(state) == {"gate.weight"} | {f"experts.{e}.w{n}.weight" for e in range(E) for n in (1, 2, 3)}
    assert state["experts.1.w1.weight"].shape == (F, D) and state["experts.1.w2.weight"].shape == (D, F)
    assert state["experts.4.w3.weight"].data_ptr() == moe.gate_up_proj[4, F:].data_ptr()
    other = SparseMoE(D, F, E, K)
    assert not any(other.load_state_dict(state))
    x = inputs(7)
    assert_same_bits(other(x), moe(x))
    weights, experts = moe_route(moe.gate(x), K)
    by_hand = plain_mlp(x, moe.gate_up_proj, moe.down_proj, weights, experts, "concatenated")
    torch.testing.assert_close(moe(x), by_hand)

    broken = dict(state)
    del broken["experts.3.w2.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*gate_up_proj.*down_proj"):
        SparseMoE(D, F, E, K).load_state_dict(broken)
    with pytest.raises(RuntimeError, match=r"Missing key.*gate_up_proj"):
        SparseMoE(D, F, E, K).load_state_dict(state | {"experts.3.w1.weight": torch.zeros(F, D + 1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*experts\.6\.w1"):
        SparseMoE(D, F, E, K).load_state_dict(state | {"experts.6.w1.weight": torch.zeros(F, D)})


def test_names_within_a_model(moe):
    """With a prefix, as part of another module; the caller's dict is not changed."""
    model = nn.ModuleDict({"block_sparse_moe": SparseMoE(D, F, E, K)})
    state = {f"block_sparse_moe.{name}": t for name, t in moe.checkpoint_state_dict().items()}
    before = dict(state)
    model.load_state_dict(state)
    assert state.keys() == before.keys()
    assert_same_bits(model["block_sparse_moe"].down_proj, moe.down_proj)
    assert set(moe.state_dict()) == {"gate.weight", "gate_up_proj", "down_proj"}


def test_meta_device_and_assignment(moe):
    """Made without memory, filled by load_state_dict(assign=True) or to_empty."""
    empty = SparseMoE(D, F, E, K, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in empty.parameters())
    empty.load_state_dict(moe.checkpoint_state_dict(), assign=True)
    assert_same_bits(empty(inputs(4)), moe(inputs(4)))
    filled = SparseMoE(D, F, E, K, device="meta").to_empty(device="cpu")
    filled.load_state_dict(moe.state_dict())
    assert_same_bits(filled(inputs(4)), moe(inputs(4)))


@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
def test_autocast(moe, dtype):
    """Row 20: the output in autocast's dtype, gradients in the parameters'."""
    x = inputs(9).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = moe(x)
    assert y.dtype == dtype
    cast = copy.deepcopy(moe).to(dtype)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in moe.parameters())
    torch.testing.assert_close(y, cast(x.detach().to(dtype)), rtol=0.05, atol=0.05)


def test_quantized(moe):
    """Its experts are quarter the size, its results near; scales stay float32; it goes through copies and files."""
    x = inputs(20)
    with torch.no_grad():
        expected = moe(x)
        q = copy.deepcopy(moe).quantize()
        assert q.quantized and not moe.quantized and q.quantize() is q
        y = q(x)
    assert (y - expected).abs().max() < 0.02 * expected.abs().max()
    half = copy.deepcopy(q).to(torch.bfloat16)
    assert half.gate_up_scale.dtype == torch.float32 and half.gate_up_proj.dtype == torch.int8
    assert_same_bits(half.gate_up_scale, q.gate_up_scale)
    assert half.gate.weight.dtype == torch.bfloat16
    assert "int8" in repr(q)
    other = SparseMoE(D, F, E, K).quantize()
    other.load_state_dict(pickle.loads(pickle.dumps(q.state_dict())))
    assert_same_bits(other(x), y)  # its gate requires no gradient
    with pytest.raises(ValueError, match="expected floating-point experts"):
        q.checkpoint_state_dict()
    with pytest.raises(ValueError, match="without requires_grad"):
        q(x.requires_grad_())


def test_training_brings_the_loss_down(moe):
    """A few steps, with the router's losses."""
    from lightning_attn import load_balancing_loss, router_z_loss

    x, target = inputs(64), inputs(64).flip(0)
    optimizer = torch.optim.Adam(moe.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        y, logits = moe(x, return_router_logits=True)
        _, experts = moe_route(logits.detach(), K)
        loss = ((y - target) ** 2).mean()
        losses.append(loss.item())
        (loss + 0.001 * load_balancing_loss(logits, experts) + 0.001 * router_z_loss(logits)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((0, 4, 2, 1), "expected hidden_size >= 1, got 0"),
        ((4, 0, 2, 1), "expected intermediate_size >= 1, got 0"),
        ((4, 4, 0, 1), "expected num_experts >= 1, got 0"),
        ((4, 4, 2, 3), "expected top_k from 1 to num_experts = 2, got 3"),
        ((4, 4, 2, 0), "expected top_k from 1 to num_experts = 2, got 0"),
    ],
)
def test_wrong_sizes(sizes, message):
    with pytest.raises(ValueError, match=f"SparseMoE: {message}"):
        SparseMoE(*sizes)


def test_wrong_input(moe):
    with pytest.raises(ValueError, match=r"SparseMoE: expected x of shape \[\.\.\., 48\], got \[3, 47\]"):
        moe(torch.zeros(3, 47))
    with pytest.raises(TypeError, match="SparseMoE: expected x to be a torch.Tensor, got list"):
        moe([1.0])


def test_int8_and_floating_point_experts_are_not_mixed_up(moe):
    """A state dict of the other kind is an error, strict or not, and nothing is copied."""
    q = copy.deepcopy(moe).quantize()
    for target, source, kind in (
        (q, moe.state_dict(), "int8"),
        (q, moe.checkpoint_state_dict(), "int8"),
        (moe, q.state_dict(), "floating-point"),
    ):
        before = {name: t.clone() for name, t in target.state_dict().items()}
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=f"expected gate_up_proj to be {kind}"):
                target.load_state_dict(source, strict=strict)
        for name, t in target.state_dict().items():
            if "proj" in name:
                assert_same_bits(t, before[name], name)


def test_scales_stay_float32_without_memory(moe):
    """Quantised on the meta device, cast, given memory, loaded."""
    with torch.device("meta"):
        empty = SparseMoE(D, F, E, K).quantize()
    empty = empty.to(torch.bfloat16)
    assert empty.gate_up_scale.is_meta and empty.gate_up_scale.dtype == torch.float32
    empty = empty.to_empty(device="cpu")
    half = copy.deepcopy(moe).to(torch.bfloat16).quantize()
    empty.load_state_dict(half.state_dict())
    with torch.no_grad():
        x = inputs(5, dtype=torch.bfloat16)
        assert_same_bits(empty(x), half(x))
    with pytest.raises(ValueError, match="expected floating-point experts to reset"):
        half.reset_parameters()


def test_what_is_no_tensor_is_reported(moe):
    with pytest.raises(RuntimeError, match="gate_up_proj"):
        moe.load_state_dict(moe.checkpoint_state_dict() | {"experts.0.w1.weight": "no tensor"})
