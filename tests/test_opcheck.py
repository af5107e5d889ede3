"""Row 4: every operator under torch.library's own tests."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from moe_support import make_experts, make_groups
from support import BACKENDS, DTYPES, LAYOUTS, device_of, dtype_id, make_inputs

from lightning_attn import quantize_experts
from lightning_attn.dispatch import accumulation_dtype

OPS = torch.ops.lightning_attn
UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
# The operators are the same but for the last argument: of the backends that are slow here only the full case.
SLOW = ("reference", "triton")
OPTIONAL = [
    (backend, dtype, packed, state)
    for backend, dtype, packed, state in itertools.product(BACKENDS, DTYPES, (False, True), (False, True))
    if backend not in SLOW or (packed and state)
]
STRIDED = [(b, layout) for b in BACKENDS for layout in LAYOUTS if b not in SLOW or "element" in layout]
optional = pytest.mark.parametrize("backend, dtype, packed, state", OPTIONAL, ids=dtype_id)

pytestmark = pytest.mark.usefixtures("no_compiled_code")


def opcheck(op: Callable[..., Any], *args: object) -> None:
    """All four tests of torch.library; raises on the first that fails."""
    assert torch.library.opcheck(op, args, test_utils=UTILS) == dict.fromkeys(UTILS, "SUCCESS")


def all_raw_ops() -> set[str]:
    return {
        s.name.removeprefix("lightning_attn::")
        for s in torch._C._jit_get_all_schemas()
        if "lightning_attn::" in s.name
    }


def test_every_operator_is_checked_here() -> None:
    """Row 4: an operator that is registered and not in this file fails here."""
    assert all_raw_ops() == {
        "attention_forward",
        "attention_backward",
        "attention_state",
        "attention_history",
        "attention_decode",
        "gated_rms_norm_forward",
        "gated_rms_norm_backward",
        "moe_route_forward",
        "moe_route_backward",
        "grouped_gemm_forward",
        "grouped_gemm_backward",
        "moe_mlp_forward",
        "moe_mlp_backward",
    }
    for name in all_raw_ops():
        assert torch.Tag.pt2_compliant_tag in getattr(OPS, name).default.tags


@optional
def test_opcheck_attention_forward(backend: str, dtype: torch.dtype, packed: bool, state: bool) -> None:
    """Row 4: with and without initial_state, cu_seqlens (int32 and int64) and the returned state."""
    x = make_inputs(
        B=2, T=7, H=3, K=5, V=4, dtype=dtype, lengths=(3, 0, 4) if packed else None, state=state
    ).to(device_of(backend))
    args = x.q, x.k, x.v, x.decay, x.scale, x.initial_state
    for return_state in (False, True):
        opcheck(OPS.attention_forward.default, *args, x.cu_seqlens, return_state, backend)
    if packed:
        opcheck(OPS.attention_forward.default, *args, x.cu_seqlens.long(), True, backend)


@optional
def test_opcheck_attention_backward(backend: str, dtype: torch.dtype, packed: bool, state: bool) -> None:
    """Row 4: with and without initial_state, cu_seqlens and the gradient of the state."""
    x = make_inputs(
        B=2, T=7, H=3, K=5, V=4, dtype=dtype, lengths=(3, 0, 4) if packed else None, state=state
    ).to(device_of(backend))
    for dstate in (None, x.dstate):
        args = x.do, dstate, x.q, x.k, x.v, x.decay, x.scale, x.initial_state, x.cu_seqlens
        opcheck(OPS.attention_backward.default, *args, backend)


@pytest.mark.op("attention_state")
@dtypes
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_opcheck_attention_state(backend: str, dtype: torch.dtype, reverse: bool) -> None:
    """Row 4: with and without an initial state, and of no tokens."""
    x = make_inputs(B=2, T=7, H=3, K=5, V=4, dtype=dtype).to(device_of(backend))
    for k, v in ((x.k, x.v), (x.k[:, :0], x.v[:, :0])):
        for initial in (None, x.initial_state):
            opcheck(OPS.attention_state.default, k, v, x.decay, x.scale, initial, reverse, backend)


@pytest.mark.op("attention_history")
@dtypes
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_opcheck_attention_history(backend: str, dtype: torch.dtype, reverse: bool) -> None:
    """Row 4: also of no tokens."""
    x = make_inputs(B=2, T=7, H=3, K=5, V=4, dtype=dtype).to(device_of(backend))
    for q, out in ((x.q, x.v.clone()), (x.q[:, :0], x.v[:, :0].clone())):
        opcheck(OPS.attention_history.default, q, x.initial_state, x.decay, x.scale, reverse, out, backend)


@pytest.mark.op("attention_decode")
@dtypes
@pytest.mark.parametrize("slots", [None, torch.int32, torch.int64], ids=["rows", "int32", "int64"])
def test_opcheck_attention_decode(backend: str, dtype: torch.dtype, slots: torch.dtype | None) -> None:
    """Row 4: the one operator that mutates; every dtype of the state; one slot is padding."""
    x = make_inputs(B=3, T=2, H=2, K=5, V=4, dtype=dtype).to(device_of(backend))
    rows = None if slots is None else torch.tensor([4, -1, 1], dtype=slots, device=x.q.device)
    states = torch.randn(3 if slots is None else 6, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    states = states.to(x.q.device)
    for state_dtype in dict.fromkeys((accumulation_dtype(dtype), *_narrow_states(dtype))):
        args = x.q, x.k, x.v, x.decay, states.to(state_dtype), rows, x.scale, backend
        opcheck(OPS.attention_decode.default, *args)


def _narrow_states(dtype: torch.dtype) -> list[torch.dtype]:
    return [] if dtype == torch.float64 else [torch.bfloat16]


@dtypes
@pytest.mark.parametrize("shape", [(6,), (2, 3, 6), (0, 6)], ids=str)
def test_opcheck_gated_rms_norm(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Row 4: forward and backward, the weight in x's dtype and in float32."""
    random = torch.Generator().manual_seed(0)
    device = device_of(backend)
    x, gate, dy, row = (
        torch.randn(size, generator=random, dtype=torch.float64).to(device, dtype)
        for size in (shape, shape, shape, 6)
    )
    for weight_dtype in dict.fromkeys((dtype, torch.float32)):
        weight = row.to(weight_dtype)
        opcheck(OPS.gated_rms_norm_forward.default, x, gate, weight, 1e-6, backend)
        _, rstd = OPS.gated_rms_norm_forward(x, gate, weight, 1e-6, backend)
        opcheck(OPS.gated_rms_norm_backward.default, dy, x, gate, weight, rstd, backend)


