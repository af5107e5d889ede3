"""Every bad input raises, by name, before a kernel runs and with every state as it was (row 13 and the API's contract)."""

import math

import pytest
import torch
from support import BACKENDS, assert_same_bits, make_inputs, make_norm_inputs, offsets

from lightning_attn import backends, gated_rms_norm, lightning_attention, lightning_attention_decode

B, T, H, K, V = 2, 5, 3, 4, 6
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch):
    """Every raw function of every backend fails the test."""

    def kernel(*args, **kwargs):
        pytest.fail("a kernel ran")

    for backend in BACKENDS:
        module = backends.load(backend)
        for name in ("attention_forward", "attention_backward", "attention_decode"):
            monkeypatch.setattr(module, name, kernel, raising=False)  # a backend may have no such function
        for name in ("gated_rms_norm_forward", "gated_rms_norm_backward"):
            monkeypatch.setattr(module, name, kernel, raising=False)


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


# argument -> (exception, its value); the other arguments are good ones
COMMON = {
    "q is a list": ("q", TypeError, lambda: [1.0]),
    "q is NumPy's": ("q", TypeError, lambda: zeros(B, T, H, K).numpy()),
    "q of rank 3": ("q", ValueError, lambda: zeros(T, H, K)),
    "q of rank 5": ("q", ValueError, lambda: zeros(1, B, T, H, K)),
    "q of integers": ("q", TypeError, lambda: zeros(B, T, H, K, dtype=torch.int32)),
    "q of complex numbers": ("q", TypeError, lambda: zeros(B, T, H, K, dtype=torch.complex64)),
    "k is None": ("k", TypeError, lambda: None),
    "k of rank 3": ("k", ValueError, lambda: zeros(B, T, K)),
    "k of another B": ("k", ValueError, lambda: zeros(B + 1, T, H, K)),
    "k of another T": ("k", ValueError, lambda: zeros(B, T + 1, H, K)),
    "k of another H": ("k", ValueError, lambda: zeros(B, T, H + 1, K)),
    "k of one head": ("k", ValueError, lambda: zeros(B, T, 1, K)),
    "k of another K": ("k", ValueError, lambda: zeros(B, T, H, K + 1)),
    "k of another dtype": ("k", TypeError, lambda: zeros(B, T, H, K, dtype=torch.bfloat16)),
    "k on another device": ("k", ValueError, lambda: zeros(B, T, H, K, device="meta")),
    "v is a number": ("v", TypeError, lambda: 1.0),
    "v of rank 3": ("v", ValueError, lambda: zeros(B, T, V)),
    "v of another B": ("v", ValueError, lambda: zeros(B + 1, T, H, V)),
    "v of another T": ("v", ValueError, lambda: zeros(B, T - 1, H, V)),
    "v of another H": ("v", ValueError, lambda: zeros(B, T, H - 1, V)),
    "v of another dtype": ("v", TypeError, lambda: zeros(B, T, H, V, dtype=torch.float64)),
    "v on another device": ("v", ValueError, lambda: zeros(B, T, H, V, device="meta")),
    "decay is a list": ("decay", TypeError, lambda: [0.1] * H),
    "decay too long": ("decay", ValueError, lambda: zeros(H + 1)),
    "decay too short": ("decay", ValueError, lambda: zeros(H - 1)),
    "decay of one number": ("decay", ValueError, lambda: zeros()),
    "decay of rank 2": ("decay", ValueError, lambda: zeros(1, H)),
    "decay in float64": ("decay", TypeError, lambda: zeros(H, dtype=torch.float64)),
    "decay in bfloat16": ("decay", TypeError, lambda: zeros(H, dtype=torch.bfloat16)),
    "decay on another device": ("decay", ValueError, lambda: zeros(H, device="meta")),
    "decay negative": ("decay", ValueError, lambda: torch.tensor([0.1, -1e-6, 0.1])),
    "decay NaN": ("decay", ValueError, lambda: torch.tensor([0.1, NAN, 0.1])),
    "decay infinite": ("decay", ValueError, lambda: torch.tensor([0.1, 0.1, INF])),
    "decay minus infinite": ("decay", ValueError, lambda: torch.tensor([-INF, 0.1, 0.1])),
    "decay that requires grad": ("decay", ValueError, lambda: zeros(H).requires_grad_()),
    "scale is a string": ("scale", TypeError, lambda: "1"),
    "scale is a bool": ("scale", TypeError, lambda: True),
    "scale is a tensor": ("scale", TypeError, lambda: torch.tensor(1.0)),
    "scale is None": ("scale", TypeError, lambda: None),
    "scale NaN": ("scale", ValueError, lambda: NAN),
    "scale infinite": ("scale", ValueError, lambda: -INF),
    "backend unknown": ("backend", ValueError, lambda: "cublas"),
    "backend empty": ("backend", ValueError, lambda: ""),
    "backend is None": ("backend", TypeError, lambda: None),
    "backend is a module": ("backend", TypeError, lambda: backends),
}

