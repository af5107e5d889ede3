"""CUDA graphs, side streams and other devices (row 23)."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from gpu_support import DEVICE, GPU, capture, kernels, side_stream, size
from support import Inputs, assert_same_bits, check, make_inputs, make_norm_inputs, offsets
from torch import Tensor

from lightning_attn import gated_rms_norm, lightning_attention, lightning_attention_decode, ops

pytestmark = pytest.mark.gpu

D = size(128, 16)
HALF = torch.float16  # what the interpreter takes too
LENGTHS = [(700, 0, 1, 323), (0, 1024, 0, 0), (255, 257, 256, 256), (1, 1, 1, 1021)]
FEW = [(70, 0, 1, 29), (0, 100, 0, 0), (25, 26, 24, 25), (1, 1, 1, 97)]


def packed(lengths: tuple[int, ...]) -> Inputs:
    return make_inputs(lengths=lengths, H=2, K=D, V=D, dtype=HALF, scale=D**-0.5)


def leaves_of(x: Inputs) -> list[Tensor]:
    return [getattr(x, name).clone().requires_grad_() for name in ("q", "k", "v", "initial_state")]


def attend(x: Inputs, leaves: list[Tensor], backend: str) -> dict[str, Tensor]:
    """Outputs and gradients."""
    q, k, v, initial = leaves
    o, state = lightning_attention(
        q, k, v, x.decay, scale=x.scale, initial_state=initial, cu_seqlens=x.cu_seqlens, return_state=True,
        backend=backend,
    )  # fmt: skip
    gradients = torch.autograd.grad((o, state), leaves, (x.do, x.dstate))
    names = ("o", "state", "dq", "dk", "dv", "dinitial_state")
    return dict(zip(names, (o.detach(), state.detach(), *gradients), strict=True))


@kernels
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "backward"])
def test_a_captured_call_follows_the_lengths(backend: str, gradients: bool) -> None:
    """Row 23: the offsets are data: a replay has those that stand in memory, to the bits of a call that is not captured,
    and obeys the rule."""
    every = size(LENGTHS, FEW)
    x = packed(every[0]).to(DEVICE)
    x = replace(x, cu_seqlens=x.cu_seqlens.clone())
    leaves = leaves_of(x)

    def call() -> dict[str, Tensor]:
        if gradients:
            return attend(x, leaves, backend)
        with torch.no_grad():
            q, k, v, initial = leaves
            o, state = lightning_attention(
                q, k, v, x.decay, scale=x.scale, initial_state=initial, cu_seqlens=x.cu_seqlens,
                return_state=True, backend=backend,
            )  # fmt: skip
        return {"o": o, "state": state}

    replay = capture(call)
    for lengths in (*every[1:], every[0]):
        x.cu_seqlens.copy_(offsets(lengths))
        results = {name: y.cpu() for name, y in replay().items()}
        for name, y in call().items():
            assert_same_bits(y, results[name], name)
        if gradients:
            check(results, replace(x, cu_seqlens=offsets(lengths)).to("cpu"))


@kernels
@pytest.mark.op("attention_decode")
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_captured_decoding_step_follows_slots_inputs_and_states(backend: str, tokens: int) -> None:
    """Row 23: slots are data; the state goes on from where each replay leaves it."""
    x = make_inputs(B=4, T=4 * tokens, H=3, K=D, V=D, dtype=HALF).to(DEVICE)
    cache = torch.cat([x.initial_state, x.initial_state])  # 8 rows
    state, expected = cache.clone(), cache.clone()
    slots = torch.tensor([5, -1, 0, 2], device=DEVICE)
    now = [t[:, :tokens].clone() for t in (x.q, x.k, x.v)]

    def step() -> Tensor:
        return lightning_attention_decode(*now, x.decay, state, slots=slots, backend=backend)

    replay = capture(step)
    state.copy_(cache)
    for n, rows in enumerate(([5, -1, 0, 2], [0, 1, 2, 3], [-1, -1, 7, -1], [3, 2, 1, 0])):
        slots.copy_(torch.tensor(rows))
        new = [t[:, n * tokens : (n + 1) * tokens] for t in (x.q, x.k, x.v)]
        for a, b in zip(now, new, strict=True):
            a.copy_(b)
        o = replay()
        own = lightning_attention_decode(
            *(t.contiguous() for t in new), x.decay, expected, slots=slots.clone(), backend=backend
        )
        assert_same_bits(o, own, "o")
        assert_same_bits(state, expected, "state")
    assert not torch.equal(state, cache) and torch.equal(state[[4, 6]], cache[[4, 6]])


@kernels
def test_a_captured_norm(backend: str) -> None:
    """Row 23: with its gradients, on other inputs than those of the capture."""
    tensors = [t.to(DEVICE) for t in make_norm_inputs((33, 257), HALF)]
    leaves, dy = [t.clone().requires_grad_() for t in tensors[:3]], tensors[3]

    def call() -> list[Tensor]:
        y = gated_rms_norm(*leaves, backend=backend)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    replay = capture(call)
    for factor in (1.0, -2.0):
        with torch.no_grad():
            for leaf, t in zip(leaves, tensors, strict=False):
                leaf.copy_(factor * t)
        results = [y.clone() for y in replay()]
        for a, b in zip(results, call(), strict=True):
            assert_same_bits(a, b)


def calls(backend: str, device: str = DEVICE) -> dict[str, Callable[[], list[Tensor]]]:
    """Each operator of a backend on inputs that are there, without autograd, which has streams of its own in mind."""
    few = make_inputs(B=3, T=2, H=3, K=D, V=D, dtype=HALF).to(device)

    def decode() -> list[Tensor]:
        state = few.initial_state.clone()
        return [lightning_attention_decode(few.q, few.k, few.v, few.decay, state, backend=backend), state]

    if backend == "cuda":
        return {"decode": decode}
    x = packed(size(LENGTHS, FEW)[0]).to(device)
    shared = x.q, x.k, x.v, x.decay, x.scale, x.initial_state, x.cu_seqlens
    *norm, dy = (t.to(device) for t in make_norm_inputs((33, 257), HALF))

    def normalise() -> list[Tensor]:
        y, rstd = ops.gated_rms_norm_forward(*norm, 1e-6, backend)
        return [y, *ops.gated_rms_norm_backward(dy, *norm, rstd, backend)]

    return {
        "decode": decode,
        "forward": lambda: [*ops.attention_forward(*shared, True, backend)],
        "backward": lambda: [*ops.attention_backward(x.do, x.dstate, *shared, backend)],
        "norm": normalise,
    }


@kernels
@pytest.mark.op("attention_decode")  # and whatever else the backend has
def test_on_a_side_stream_nothing_waits_for_the_default_one(backend: str) -> None:
    """Row 23: the same bits, while the default stream has long been busy with something else."""
    for name, call in calls(backend).items():
        expected = [y.clone() for y in call()]
        with side_stream():
            call()  # this stream has its memory now
            for a, b in zip(call(), expected, strict=True):
                assert_same_bits(a, b, name)
        if not GPU:
            continue
        torch.cuda.synchronize()
        stream, busy = torch.cuda.Stream(), torch.cuda.Event()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        torch.cuda._sleep(3_000_000_000)  # cycles: more than a second
        busy.record()
        with torch.cuda.stream(stream):
            results = call()
        stream.synchronize()
        assert not busy.query(), f"{name} waits for the default stream"
        for a, b in zip(results, expected, strict=True):
            assert_same_bits(a, b, name)


@kernels
@pytest.mark.op("attention_decode")  # and whatever else the backend has
@pytest.mark.skipif(GPU and torch.cuda.device_count() < 2, reason="there is one device only")
def test_every_device_gives_the_same(backend: str) -> None:
    """Row 23: tensors of another device than the current one."""
    first = {name: [y.cpu() for y in call()] for name, call in calls(backend).items()}
    other = "cuda:1" if GPU else DEVICE
    for name, call in calls(backend, other).items():
        results = call()
        assert {torch.device(other)} == {y.device for y in results}
        for a, b in zip(results, first[name], strict=True):
            assert_same_bits(a, b, name)