@pytest.mark.parametrize("backend, layout", STRIDED)
def test_opcheck_strided(backend: str, layout: str) -> None:
    """Rows 4, 10: what a fake says of an output's strides holds for strided inputs, and no output is a view
    of them."""
    x = make_inputs(B=2, T=6, H=3, K=5, V=5).to(device_of(backend))
    q, k, v, do, initial, dstate = (
        LAYOUTS[layout](t) for t in (x.q, x.k, x.v, x.do, x.initial_state, x.dstate)
    )
    opcheck(OPS.attention_forward.default, q, k, v, x.decay, x.scale, initial, None, True, backend)
    args = do, dstate, q, k, v, x.decay, x.scale, initial, None, backend
    opcheck(OPS.attention_backward.default, *args)
    opcheck(OPS.attention_state.default, k, v, x.decay, x.scale, initial, True, backend)
    opcheck(OPS.attention_decode.default, q, k, v, x.decay, x.initial_state.clone(), None, x.scale, backend)
    weight = torch.ones(5, device=x.q.device)
    opcheck(OPS.gated_rms_norm_forward.default, q, k, weight, 1e-6, backend)
    _, rstd = OPS.gated_rms_norm_forward(q, k, weight, 1e-6, backend)
    opcheck(OPS.gated_rms_norm_backward.default, do, q, k, weight, rstd, backend)