ATTENTION = {
    **COMMON,
    "initial_state is a list": ("initial_state", TypeError, lambda: [0.0]),
    "initial_state of rank 3": ("initial_state", ValueError, lambda: zeros(H, K, V)),
    "initial_state of another N": ("initial_state", ValueError, lambda: zeros(B + 1, H, K, V)),
    "initial_state of another H": ("initial_state", ValueError, lambda: zeros(B, H + 1, K, V)),
    "initial_state transposed": ("initial_state", ValueError, lambda: zeros(B, H, V, K)),
    "initial_state in bfloat16": (
        "initial_state",
        TypeError,
        lambda: zeros(B, H, K, V, dtype=torch.bfloat16),
    ),
    "initial_state in float64": ("initial_state", TypeError, lambda: zeros(B, H, K, V, dtype=torch.float64)),
    "initial_state elsewhere": ("initial_state", ValueError, lambda: zeros(B, H, K, V, device="meta")),
    "cu_seqlens with B > 1": ("q", ValueError, lambda: zeros(B, T, H, K)),
}

PACKED = {
    "cu_seqlens is a list": (TypeError, lambda: [0, 2, T]),
    "cu_seqlens of floats": (TypeError, lambda: offsets((2, 3), torch.float32)),
    "cu_seqlens of int16": (TypeError, lambda: offsets((2, 3), torch.int16)),
    "cu_seqlens of bools": (TypeError, lambda: torch.tensor([False, True, True])),
    "cu_seqlens of rank 0": (ValueError, lambda: torch.tensor(T)),
    "cu_seqlens of rank 2": (ValueError, lambda: offsets((2, 3))[None]),
    "cu_seqlens empty": (ValueError, lambda: torch.tensor([], dtype=torch.int32)),
    "cu_seqlens elsewhere": (ValueError, lambda: offsets((2, 3)).to("meta")),
    "cu_seqlens not from 0": (ValueError, lambda: torch.tensor([1, 2, T])),
    "cu_seqlens from below 0": (ValueError, lambda: torch.tensor([-1, 2, T])),
    "cu_seqlens short of T": (ValueError, lambda: torch.tensor([0, 2, T - 1])),
    "cu_seqlens beyond T": (ValueError, lambda: torch.tensor([0, 2, T + 1])),
    "cu_seqlens only 0": (ValueError, lambda: torch.tensor([0])),
    "cu_seqlens decreasing": (ValueError, lambda: torch.tensor([0, 3, 2, T])),
    "cu_seqlens beyond T in between": (ValueError, lambda: torch.tensor([0, T + 2, T])),
    "cu_seqlens below 0 in between": (ValueError, lambda: torch.tensor([0, -2, T])),
    "cu_seqlens beyond int32": (ValueError, lambda: torch.tensor([0, 2**33, T])),
}

DECODE = {
    **COMMON,
    "state is None": ("state", TypeError, lambda: None),
    "state of rank 0": ("state", ValueError, lambda: zeros()),
    "state of rank 3": ("state", ValueError, lambda: zeros(H, K, V)),
    "state of another H": ("state", ValueError, lambda: zeros(B, H + 1, K, V)),
    "state transposed": ("state", ValueError, lambda: zeros(B, H, V, K)),
    "state in float64": ("state", TypeError, lambda: zeros(B, H, K, V, dtype=torch.float64)),
    "state in float16": ("state", TypeError, lambda: zeros(B, H, K, V, dtype=torch.float16)),
    "state elsewhere": ("state", ValueError, lambda: zeros(B, H, K, V, device="meta")),
    "state with strided matrices": ("state", ValueError, lambda: zeros(B, H, V, K).mT),
    "state with strided rows": ("state", ValueError, lambda: zeros(B, H, K, 2 * V)[..., ::2]),
    "state with padded rows": ("state", ValueError, lambda: zeros(B, H, K, V + 1)[..., :-1]),
    "state expanded over rows": ("state", ValueError, lambda: zeros(1, H, K, V).expand(B, -1, -1, -1)),
    "state expanded over heads": ("state", ValueError, lambda: zeros(B, 1, K, V).expand(-1, H, -1, -1)),
    "state that overlaps itself": (
        "state", ValueError, lambda: zeros(1000).as_strided((B, H, K, V), (K * V, K * V, V, 1)),
    ),
    "slots are a list": ("slots", TypeError, lambda: [0, 1]),
    "slots of floats": ("slots", TypeError, lambda: zeros(B)),
    "slots of bools": ("slots", TypeError, lambda: torch.tensor([False, True])),
    "slots too many": ("slots", ValueError, lambda: torch.arange(B + 1)),
    "slots too few": ("slots", ValueError, lambda: torch.arange(B - 1)),
    "slots of rank 2": ("slots", ValueError, lambda: torch.arange(B)[None]),
    "slots elsewhere": ("slots", ValueError, lambda: torch.arange(B, device="meta")),
    "slots below -1": ("slots", ValueError, lambda: torch.tensor([0, -2])),
    "slots equal to S": ("slots", ValueError, lambda: torch.tensor([0, B])),
    "slots beyond int32": ("slots", ValueError, lambda: torch.tensor([0, 2**40])),
    "slots twice the same": ("slots", ValueError, lambda: torch.tensor([1, 1])),
}  # fmt: skip


