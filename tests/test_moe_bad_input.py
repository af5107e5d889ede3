"""The mixture of experts refuses what is wrong before any kernel runs, naming what it expected and what it got."""

import pytest
import torch
from support import HERE

import lightning_attn
from lightning_attn import (
    grouped_gemm,
    load_balancing_loss,
    moe_mlp,
    moe_route,
    quantize_experts,
    router_z_loss,
)

T, D, F, E, K = 6, 8, 5, 4, 2


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def refuse(error, message, function, *args, **options):
    with pytest.raises(error) as raised:
        function(*args, **options)
    assert message in str(raised.value), str(raised.value)


GOOD = {
    "x": zeros(T, D),
    "gate_up": zeros(E, 2 * F, D),
    "down": zeros(E, D, F),
    "weights": zeros(T, K),
    "experts": zeros(T, K, dtype=torch.int32),
}
INT8 = (
    (zeros(E, 2 * F, D, dtype=torch.int8), zeros(E, 2 * F)),
    (zeros(E, D, F, dtype=torch.int8), zeros(E, D)),
)


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch):
    """Whoever gets as far as a backend fails."""

    def fail(*args):
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr("lightning_attn.ops.moe.kernels_of", fail)


MLP = [
    ("x", zeros(T, D, 1), ValueError, "moe_mlp: expected x of shape [T, D], got [6, 8, 1]"),
    (
        "x",
        zeros(T, D + 1),
        ValueError,
        "moe_mlp: expected gate_up of shape [E, 2F, D] = [E, 2F, 9], got [4, 10, 8]",
    ),
    ("x", zeros(T, D, dtype=torch.int32), TypeError, "moe_mlp: expected x of dtype float32"),
    ("x", [1.0], TypeError, "moe_mlp: expected x to be a torch.Tensor, got list"),
    (
        "gate_up",
        zeros(E, 2 * F + 1, D),
        ValueError,
        "expected gate_up of shape [E, 2F, D] = [E, 2F, 8], got [4, 11, 8]",
    ),
    (
        "gate_up",
        zeros(E, D, 2 * F),
        ValueError,
        "expected gate_up of shape [E, 2F, D] = [E, 2F, 8], got [4, 8, 10]",
    ),
    (
        "gate_up",
        zeros(2 * F, D),
        ValueError,
        "expected gate_up of shape [E, 2F, D] = [E, 2F, 8], got [10, 8]",
    ),
    (
        "gate_up",
        zeros(0, 2 * F, D),
        ValueError,
        "expected at least one expert, got gate_up of shape [0, 10, 8]",
    ),
    (
        "gate_up",
        zeros(E, 2 * F, D).half(),
        TypeError,
        "expected gate_up of x's dtype torch.float32, got torch.float16",
    ),
    (
        "gate_up",
        zeros(E, 2 * F, D, dtype=torch.int8),
        TypeError,
        "expected gate_up of x's dtype torch.float32, got torch.int8",
    ),
    (
        "gate_up",
        INT8[0],
        TypeError,
        "expected gate_up and down both as tensors or both as pairs, got a pair and a tensor",
    ),
    ("down", zeros(E, F, D), ValueError, "expected down of shape [E, D, F] = [4, 8, 5], got [4, 5, 8]"),
    ("down", zeros(E + 1, D, F), ValueError, "expected down of shape [E, D, F] = [4, 8, 5], got [5, 8, 5]"),
    (
        "down",
        zeros(E, D, F, dtype=torch.float64),
        TypeError,
        "expected down of x's dtype torch.float32, got torch.float64",
    ),
    ("down", None, TypeError, "expected down to be a torch.Tensor, got NoneType"),
    ("weights", zeros(T, K + 1), ValueError, "expected weights of experts' shape [6, 2], got [6, 3]"),
    (
        "weights",
        zeros(T, K, dtype=torch.float64),
        TypeError,
        "expected weights of dtype torch.float32, got torch.float64",
    ),
    ("experts", zeros(T, K), TypeError, "expected experts of dtype int32 or int64, got torch.float32"),
    (
        "experts",
        zeros(T + 1, K).int(),
        ValueError,
        "expected experts of shape [T, k] = [6, k] with k from 1 to E = 4, got [7, 2]",
    ),
    (
        "experts",
        zeros(T, E + 1).int(),
        ValueError,
        "expected experts of shape [T, k] = [6, k] with k from 1 to E = 4, got [6, 5]",
    ),
    ("experts", zeros(T, 0).int(), ValueError, "with k from 1 to E = 4, got [6, 0]"),
    ("experts", torch.full((T, K), E), ValueError, "moe_mlp: expected experts in [0, 4), got 4"),
    ("experts", torch.full((T, K), -1), ValueError, "moe_mlp: expected experts in [0, 4), got -1"),
]