@pytest.mark.parametrize("B, T, lengths", [(2, 0, None), (0, 3, None), (1, 0, ()), (1, 0, (0, 0))], ids=str)
def test_opcheck_empty(backend: str, B: int, T: int, lengths: tuple[int, ...] | None) -> None:
    """Rows 4, 11: no tokens, no sequences, no documents, nothing but empty documents."""
    x = make_inputs(B=B, T=T, H=2, K=3, V=4, lengths=lengths).to(device_of(backend))
    args = x.q, x.k, x.v, x.decay, x.scale, x.initial_state, x.cu_seqlens
    opcheck(OPS.attention_forward.default, *args, True, backend)
    opcheck(OPS.attention_backward.default, x.do, x.dstate, *args, backend)
    if lengths is None:
        decode = x.q, x.k, x.v, x.decay, x.initial_state.clone(), None, x.scale, backend
        opcheck(OPS.attention_decode.default, *decode)


@pytest.mark.op("moe_route_forward")
@dtypes
def test_opcheck_moe_route(backend: str, dtype: torch.dtype) -> None:
    """Row 4: both ways to weigh, strided logits, no tokens."""
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(device_of(backend), dtype)
    for x in (logits, logits[:, 1:], logits[:0]):
        for renormalize in (True, False):
            opcheck(OPS.moe_route_forward.default, x, 2, renormalize, backend)
            weights, experts = OPS.moe_route_forward(x, 2, renormalize, backend)
            args = weights.flip(1), x, weights, experts, renormalize, backend
            opcheck(OPS.moe_route_backward.default, *args)


@pytest.mark.op("grouped_gemm_forward")
@dtypes
def test_opcheck_grouped_gemm(backend: str, dtype: torch.dtype) -> None:
    """Row 4: dense and strided operands, each gradient with and without the other."""
    a = make_groups((3, 0, 4), N=5, K=6, dtype=dtype, rest=2).to(device_of(backend))
    stored = a.w.mT.contiguous().mT
    for w in (a.w, stored):
        opcheck(OPS.grouped_gemm_forward.default, a.x, w, a.offs, backend)
        for needs in ((True, True), (True, False), (False, True)):
            opcheck(OPS.grouped_gemm_backward.default, a.dy, a.x, w, a.offs, *needs, backend)


@pytest.mark.op("moe_mlp_forward")
@dtypes
@pytest.mark.parametrize("T", [0, 6])
def test_opcheck_moe_mlp(backend: str, dtype: torch.dtype, T: int) -> None:
    """Row 4: kept for a backward or not, int8, both layouts, single gradients."""
    a = make_experts(T=T, D=8, F=6, E=3, dtype=dtype).to(device_of(backend))
    (gate_up, gate_up_scale), (down, down_scale) = quantize_experts(a.gate_up, a.down)
    for interleaved, save in ((False, True), (True, False)):
        tail = a.weights, a.experts, interleaved, save, backend
        opcheck(OPS.moe_mlp_forward.default, a.x, a.gate_up, None, a.down, None, *tail)
    tail = a.weights, a.experts, False, False, backend
    opcheck(OPS.moe_mlp_forward.default, a.x, gate_up, gate_up_scale, down, down_scale, *tail)
    tail = a.weights, a.experts, False, True, backend
    _, *kept = OPS.moe_mlp_forward(a.x, a.gate_up, None, a.down, None, *tail)
    for needs in ((True,) * 4, (True, False, False, False), (False, True, True, True)):
        args = a.dy, a.x, a.gate_up, a.down, a.weights, *kept, False, *needs, backend
        opcheck(OPS.moe_mlp_backward.default, *args)
