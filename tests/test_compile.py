"""Every public function and module under torch.compile."""

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import assert_same_bits, device_of, dtype_id, make_inputs, offsets
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_attn import (
    GatedRMSNorm,
    LightningAttention,
    decay,
    gated_rms_norm,
    lightning_attention,
    lightning_attention_decode,
)

pytestmark = pytest.mark.usefixtures("no_compiled_code")

TOKENS = (
    64,
    65,
    100,
    257,
    3,
)  # the first call compiles, the second finds that T changes, the rest reuse its code


def compiled(
    function: Callable[..., Any], **options: Any
) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def assert_all_same(actual: Any, expected: Any) -> None:
    actual, expected = ([x] if isinstance(x, Tensor) else x for x in (actual, expected))
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a, b, f"output {i}")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, initial: Tensor, cu_seqlens: Tensor | None = None
) -> Any:
    return lightning_attention(
        q, k, v, rates, scale=0.5, initial_state=initial, return_state=True, cu_seqlens=cu_seqlens
    )


def test_forward_any_length() -> None:
    """Row 5: equal to eager bit by bit; the second length makes the code dynamic in T, and no length
    recompiles it."""
    call, counter = compiled(attend)
    for T in TOKENS:
        x = make_inputs(B=2, T=T, H=3, K=16, V=24)
        args = x.q, x.k, x.v, x.decay, x.initial_state
        assert_all_same(call(*args), attend(*args))
    assert counter.frame_count == 2


def test_forward_marked_dynamic() -> None:
    """Row 5: T marked as dynamic is nowhere fixed to a number, and one compilation serves every length."""
    call, counter = compiled(attend)
    for T in TOKENS:
        x = make_inputs(B=2, T=T, H=3, K=16, V=24)
        q, k, v = (t.clone() for t in (x.q, x.k, x.v))
        for t in (q, k, v):
            torch._dynamo.mark_dynamic(t, 1)  # raises where the code needs one length
        assert_all_same(call(q, k, v, x.decay, x.initial_state), attend(q, k, v, x.decay, x.initial_state))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=dtype_id)
def test_backward_any_length(dtype: torch.dtype) -> None:
    """Row 5: gradients of q, k, v and initial_state, through o and through the state."""

    def loss(*args: Tensor) -> Tensor:
        o, state = attend(*args)
        return o.float().square().sum() + state.float().sin().sum()

    call, counter = compiled(loss)
    for T in TOKENS:
        x = make_inputs(B=2, T=T, H=3, K=16, V=24, dtype=dtype)
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.initial_state)]
        args = *leaves[:3], x.decay, leaves[3]
        assert_all_same(torch.autograd.grad(call(*args), leaves), torch.autograd.grad(loss(*args), leaves))
    assert counter.frame_count == 2


def test_backward_of_one_output() -> None:
    """Rows 5, 19: only o, and only the state, has a gradient."""
    x = make_inputs(B=2, T=20, H=3, K=16, V=24)
    for output in (0, 1):

        def loss(*args: Tensor, output: int = output) -> Tensor:
            return attend(*args)[output].square().sum()

        call, _ = compiled(loss)
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.initial_state)]
        args = *leaves[:3], x.decay, leaves[3]
        assert_all_same(
            torch.autograd.grad(call(*args), leaves, allow_unused=True),
            torch.autograd.grad(loss(*args), leaves, allow_unused=True),
        )