def expect(error, function, argument, call):
    """The message: "function: expected argument ..., got ..."."""
    with pytest.raises(error, match=rf"^{function}: expected {argument}\b.*got ") as raised:
        call()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("case", ATTENTION)
def test_lightning_attention_names_the_bad_argument(case):
    """Row 13: wrong type, rank, shape, dtype, device or value."""
    argument, error, value = ATTENTION[case]
    x = make_inputs(B, T, H, K, V)
    arguments = {n: getattr(x, n) for n in ("q", "k", "v", "decay", "scale", "initial_state")}
    arguments |= {argument: value()}
    if case == "cu_seqlens with B > 1":
        arguments |= {"cu_seqlens": offsets((2, 3)), "initial_state": None}
        argument = r"q of shape \[1, T, H, K\] with cu_seqlens"
    expect(error, "lightning_attention", argument, lambda: lightning_attention(**arguments))


@pytest.mark.parametrize("case", PACKED)
def test_lightning_attention_names_bad_cu_seqlens(case):
    """Row 13: in forward and before it, whether or not a gradient is wanted."""
    error, value = PACKED[case]
    x = make_inputs(lengths=(2, 3), H=H, K=K, V=V)
    for gradient in (False, True):
        q = x.q.clone().requires_grad_(gradient)
        expect(
            error,
            "lightning_attention",
            "cu_seqlens",
            lambda q=q: lightning_attention(q, x.k, x.v, x.decay, cu_seqlens=value()),
        )


def test_a_state_for_each_document_is_expected_with_cu_seqlens():
    """Row 13: N is the number of documents, not the batch."""
    x = make_inputs(lengths=(2, 3), H=H, K=K, V=V)
    for N in (1, 3):
        state = zeros(N, H, K, V)
        expect(
            ValueError,
            "lightning_attention",
            "initial_state",
            lambda state=state: lightning_attention(
                x.q, x.k, x.v, x.decay, cu_seqlens=x.cu_seqlens, initial_state=state
            ),
        )


def test_a_float64_call_expects_float64_states():
    """Row 13: states have the dtype of the sums."""
    x = make_inputs(B, T, H, K, V, torch.float64)
    state = x.initial_state.float()
    q, k, v, decay = x.q, x.k, x.v, x.decay
    expect(
        TypeError,
        "lightning_attention",
        "initial_state",
        lambda: lightning_attention(q, k, v, decay, initial_state=state),
    )
    for dtype in (torch.float32, torch.bfloat16):
        state = x.initial_state.to(dtype)
        expect(
            TypeError,
            "lightning_attention_decode",
            "state",
            lambda state=state: lightning_attention_decode(q, k, v, decay, state),
        )


@pytest.mark.parametrize("case", DECODE)
def test_decode_names_the_bad_argument_and_leaves_the_state_alone(case):
    """Row 13: and the state, given or good, keeps every bit."""
    argument, error, value = DECODE[case]
    x = make_inputs(B, T, H, K, V)
    arguments = {n: getattr(x, n) for n in ("q", "k", "v", "decay", "scale")}
    state = arguments["state"] = x.initial_state.clone()
    version = state._version
    arguments |= {argument: value()}
    given = arguments["state"]
    before = given.clone() if isinstance(given, torch.Tensor) else None
    expect(error, "lightning_attention_decode", argument, lambda: lightning_attention_decode(**arguments))
    assert_same_bits(state, x.initial_state)
    assert state._version == version
    if before is not None and before.device.type == "cpu":
        assert torch.equal(given, before)


