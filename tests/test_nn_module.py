"""The modules as PyTorch modules: bad input, parameters, casts, copies, checkpoints and training; and what
GatedRMSNorm computes."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_support import DIM, HEADS, HIDDEN, PARAMETERS, dtypes, here, layer, normal, on_cpu, states
from support import assert_close_to_truth, assert_same_bits, device_of, dtype_id, poisoned_memory
from torch import Tensor

from lightning_attn import GatedRMSNorm, LightningAttention, decay

# ---- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, match, x, options",
    [
        (ValueError, "expected x of shape", (2, 20), {}),
        (ValueError, "expected x of shape", (2, 5, HIDDEN + 1), {}),
        (ValueError, "expected x of shape", (2, 5, 1, HIDDEN), {}),
        (
            ValueError,
            "expected attention_mask of shape",
            (2, 5, HIDDEN),
            {"attention_mask": torch.ones(2, 4)},
        ),
        (ValueError, "expected attention_mask of shape", (2, 5, HIDDEN), {"attention_mask": torch.ones(5)}),
        (TypeError, "expected attention_mask", (2, 5, HIDDEN), {"attention_mask": [[1] * 5] * 2}),
        (ValueError, "attention_mask", (2, 5, HIDDEN), {"attention_mask": torch.ones(2, 5, device="meta")}),
        (
            ValueError,
            "expected attention_mask or cu_seqlens, got both",
            (1, 5, HIDDEN),
            {"attention_mask": torch.ones(1, 5), "cu_seqlens": torch.tensor([0, 5])},
        ),
        (ValueError, "cu_seqlens", (2, 5, HIDDEN), {"cu_seqlens": torch.tensor([0, 5])}),
        (ValueError, "cu_seqlens", (1, 5, HIDDEN), {"cu_seqlens": torch.tensor([0, 4])}),
        (ValueError, "state of shape", (2, 5, HIDDEN), {"state": torch.zeros(1, HEADS, DIM, DIM)}),
        (TypeError, "state of dtype", (2, 5, HIDDEN), {"state": states(2).double()}),
        (TypeError, "state", (2, 5, HIDDEN), {"state": 0}),
        (
            ValueError,
            "state of shape",
            (2, 5, HIDDEN),
            {"state": torch.zeros(1, HEADS, DIM, DIM), "attention_mask": torch.ones(2, 5)},
        ),
        (
            TypeError,
            "state of dtype",
            (2, 5, HIDDEN),
            {"state": states(2).double(), "attention_mask": torch.ones(2, 5)},
        ),
        (TypeError, "state", (2, 5, HIDDEN), {"state": [0.0], "attention_mask": torch.ones(2, 5)}),
        (ValueError, "expected backend", (2, 5, HIDDEN), {"backend": "nonsense"}),
        (TypeError, "expected backend to be a str", (2, 5, HIDDEN), {"backend": None}),
    ],
)
def test_bad_input(error: type[Exception], match: str, x: tuple[int, ...], options: dict[str, Any]) -> None:
    """Row 13: names the argument, what was expected and what came."""
    with pytest.raises(error, match=match) as raised:
        layer()(normal(*x), **options)
    assert "expected" in str(raised.value) and "got" in str(raised.value)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"layer_idx": 4, "num_layers": 4}, "layer_idx"),
        ({"layer_idx": -1, "num_layers": 4}, "layer_idx"),
        ({"num_heads": 0, "layer_idx": 0, "num_layers": 4}, "num_heads"),
    ],
)
def test_bad_construction(options: dict[str, int], match: str) -> None:
    """Row 13: a layer that cannot be is not made."""
    with pytest.raises(ValueError, match=match):
        LightningAttention(**{"hidden_size": 4, "num_heads": 2, "head_dim": 2, **options})
    with pytest.raises(TypeError, match="positional"):
        LightningAttention(4, 2, 2, 0, 4)  # which is the layer, which the number of layers?


# ---- as a module ------------------------------------------------------------------------------------------


def test_parameters() -> None:
    """The names and shapes of the released checkpoint, and nothing else: no bias, no buffer that would be
    saved."""
    module = LightningAttention(24, 3, 8, layer_idx=0, num_layers=1)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "qkv_proj.weight": (72, 24),
        "output_gate.weight": (24, 24),
        "norm.weight": (24,),
        "out_proj.weight": (24, 24),
    }
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == shapes
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    assert torch.equal(module.norm.weight, torch.ones(24))
    wide = LightningAttention(10, 3, 8, layer_idx=0, num_layers=1, dtype=torch.bfloat16)
    assert wide.qkv_proj.weight.shape == (72, 10) and wide.out_proj.weight.shape == (10, 24)
    assert all(p.dtype == torch.bfloat16 for p in wide.parameters()) and wide.decay.dtype == torch.float32
    assert all(f"{name}={value}" in repr(wide) for name, value in (("num_heads", 3), ("head_dim", 8)))


def test_checkpoint_shapes() -> None:
    """The released layer: shapes and number of parameters."""
    module = LightningAttention(6144, 64, 128, layer_idx=0, num_layers=80, device="meta")
    assert module.qkv_proj.weight.shape == (24576, 6144) and module.out_proj.weight.shape == (6144, 8192)
    assert module.output_gate.weight.shape == (8192, 6144) and module.norm.weight.shape == (8192,)
    assert sum(p.numel() for p in module.parameters()) == 251_666_432


def test_interleaved_heads() -> None:
    """The rows of qkv_proj are q | k | v per head, as in the checkpoint: only then is this layer's state
    known."""
    module = LightningAttention(2, 2, 1, layer_idx=0, num_layers=2)
    with torch.no_grad():
        module.qkv_proj.weight.copy_(torch.arange(1.0, 13).reshape(6, 2))
        x = torch.tensor([[[1.0, 0.0]]])
        _, state = module(x, return_state=True)
    silu = F.silu(torch.tensor([1.0, 3, 5, 7, 9, 11]))  # q0 k0 v0 q1 k1 v1
    torch.testing.assert_close(state.flatten(), torch.stack([silu[1] * silu[2], silu[4] * silu[5]]))


def test_state_dict_round_trip() -> None:
    """Strictly, and a missing, an extra or a misshapen tensor is an error."""
    module, other = layer(), LightningAttention(HIDDEN, HEADS, DIM, layer_idx=1, num_layers=4)
    x = normal(2, 10, HIDDEN)
    assert not torch.equal(module(x), other(x))
    saved = module.state_dict()
    assert list(saved) and other.load_state_dict(saved, strict=True)
    assert_same_bits(other(x), module(x))
    for name in PARAMETERS:
        without = {n: t for n, t in saved.items() if n != name}
        with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
            other.load_state_dict(without)
        with pytest.raises(RuntimeError, match="size mismatch"):
            other.load_state_dict({**saved, name: saved[name][:-1]})
    with pytest.raises(RuntimeError, match="Unexpected key.*decay"):
        other.load_state_dict({**saved, "decay": module.decay})


CASTS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "bfloat16": lambda m: m.bfloat16(),
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "there and back": lambda m: m.half().float(),
    "to(cpu)": lambda m: m.to("cpu"),
    "in a model": lambda m: torch.nn.Sequential(m).to(torch.bfloat16)[0],
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=list(CASTS))
def test_decay_stays_float32(cast: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    """Row 16: no dtype of the module rounds the rates. Rounded to bfloat16 they are wrong by as much as
    0.4%."""
    rates = decay.minimax(HEADS, 1, 4)
    assert not torch.equal(rates.bfloat16().float(), rates) and not torch.equal(rates.half().float(), rates)
    module = cast(layer())
    assert_same_bits(module.decay, rates, "decay")
    dtype = module.out_proj.weight.dtype
    y, state = module(normal(2, 10, HIDDEN, dtype=dtype), return_state=True)
    assert y.dtype == dtype and state.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("how", ["to_empty", "assign"])
@pytest.mark.parametrize("made", ["device", "context"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_meta_device(how: str, made: str, dtype: torch.dtype) -> None:
    """Made without memory, then filled, alone or in a model: the rates are there although no checkpoint has
    them."""
    source = layer(dtype)
    shape = HIDDEN, HEADS, DIM
    options: dict[str, Any] = {"layer_idx": 1, "num_layers": 4, "dtype": dtype}
    if made == "device":
        module = LightningAttention(*shape, **options, device="meta")
    else:
        with torch.device("meta"):
            module = LightningAttention(*shape, **options)
    x = normal(2, 10, HIDDEN, dtype=dtype)
    assert all(p.is_meta for p in module.parameters()) and module.decay.is_meta
    y, state = module(x.to("meta"), return_state=True)
    assert y.is_meta and y.shape == x.shape and y.dtype == dtype and state.dtype == torch.float32

    model = torch.nn.Sequential(module)
    saved = {f"0.{name}": t for name, t in source.state_dict().items()}
    if how == "to_empty":
        with poisoned_memory():
            model.to_empty(device="cpu")
        model.load_state_dict(saved)
    else:
        model.load_state_dict(saved, assign=True)
    assert_same_bits(module.decay, source.decay, "decay")
    assert_same_bits(model(x), source(x))


def test_copies() -> None:
    """deepcopy, pickle and torch.save keep weights and rates, and share no memory with the original."""
    module, x = layer(layer_idx=2), normal(2, 10, HIDDEN)
    expected = module(x).detach()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ]
    with torch.no_grad():
        for tensor in (*module.parameters(), module.decay):
            tensor.fill_(0.5)
    for other in copies:
        assert_same_bits(other(x).detach(), expected)
        assert_same_bits(other.bfloat16().decay, decay.minimax(HEADS, 2, 4), "decay")
        assert other.layer_idx == 2 and list(other.state_dict()) == list(module.state_dict())


def test_saved_weights_alone() -> None:
    """The state_dict passes through torch.save and the safe torch.load."""
    module, buffer = layer(), io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = LightningAttention(HIDDEN, HEADS, DIM, layer_idx=1, num_layers=4)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_bits(other(normal(2, 10, HIDDEN)), module(normal(2, 10, HIDDEN)))


def test_trains() -> None:
    """Some steps of an optimizer lower a loss; every parameter moves, the rates do not."""
    torch.manual_seed(0)
    module, x, goal = layer(), normal(2, 30, HIDDEN), normal(2, 30, HIDDEN, seed=1)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    rates = module.decay.clone()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(module(x), goal)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert_same_bits(module.decay, rates)


def test_causal() -> None:
    """A later token changes no bit of an earlier output, an earlier token does change a later output."""
    module, x = layer(), normal(2, 30, HIDDEN)
    changed = x.clone()
    changed[:, 20] += 1
    a, b = module(x), module(changed)
    assert_same_bits(a[:, :20], b[:, :20])
    assert (a[:, 20:] != b[:, 20:]).any(-1).all()


# ---- GatedRMSNorm -----------------------------------------------------------------------------------------


@here
@dtypes
def test_gated_rms_norm(backend: str, dtype: torch.dtype) -> None:
    """Row 1: the module is the formula, with its own weight and eps."""
    norm = GatedRMSNorm(33, eps=0.25).to(device_of(backend), dtype)
    with torch.no_grad():
        norm.weight.copy_(normal(33, seed=2))
    x, gate = (normal(4, 5, 33, seed=seed, dtype=dtype).to(device_of(backend)) for seed in (0, 1))

    def formula(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (33,), weight, 0.25) * gate.sigmoid()

    x_, gate_, weight_ = x.double(), gate.double(), norm.weight.detach().double()
    expected = x_ * weight_ / ((x_.square().mean(-1, keepdim=True) + 0.25).sqrt() * (1 + (-gate_).exp()))
    y = norm(x, gate, backend=backend).detach()
    if dtype == torch.float64:
        torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    else:
        assert_close_to_truth(y, expected, formula(x, gate, norm.weight).detach())
    norm(x, gate, backend=backend).sum().backward()
    assert norm.weight.grad.dtype == dtype and norm.weight.grad.any()


def test_gated_rms_norm_module() -> None:
    """One parameter, `weight`, of ones; device and dtype as asked for; it says what it is."""
    norm = GatedRMSNorm(5)
    assert {n: p.tolist() for n, p in norm.state_dict().items()} == {"weight": [1.0] * 5}
    assert norm.eps == 1e-6 and norm.weight.requires_grad
    assert GatedRMSNorm(5, dtype=torch.float16).weight.dtype == torch.float16
    assert GatedRMSNorm(5, device="meta").weight.is_meta
    assert repr(GatedRMSNorm(5, eps=0.5)) == "GatedRMSNorm(5, eps=0.5)"
    with pytest.raises(ValueError, match="expected weight of shape"):
        norm(torch.ones(2, 6), torch.ones(2, 6))


@on_cpu
def test_gated_rms_norm_many_rows(backend: str) -> None:
    """Row 1: the gradient of the weight sums over all tokens; in float32 its error may not grow with their
    number."""
    for rows in (64, 1024, 16384):
        x, gate, dy = (normal(rows, 24, seed=seed) for seed in range(3))
        norm = GatedRMSNorm(24)
        (actual,) = torch.autograd.grad(norm(x, gate, backend=backend), norm.weight, dy)
        plain_y = F.rms_norm(x, (24,), norm.weight, norm.eps) * gate.sigmoid()
        (baseline,) = torch.autograd.grad(plain_y, norm.weight, dy)
        x_, gate_, dy_ = x.double(), gate.double(), dy.double()
        rstd = (x_.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        expected = (dy_ * x_ * rstd * gate_.sigmoid()).sum(0)
        assert_close_to_truth(actual, expected, baseline, name=f"dweight of {rows} rows")
