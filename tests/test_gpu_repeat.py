"""The same bits a thousand times beside other work, and ten thousand calls that leave nothing behind (rows 21 and 26)."""

import gc
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu_support import DEVICE, GPU, allocated, differ, draw, kernels, memory_load, size
from support import BACKENDS, make_inputs, offsets
from torch import Tensor

from lightning_attn import decay, gated_rms_norm, lightning_attention, lightning_attention_decode, ops

pytestmark = pytest.mark.gpu

REPEATS = size(1000, 3)
D = size(128, 16)
HALF = torch.float16  # what the interpreter takes too


def assert_always_the_same(call: Callable[[], list[Tensor]]) -> None:
    """To the last bit, while another stream keeps the memory busy."""
    first = [y.clone() for y in call()]
    assert all(y.isfinite().all() and y.any() for y in first)
    different = torch.zeros((), dtype=torch.bool, device=DEVICE)
    with memory_load() as press:
        for _ in range(REPEATS):
            press()
            for a, b in zip(call(), first, strict=True):
                different |= differ(a, b)
    assert not different


@kernels
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_attention_repeats_itself(backend: str, packed: bool) -> None:
    """Row 21: few heads, so that sequences are cut in segments; outputs, states and gradients."""
    T = size(1000, 100)
    shape = {"lengths": (T // 3, 0, 1, T - T // 3 - 1)} if packed else {"B": 1, "T": T}
    x = make_inputs(**shape, H=2, K=D, V=D, dtype=HALF, scale=D**-0.5).to(DEVICE)
    shared = x.q, x.k, x.v, x.decay, x.scale, x.initial_state, x.cu_seqlens

    def call() -> list[Tensor]:
        outputs = ops.attention_forward(*shared, True, backend)
        return [*outputs, *ops.attention_backward(x.do, x.dstate, *shared, backend)]

    assert_always_the_same(call)


@kernels
@pytest.mark.op("attention_decode")
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_decoding_repeats_itself(backend: str, state_dtype: torch.dtype) -> None:
    """Row 21: from the same state each time."""
    x = make_inputs(B=8, T=2, H=size(16, 2), K=D, V=D, dtype=HALF).to(DEVICE)
    initial = x.initial_state.to(state_dtype)
    state, slots = torch.empty_like(initial), torch.arange(7, -1, -1, device=DEVICE)

    def call() -> list[Tensor]:
        state.copy_(initial)
        o = lightning_attention_decode(x.q, x.k, x.v, x.decay, state, slots=slots, backend=backend)
        return [o, state]

    assert_always_the_same(call)


@kernels
def test_the_norm_repeats_itself(backend: str) -> None:
    """Row 21: the gradient of the weight is a sum over all rows."""
    x, gate, dy = (draw(size(5000, 50), 257, dtype=HALF, seed=n) for n in range(3))
    weight = draw(257, dtype=HALF, seed=3)

    def call() -> list[Tensor]:
        y, rstd = ops.gated_rms_norm_forward(x, gate, weight, 1e-6, backend)
        return [y, rstd, *ops.gated_rms_norm_backward(dy, x, gate, weight, rstd, backend)]

    assert_always_the_same(call)


@kernels
@pytest.mark.op("attention_decode")
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_decoded_row_does_not_depend_on_the_batch(backend: str, state_dtype: torch.dtype) -> None:
    """Row 21: alone, beside a few or beside many: the same bits."""
    B = size(128, 9)
    x = make_inputs(B=B, T=1, H=size(16, 2), K=D, V=D, dtype=HALF).to(DEVICE)

    def decode(rows: slice) -> list[Tensor]:
        state = x.initial_state[rows].to(state_dtype, copy=True)
        o = lightning_attention_decode(x.q[rows], x.k[rows], x.v[rows], x.decay, state, backend=backend)
        return [o, state]

    whole = decode(slice(None))
    for rows in (slice(0, 1), slice(B // 2, B // 2 + 1), slice(B - 5, B)):
        for a, b in zip(decode(rows), whole, strict=True):
            assert not differ(a, b[rows])


# ---- row 26 ---------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of the process in memory; 0 where the system does not say."""
    status = Path("/proc/self/status")
    return int(re.search(r"VmRSS:\s*(\d+) kB", status.read_text())[1]) * 1024 if status.exists() else 0


def variants() -> int:
    """How many kernels Triton holds for these; the interpreter has none."""
    if "triton" not in BACKENDS:
        return 0
    from lightning_attn.backends.triton import attention, decode, gated_rms_norm

    jitted = [
        x
        for module in (attention, decode, gated_rms_norm)
        for x in vars(module).values()
        if hasattr(x, "run")
    ]
    return sum(len(caches[0]) for x in jitted for caches in getattr(x, "device_caches", {}).values())


def varied_call(backend: str, chance: random.Random) -> None:
    """Any batch, length, heads and packing; K, V and dtype are the model's."""
    B, T, H, K = chance.randint(1, 3), chance.randint(0, size(300, 20)), chance.randint(1, 4), 16
    if chance.random() < 0.3 or backend == "cuda":
        T = min(T, 5)
        q, k, v = (torch.ones(B, T, H, K, dtype=HALF, device=DEVICE) for _ in range(3))
        state, slots = torch.ones(B + 2, H, K, K, device=DEVICE), None
        if chance.random() < 0.5:
            slots = torch.tensor(chance.sample(range(-1, B + 2), B), device=DEVICE)
        lightning_attention_decode(
            q, k, v, decay.alibi(H).to(DEVICE), state[:B] if slots is None else state, slots=slots,
            backend=backend,
        )  # fmt: skip
        return
    cu_seqlens, N = None, B
    if chance.random() < 0.5:
        ends = sorted(chance.randint(0, T) for _ in range(chance.randint(0, 6)))
        lengths = [b - a for a, b in zip([0, *ends], [*ends, T], strict=True)]
        B, N, cu_seqlens = 1, len(lengths), offsets(lengths).to(DEVICE)
    training = chance.random() < 0.4
    q, k, v = (torch.ones(B, T, H, K, dtype=HALF, device=DEVICE, requires_grad=training) for _ in range(3))
    initial = torch.ones(N, H, K, K, device=DEVICE) if chance.random() < 0.5 else None
    o, state = lightning_attention(
        q, k, v, decay.alibi(H).to(DEVICE), initial_state=initial, cu_seqlens=cu_seqlens, return_state=True,
        backend=backend,
    )  # fmt: skip
    o = gated_rms_norm(o, o.detach(), torch.ones(K, dtype=HALF, device=DEVICE), backend=backend)
    if training:
        (o.sum() + state.sum()).backward()


@kernels
@pytest.mark.op("attention_decode")  # and whatever else the backend has
def test_ten_thousand_calls_leave_nothing_behind(backend: str) -> None:
    """Row 26: no memory of the device, none of the host, no kernel for a new length, no entry in a cache without bound."""
    chance, calls = random.Random(0), size(10_000, 50)
    gc.collect()
    before = allocated()
    for _ in range(calls // 5):
        varied_call(backend, chance)
    grown, known = resident(), variants()
    for _ in range(calls - calls // 5):
        varied_call(backend, chance)
    gc.collect()
    assert allocated() == before
    assert resident() - grown < 64 << 20
    assert variants() == known and known < 200
    assert known or not GPU or backend != "triton", "Triton keeps its kernels elsewhere now"
    resolved = ops._resolve.cache_info()
    assert resolved.maxsize is not None and resolved.currsize <= resolved.maxsize