def test_decode_without_slots_expects_a_state_for_each_sequence():
    """Row 13: S = B."""
    x = make_inputs(B, T, H, K, V)
    for S in (B - 1, B + 1):
        state = zeros(S, H, K, V)
        expect(
            ValueError,
            "lightning_attention_decode",
            "state",
            lambda state=state: lightning_attention_decode(x.q, x.k, x.v, x.decay, state),
        )


@pytest.mark.parametrize("shape", [(), (3,), (H, K, V), (4, H, K, V + 1), (1, 4, H, K, V)], ids=str)
def test_decode_with_slots_expects_a_state_for_each_slot(shape):
    """Row 13: S is the cache's own, the rest is not."""
    x = make_inputs(B, T, H, K, V)
    state, slots = zeros(*shape), torch.arange(B)
    expect(
        ValueError,
        "lightning_attention_decode",
        "state",
        lambda: lightning_attention_decode(x.q, x.k, x.v, x.decay, state, slots=slots),
    )


@pytest.mark.parametrize("argument", ["q", "k", "v", "state"])
def test_decode_refuses_to_be_differentiated(argument):
    """Row 13: inputs that require grad raise while gradients are on."""
    x = make_inputs(B, T, H, K, V)
    arguments = {n: getattr(x, n).clone() for n in ("q", "k", "v", "decay")}
    arguments["state"] = x.initial_state.clone()
    arguments[argument].requires_grad_()
    expect(
        ValueError, "lightning_attention_decode", argument, lambda: lightning_attention_decode(**arguments)
    )
    assert torch.equal(arguments["state"], x.initial_state)


NORM = {
    "x is a list": ("x", TypeError, lambda: [1.0]),
    "x of integers": ("x", TypeError, lambda: zeros(4, 6, dtype=torch.int64)),
    "x of rank 0": ("x", ValueError, lambda: zeros()),
    "gate of another shape": ("gate", ValueError, lambda: zeros(4, 5)),
    "gate of one row": ("gate", ValueError, lambda: zeros(6)),
    "gate of another dtype": ("gate", TypeError, lambda: zeros(4, 6, dtype=torch.float16)),
    "gate elsewhere": ("gate", ValueError, lambda: zeros(4, 6, device="meta")),
    "gate is None": ("gate", TypeError, lambda: None),
    "weight too long": ("weight", ValueError, lambda: zeros(7)),
    "weight of rank 2": ("weight", ValueError, lambda: zeros(1, 6)),
    "weight in float64": ("weight", TypeError, lambda: zeros(6, dtype=torch.float64)),
    "weight elsewhere": ("weight", ValueError, lambda: zeros(6, device="meta")),
    "weight is None": ("weight", TypeError, lambda: None),
    "eps is 0": ("eps", ValueError, lambda: 0.0),
    "eps negative": ("eps", ValueError, lambda: -1e-6),
    "eps NaN": ("eps", ValueError, lambda: NAN),
    "eps infinite": ("eps", ValueError, lambda: INF),
    "eps is a string": ("eps", TypeError, lambda: "1e-6"),
    "backend unknown": ("backend", ValueError, lambda: "cublas"),
    "backend is None": ("backend", TypeError, lambda: None),
}


@pytest.mark.parametrize("case", NORM)
def test_gated_rms_norm_names_the_bad_argument(case):
    """Row 13: wrong type, rank, shape, dtype, device or value."""
    argument, error, value = NORM[case]
    arguments = dict(zip(("x", "gate", "weight"), make_norm_inputs((4, 6), torch.float32), strict=False))
    arguments |= {argument: value()}
    expect(error, "gated_rms_norm", argument, lambda: gated_rms_norm(**arguments))


def test_a_named_backend_that_cannot_run_says_why_and_nothing_else_runs(absent):
    """Row 13: no fallback; the state of decode is untouched."""
    x = make_inputs(B, T, H, K, V)
    state = x.initial_state.clone()
    tensors = x.q, x.k, x.v, x.decay
    norm = make_norm_inputs((4, 6), torch.float32)[:3]
    calls = [
        lambda: lightning_attention(*tensors, backend=absent),
        lambda: lightning_attention_decode(*tensors, state, backend=absent),
        lambda: gated_rms_norm(*norm, backend=absent),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=absent):
            call()
    assert torch.equal(state, x.initial_state)


def test_the_cpu_backend_refuses_head_dims_beyond_256_by_name():
    """Row 13: what a named backend does not support it refuses; the message says what it takes."""
    if "cpu" not in BACKENDS:
        pytest.fail("the cpu backend is not built")
    x = make_inputs(1, 2, 1, 257, 4)
    with pytest.raises(ValueError, match="K from 1 to 256, not 257"):
        lightning_attention(x.q, x.k, x.v, x.decay, backend="cpu")