@pytest.mark.parametrize("name, value, error, message", MLP, ids=range(len(MLP)))
def test_moe_mlp(name, value, error, message):
    refuse(error, message, moe_mlp, *(GOOD | {name: value}).values())


def test_moe_mlp_options():
    refuse(
        ValueError,
        "expected layout to be 'concatenated' or 'interleaved', got 'fused'",
        moe_mlp,
        *GOOD.values(),
        layout="fused",
    )
    refuse(TypeError, "expected backend to be a str, got int", moe_mlp, *GOOD.values(), backend=3)


(GATE_UP, GATE_UP_SCALE), (DOWN, DOWN_SCALE) = INT8
PAIRS = [
    (
        (GATE_UP.float(), GATE_UP_SCALE),
        INT8[1],
        TypeError,
        "expected gate_up of dtype int8 in a pair, got torch.float32",
    ),
    (
        (GATE_UP, GATE_UP_SCALE.half()),
        INT8[1],
        TypeError,
        "expected the scales of gate_up of dtype float32, got torch.float16",
    ),
    (
        (GATE_UP, GATE_UP_SCALE[0]),
        INT8[1],
        ValueError,
        "expected the scales of gate_up of shape [E, N] = [4, 10], got [10]",
    ),
    (
        INT8[0],
        (DOWN, GATE_UP_SCALE),
        ValueError,
        "expected the scales of down of shape [E, N] = [4, 8], got [4, 10]",
    ),
    (INT8[0], (DOWN,), TypeError, "expected down to be a pair (int8 matrices, scales), got 1 items"),
    (
        (GATE_UP, None),
        INT8[1],
        TypeError,
        "expected the scales of gate_up to be a torch.Tensor, got NoneType",
    ),
]


@pytest.mark.parametrize("gate_up, down, error, message", PAIRS, ids=range(len(PAIRS)))
def test_int8_pairs(gate_up, down, error, message):
    refuse(error, message, moe_mlp, *(GOOD | {"gate_up": gate_up, "down": down}).values())


GEMM = {"x": zeros(7, D), "w": zeros(3, F, D), "offs": torch.tensor([2, 2, 6], dtype=torch.int32)}
GEMMS = [
    ("x", zeros(7, D, 1), ValueError, "grouped_gemm: expected x of shape [M, K], got [7, 8, 1]"),
    ("x", zeros(7, D + 1), ValueError, "grouped_gemm: expected w of shape [E, N, K] = [E, N, 9], got [3, 5, 8]"),
    ("w", zeros(F, D), ValueError, "expected w of shape [E, N, K] = [E, N, 8], got [5, 8]"),
    ("w", zeros(0, F, D), ValueError, "expected at least one group, got w of shape [0, 5, 8]"),
    ("w", zeros(3, F, D).bfloat16(), TypeError, "expected w of x's dtype torch.float32, got torch.bfloat16"),
    ("offs", torch.tensor([2, 2, 6]), TypeError, "expected offs of dtype int32, got torch.int64"),
    ("offs", torch.tensor([2, 6], dtype=torch.int32), ValueError, "expected offs of shape [E] = [3], got [2]"),
    ("offs", torch.tensor([2, 1, 6], dtype=torch.int32), ValueError, "expected offs not to decrease from 0 on, got 1 after 2 at index 1"),
    ("offs", torch.tensor([-1, 1, 6], dtype=torch.int32), ValueError, "expected offs not to decrease from 0 on, got -1 after 0 at index 0"),
    ("offs", torch.tensor([2, 2, 8], dtype=torch.int32), ValueError, "expected offs to end at M = 7 or before, got 8"),
    ("offs", [2, 2, 6], TypeError, "expected offs to be a torch.Tensor, got list"),
]  # fmt: skip


@pytest.mark.parametrize("name, value, error, message", GEMMS, ids=range(len(GEMMS)))
def test_grouped_gemm(name, value, error, message):
    refuse(error, message, grouped_gemm, *(GEMM | {name: value}).values())