def test_packed_any_length_and_count() -> None:
    """Row 5: cu_seqlens is data: neither its values nor the number of documents recompiles more than once."""

    def loss(*args: Tensor) -> Tensor:
        o, state = attend(*args)
        return o.square().sum() + state.sin().sum()

    call, counter = compiled(loss)
    for lengths in ((5, 9), (9, 1, 40), (0, 70, 0, 3), (64, 64), (1, 2, 3, 4, 5, 6)):
        x = make_inputs(H=3, K=16, V=24, lengths=lengths)
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.initial_state)]
        args = *leaves[:3], x.decay, leaves[3], x.cu_seqlens
        assert_all_same(torch.autograd.grad(call(*args), leaves), torch.autograd.grad(loss(*args), leaves))
    assert counter.frame_count == 2


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_decode_in_place(state_dtype: torch.dtype) -> None:
    """Row 5: compiled code updates the caller's state itself, sees it before and after, and steps on from
    there."""

    def step(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = state.float().sum()
        o = lightning_attention_decode(q, k, v, rates, state, scale=0.5)
        return o * 2, before, state.float().sum()

    call, counter = compiled(step)
    rates = decay.alibi(3)
    states = [normal(5, 3, 8, 4, dtype=state_dtype) for _ in range(2)]
    for seed in range(4):
        q, k, v = (normal(5, 1, 3, d, seed=10 * seed + d) for d in (8, 8, 4))
        old = states[0].clone()
        assert_all_same(call(q, k, v, rates, states[0]), step(q, k, v, rates, states[1]))
        assert_same_bits(*states, "state")
        assert not torch.equal(states[0], old)
    assert counter.frame_count == 1


def test_decode_slots_of_a_cache() -> None:
    """Rows 5, 17: the state is one layer of a cache, slots and batch vary, -1 is padding; other rows stay as
    they are."""

    def step(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, cache: Tensor, slots: Tensor) -> list[Tensor]:
        layers = (0, 2)
        return [lightning_attention_decode(q, k, v, rates, cache[layer], slots=slots) for layer in layers]

    call, counter = compiled(step)
    rates = decay.alibi(3)
    caches = [normal(3, 7, 3, 8, 4) for _ in range(2)]
    untouched = caches[0].clone()
    for seed, slots in enumerate(([5, 0], [1, -1, 4], [0, 2, 4, 5, 1], [-1, -1])):
        q, k, v = (normal(len(slots), 2, 3, d, seed=10 * seed + d) for d in (8, 8, 4))
        rows = torch.tensor(slots)
        assert_all_same(call(q, k, v, rates, caches[0], rows), step(q, k, v, rates, caches[1], rows))
        assert_same_bits(*caches, "cache")
    assert counter.frame_count == 2
    assert_same_bits(caches[0][1], untouched[1], "layer that no call was given")
    assert_same_bits(caches[0][:, [3, 6]], untouched[:, [3, 6]], "rows in no slot")
    assert not torch.equal(caches[0][0], untouched[0]) and not torch.equal(caches[0][2], untouched[2])


def test_gated_rms_norm_any_length() -> None:
    """Row 5: the norm and its gradients."""

    def loss(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, weight).square().sum()

    call, counter = compiled(loss)
    for T in TOKENS:
        leaves = [normal(*shape, seed=T).requires_grad_() for shape in ((2, T, 12), (2, T, 12), (12,))]
        assert_all_same(
            torch.autograd.grad(call(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves)
        )
    assert counter.frame_count == 2


def layer(**options: Any) -> LightningAttention:
    torch.manual_seed(0)
    return LightningAttention(20, 3, 8, layer_idx=1, num_layers=4, **options)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_module(masked: bool) -> None:
    """Row 5: a compiled LightningAttention with a state, with and without a mask: output, state,
    gradients."""
    module = layer()

    def loss(x: Tensor, state: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        y, new = module(x, state=state, return_state=True, attention_mask=mask)
        return y.square().sum() + new.sin().sum(), y, new

    call, counter = compiled(loss)
    for T in TOKENS[:3]:
        x, state = normal(2, T, 20, seed=T).requires_grad_(), normal(2, 3, 8, 8).requires_grad_()
        mask = normal(2, T, seed=1) > 0 if masked else None
        leaves = [x, state, *module.parameters()]
        (a, *actual), (b, *expected) = call(x, state, mask), loss(x, state, mask)
        assert_all_same(actual, expected)
        assert_all_same(torch.autograd.grad(a, leaves), torch.autograd.grad(b, leaves))
    assert counter.frame_count == 2


def test_module_packed() -> None:
    """Row 5: a compiled LightningAttention with cu_seqlens."""
    module = layer()
    call, counter = compiled(module)
    for lengths in ((5, 9), (9, 1, 40), (0, 70, 0, 3), (64, 64)):
        x, cu_seqlens = normal(1, sum(lengths), 20), offsets(lengths)
        options = {"cu_seqlens": cu_seqlens, "return_state": True}
        with torch.no_grad():
            assert_all_same(call(x, **options), module(x, **options))
    assert counter.frame_count == 2


def test_module_in_a_model() -> None:
    """Row 5: two layers with a norm and residuals around them, compiled as one graph."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                LightningAttention(20, 3, 8, layer_idx=i, num_layers=2) for i in range(2)
            )
            self.norm = GatedRMSNorm(20)

        def forward(self, x: Tensor) -> Tensor:
            for attention in self.layers:
                x = x + attention(x)
            return self.norm(x, -x)

    torch.manual_seed(0)
    model = Model()
    call, _ = compiled(model)
    x = normal(2, 30, 20).requires_grad_()
    leaves = [x, *model.parameters()]
    a, b = call(x), model(x)
    assert_all_same(a, b)
    gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in (a, b)]
    assert_all_same(*gradients)


def test_autocast() -> None:
    """Rows 5, 20: autocast inside and around compiled code."""
    x = make_inputs(B=2, T=20, H=3, K=16, V=24)
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.initial_state)]
    args = *leaves[:3], x.decay, leaves[3]

    def inside(*args: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attend(*args)

    for function in (inside, attend):
        call, _ = compiled(function)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual, expected = call(*args), function(*args)
        assert actual[0].dtype == torch.bfloat16 and actual[1].dtype == torch.float32
        assert_all_same(actual, expected)
        gradients = [
            torch.autograd.grad((o.float().sum(), state.sum()), leaves) for o, state in (actual, expected)
        ]
        assert_all_same(*gradients)


def test_one_tensor_for_several_arguments() -> None:
    """Row 5: q, k and v may be one tensor, and a norm may gate itself; the gradients add up, in an order of
    torch's."""

    def tied(x: Tensor, rates: Tensor) -> Tensor:
        return lightning_attention(x, x, x, rates)

    def self_gated(x: Tensor, rates: Tensor) -> Tensor:
        return gated_rms_norm(x, x, rates)

    for function, shape in ((tied, (2, 20, 3, 8)), (self_gated, (2, 20, 3))):
        x = normal(*shape, dtype=torch.float64).requires_grad_()
        call, _ = compiled(function)
        actual, expected = call(x, decay.alibi(3)), function(x, decay.alibi(3))
        assert_all_same(actual, expected)
        a, b = (torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected))
        assert b.any() and (a - b).abs().max() <= 1e-14 * b.abs().max()


def test_named_backend(backend: str) -> None:
    """Row 5: a named backend is the one that runs in compiled code, for any length; gradients too."""

    def loss(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, initial: Tensor) -> Tensor:
        o, state = lightning_attention(
            q, k, v, rates, initial_state=initial, return_state=True, backend=backend
        )
        return o.square().sum() + state.sin().sum()

    call, counter = compiled(loss)
    for T in TOKENS[:3]:
        x = make_inputs(B=2, T=T, H=3, K=16, V=24).to(device_of(backend))
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v, x.initial_state)]
        args = *leaves[:3], x.decay, leaves[3]
        assert_all_same(torch.autograd.grad(call(*args), leaves), torch.autograd.grad(loss(*args), leaves))
    assert counter.frame_count == 2