@pytest.mark.parametrize(
    "logits, top_k, options, error, message",
    [
        (zeros(3, 4), 0, {}, ValueError, "moe_route: expected top_k from 1 to E = 4, got 0"),
        (zeros(3, 4), 5, {}, ValueError, "moe_route: expected top_k from 1 to E = 4, got 5"),
        (zeros(3, 4), 1.0, {}, TypeError, "moe_route: expected top_k to be an int, got float"),
        (zeros(3, 4), True, {}, TypeError, "moe_route: expected top_k to be an int, got bool"),
        (zeros(4), 1, {}, ValueError, "moe_route: expected logits of shape [T, E], got [4]"),
        (zeros(3, 4).int(), 1, {}, TypeError, "moe_route: expected logits of dtype float32"),
        (zeros(3, 4), 1, {"renormalize": 1}, TypeError, "expected renormalize to be a bool, got int"),
        (None, 1, {}, TypeError, "moe_route: expected logits to be a torch.Tensor, got NoneType"),
        (
            zeros(1, 4).expand(2**30, 4),
            4,
            {},
            ValueError,
            "moe_route: expected at most 2147483647 rows, got 4294967296",
        ),
    ],
    ids=range(9),
)
def test_moe_route(logits, top_k, options, error, message):
    refuse(error, message, moe_route, logits, top_k, **options)


def test_devices():
    """A tensor on another device than x."""
    for name in ("gate_up", "down", "weights", "experts"):
        refuse(
            ValueError,
            "on x's device cpu, got meta",
            moe_mlp,
            *(GOOD | {name: GOOD[name].to("meta")}).values(),
        )
    for name in ("w", "offs"):
        refuse(
            ValueError,
            "on x's device cpu, got meta",
            grouped_gemm,
            *(GEMM | {name: GEMM[name].to("meta")}).values(),
        )


def test_what_is_beside_the_kernels():
    refuse(
        ValueError,
        "quantize_experts: expected gate_up of shape [E, N, K], got [5, 8]",
        quantize_experts,
        zeros(5, 8),
        GOOD["down"],
    )
    refuse(
        TypeError, "quantize_experts: expected down of dtype float32", quantize_experts, GOOD["gate_up"], DOWN
    )
    refuse(
        ValueError,
        "load_balancing_loss: expected experts of shape [T, k] = [3, k], got [4, 2]",
        load_balancing_loss,
        zeros(3, 4),
        zeros(4, 2).int(),
    )
    refuse(
        TypeError,
        "load_balancing_loss: expected experts of dtype int32 or int64",
        load_balancing_loss,
        zeros(3, 4),
        zeros(3, 2),
    )
    refuse(ValueError, "router_z_loss: expected logits of shape [T, E], got [3]", router_z_loss, zeros(3))
    refuse(
        ValueError, "router_z_loss: expected logits of shape [T, E], got [3, 0]", router_z_loss, zeros(3, 0)
    )


def test_a_backend_that_cannot_says_why(monkeypatch):
    """A named backend never falls back."""
    from lightning_attn.ops import registry

    monkeypatch.setattr("lightning_attn.ops.moe.kernels_of", registry.kernels_of)
    refuse(
        ValueError,
        "moe_mlp: expected backend to be one of auto, reference",
        moe_mlp,
        *GOOD.values(),
        backend="gpu",
    )
    if "cuda" in HERE:
        refuse(
            ValueError,
            "moe_mlp: expected a backend that can run it, got 'cuda'",
            moe_mlp,
            *GOOD.values(),
            backend="cuda",
        )
    if "triton" in HERE:
        wide = [t.double() if t.is_floating_point() else t for t in GOOD.values()]
        refuse(
            ValueError,
            "it takes float32, bfloat16 or float16, not torch.float64",
            moe_mlp,
            *wide,
            backend="triton",
        )
        refuse(
            ValueError, "it takes at most 512 experts, not 513", moe_route, zeros(2, 513), 1, backend="triton"
        )


def test_names_are_public():
    names = {
        "SparseMoE",
        "grouped_gemm",
        "load_balancing_loss",
        "moe_mlp",
        "moe_route",
        "quantize_experts",
        "router_z_loss",
    }
    assert names <= set(lightning_attn.__all__)