@pytest.mark.op("attention_decode")
def test_decode_on_a_named_backend(backend: str) -> None:
    """Row 5: compiled code updates the state in place, slots vary, -1 is padding."""

    def step(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor, slots: Tensor) -> Tensor:
        return 2 * lightning_attention_decode(q, k, v, rates, state, slots=slots, backend=backend)

    call, counter = compiled(step)
    device = device_of(backend)
    rates, states = decay.alibi(3).to(device), [normal(5, 3, 8, 4).to(device) for _ in range(2)]
    for seed, slots in enumerate(([4, 0, 1], [1, -1, 3], [-1, -1, 2])):
        q, k, v = (normal(3, 1, 3, d, seed=10 * seed + d).to(device) for d in (8, 8, 4))
        rows, old = torch.tensor(slots, device=device), states[0].clone()
        assert_all_same(call(q, k, v, rates, states[0], rows), step(q, k, v, rates, states[1], rows))
        assert_same_bits(*states, "state")
        assert not torch.equal(states[0], old)
    assert counter.frame_count == 1


BAD_VALUES: Sequence[tuple[str, dict[str, Tensor], str]] = [
    ("negative decay", {"decay": torch.tensor([0.1, -0.1, 0.2])}, "decay"),
    ("infinite decay", {"decay": torch.tensor([0.1, float("inf"), 0.2])}, "decay"),
    ("NaN decay", {"decay": torch.tensor([float("nan"), 0.1, 0.2])}, "decay"),
    ("decreasing", {"cu_seqlens": torch.tensor([0, 6, 4, 9])}, "cu_seqlens"),
    ("late start", {"cu_seqlens": torch.tensor([1, 4, 6, 9])}, "cu_seqlens"),
    ("early end", {"cu_seqlens": torch.tensor([0, 4, 6, 8])}, "cu_seqlens"),
    ("beyond the end", {"cu_seqlens": torch.tensor([0, 4, 6, 10])}, "cu_seqlens"),
]


@pytest.mark.parametrize("case, bad, name", BAD_VALUES, ids=[case for case, *_ in BAD_VALUES])
def test_bad_values_raise(case: str, bad: dict[str, Tensor], name: str) -> None:
    """Rows 5, 13: what eager code rejects when it reads a tensor, compiled code rejects too, and goes on
    working."""
    x = make_inputs(H=3, K=16, V=24, lengths=(4, 2, 3))
    good = {"decay": x.decay, "cu_seqlens": x.cu_seqlens.long()}

    def function(decay: Tensor, cu_seqlens: Tensor) -> Any:
        return attend(x.q, x.k, x.v, decay, x.initial_state, cu_seqlens)

    call, counter = compiled(function)
    call(**good)
    with pytest.raises(ValueError, match=f"lightning_attention: expected {name} .*got"):
        call(**{**good, **bad})
    assert_all_same(call(**good), function(**good))
    assert counter.frame_count == 1


@pytest.mark.parametrize("slots", [[0, 1, 1], [3, 0, 1], [-2, 0, 1]], ids=["duplicate", "beyond", "below -1"])
def test_bad_slots_raise(slots: list[int]) -> None:
    """Rows 5, 17: and the state is untouched."""

    def step(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor, slots: Tensor) -> Tensor:
        return lightning_attention_decode(q, k, v, rates, state, slots=slots)

    call, _ = compiled(step)
    q, k, v = (normal(3, 1, 2, d) for d in (8, 8, 4))
    state = normal(3, 2, 8, 4)
    before = state.clone()
    with pytest.raises(ValueError, match="lightning_attention_decode: expected slots .*got"):
        call(q, k, v, decay.alibi(2), state, torch.tensor(slots))
    assert_same_bits(state, before, "state")


def test_bad_shapes_raise() -> None:
    """Row 5: compiled without fullgraph, a wrong argument is the same error as in eager code; with it, one of
    dynamo's that says so."""
    x = make_inputs(B=2, T=20, H=3, K=16, V=24)
    args = x.q, x.k, x.v, x.decay[:2], x.initial_state
    with pytest.raises(ValueError, match="expected decay of shape") as eager:
        attend(*args)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="expected decay of shape"):
        compiled(attend)[0](*args)
    torch._dynamo.reset()
    with pytest.raises(ValueError) as graph_broken:
        torch.compile(attend, backend="aot_eager")(*args)
    assert str(graph_broken.value) == str(eager.value)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    """Row 5: a real compiler around the operators, which may lay out what it hands to them as it likes. All
    that is fused with them is exact (powers of two, copies), so the results are equal bit by bit."""

    def function(qkv: Tensor, rates: Tensor, initial: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (2 * qkv).transpose(1, 2).split(8, dim=-1)
        o, end = lightning_attention(
            q.flip(-1), k, v, rates, scale=0.5, initial_state=-initial, return_state=True
        )
        step = lightning_attention_decode(
            q[:, -1:].detach(), k[:, -1:].detach(), v[:, -1:].detach(), rates, state
        )
        return o.transpose(1, 2) / 4, end.mT * 2, step.neg()

    call = torch.compile(function, fullgraph=True, backend="inductor", dynamic=True)
    rates = decay.alibi(3)
    for T in (33, 70):
        states = [normal(2, 3, 8, 8, seed=9) for _ in range(2)]
        leaves = [normal(2, 3, T, 24, seed=T).requires_grad_(), normal(2, 3, 8, 8).requires_grad_()]
        results = [f(leaves[0], rates, leaves[1], s) for f, s in zip((call, function), states, strict=True)]
        assert_all_same(*results)
        assert_same_bits(*states, "state")
        gradients = [torch.autograd.grad((o.exp2().sum(), end.sin().sum()), leaves) for o, end, _ in results]
        assert_all_same(*gradients)
