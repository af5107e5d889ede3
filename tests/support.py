"""What the tests share: inputs, the float64 truth, the baseline in the inputs' dtype, and the rule that compares them.

The rule: an error, the largest difference from the truth over the largest truth, in the worst head, is at most twice
that of plain PyTorch in the same dtype, plus the epsilon of the output's dtype. There is no other tolerance.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_attn import available_backends, gated_rms_norm, lightning_attention
from lightning_attn.backends import reference, supports
from lightning_attn.dispatch import BACKENDS as KNOWN
from lightning_attn.dispatch import Spec, accumulation_dtype

T = TypeVar("T")

BACKENDS = [name for name, status in available_backends().items() if status == "ok"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]
GPU_BACKENDS = ("triton", "cuda")  # made for GPUs, whatever they run on here
RATES = (0.03, 0.0, 2.0, 0.4, 30.0)  # of the heads of a test, in turn


def device_of(backend: str) -> str:
    """Where the tensors of a backend's tests live."""
    return "cuda" if backend in GPU_BACKENDS and torch.cuda.is_available() else "cpu"


# Backends on CPU tensors: all, those that are made for them, and those that an interpreter or an emulator runs on them.
HERE = [name for name in BACKENDS if device_of(name) == "cpu"]
ON_CPU = [name for name in HERE if name not in GPU_BACKENDS]
INTERPRETED = [name for name in HERE if name in GPU_BACKENDS]
COMPILED = [name for name in BACKENDS if name not in INTERPRETED]
# Those that a process without these has not.
ABSENT = [name for name in KNOWN if name not in COMPILED]

if "triton" in INTERPRETED:
    import interpreter

    interpreter.quicken()


def affordable(backend: str, usual: T, interpreted: T) -> T:
    """A size or a number of times; interpreted, which takes milliseconds for a row and head, another one."""
    return interpreted if backend in INTERPRETED else usual


def plain_environment() -> dict[str, str]:
    """The environment of a process that interprets and emulates nothing."""
    pretences = ("TRITON_INTERPRET", "LIGHTNING_ATTN_EMULATE_CUDA")
    return {name: value for name, value in os.environ.items() if name not in pretences}


@functools.cache
def dtypes_of(backend: str, op: str = "attention_forward") -> list[torch.dtype]:
    """The dtypes in which a backend says it takes a raw function; none, if it has no such function."""

    def spec(dtype: torch.dtype) -> Spec:
        return Spec(op, device_of(backend), dtype, accumulation_dtype(dtype), 16, 16)

    return [dtype for dtype in DTYPES if not supports(backend, spec(dtype))]


def dtype_id(dtype: object) -> str | None:
    """A parameter's name in the test id."""
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None


# ---- inputs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of one attention call, and the gradients that come back. Never written to."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    scale: float
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    do: Tensor
    dstate: Tensor

    def to(self, device: str) -> "Inputs":
        tensors = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)

    def double(self) -> "Inputs":
        floats = {
            n: x.double() for n, x in vars(self).items() if isinstance(x, Tensor) and x.is_floating_point()
        }
        return replace(self, **{**floats, "decay": self.decay})


def offsets(lengths: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
    """cu_seqlens of documents of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@functools.lru_cache(maxsize=512)
def make_inputs(
    B: int = 2,
    T: int = 65,
    H: int = 3,
    K: int = 16,
    V: int = 24,
    dtype: torch.dtype = torch.float32,
    *,
    lengths: tuple[int, ...] | None = None,  # of packed documents; then B = 1 and T is their sum
    state: bool = True,
    scale: float = 0.7,
    rates: tuple[float, ...] = RATES,
    seed: int = 0,
) -> Inputs:
    """Normal inputs, equal for equal arguments."""
    random = torch.Generator().manual_seed(seed)
    N = B
    if lengths is not None:
        B, T, N = 1, sum(lengths), len(lengths)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    q, k, v, do = (normal(B, T, H, D, dtype=dtype) for D in (K, K, V, V))
    initial, dstate = (normal(N, H, K, V, dtype=accumulation_dtype(dtype)) for _ in range(2))
    decay = torch.tensor([rates[h % len(rates)] for h in range(H)])
    cu_seqlens = None if lengths is None else offsets(lengths)
    return Inputs(q, k, v, decay, scale, initial if state else None, cu_seqlens, do, dstate)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """This many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- results --------------------------------------------------------------------------------------------------

Result = dict[str, Tensor]  # o, state, dq, dk, dv and, with an initial state, dinitial_state
HEAD_DIM = {"o": 2, "dq": 2, "dk": 2, "dv": 2, "state": 1, "dinitial_state": 1}


def differentiate(form: Callable[..., tuple[Tensor, Tensor]], x: Inputs) -> Result:
    """The outputs of form(q, k, v, decay, ...) -> (o, state), and the gradients of <o, do> + <state, dstate>."""
    leaves = {
        n: t.detach().requires_grad_()
        for n, t in vars(x).items()
        if n in ("q", "k", "v", "initial_state") and t is not None
    }
    q, k, v, initial = (leaves.get(n) for n in ("q", "k", "v", "initial_state"))
    o, state = form(q, k, v, x.decay, scale=x.scale, initial_state=initial, cu_seqlens=x.cu_seqlens)
    grads = torch.autograd.grad((o, state), list(leaves.values()), (x.do, x.dstate))
    return {
        "o": o.detach(),
        "state": state.detach(),
        **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)},
    }


@functools.lru_cache(maxsize=512)
def truth(x: Inputs) -> Result:
    """The recurrence in float64 on the rounded inputs, with its gradients.

    Where that is slow, the block form in float64 with blocks of 16, which agrees with it to 1e-12 (tested).
    """
    work = x.q.shape[1] * x.q.shape[3] * x.v.shape[3]
    blocks = functools.partial(reference.block_form, block_size=16)
    with threads(1):
        return differentiate(reference.recurrence if work < 2**18 else blocks, x.double())


@functools.lru_cache(maxsize=512)
def baseline(x: Inputs) -> Result:
    """Plain PyTorch in the inputs' dtype: eager blocks of 256, with autograd's gradients."""
    with threads(1):
        return differentiate(reference.block_form, x)


def run(x: Inputs, backend: str) -> Result:
    """The public function on one backend, with its gradients, on the CPU again."""
    form = functools.partial(lightning_attention, return_state=True, backend=backend)
    # PyTorch's own operators on small tensors are faster on one thread.
    with threads(1 if backend == "reference" else torch.get_num_threads()):
        return {name: y.cpu() for name, y in differentiate(form, x.to(device_of(backend))).items()}


# ---- the rule -------------------------------------------------------------------------------------------------


def error(actual: Tensor, expected: Tensor, head_dim: int | None = None) -> float:
    """The largest difference over the largest expected magnitude, in the worst head; infinite if not finite."""
    if actual.numel() == 0:
        return 0.0
    others = [d for d in range(actual.dim()) if d != head_dim]
    largest = expected.double().abs().amax(others)
    difference = (actual.double() - expected.double()).abs().amax(others)
    relative = difference / torch.where(largest > 0, largest, 1.0)
    return relative.nan_to_num(nan=math.inf).max().item()


def assert_close_to_truth(
    actual: Tensor,
    expected: Tensor,
    plain: Tensor,
    dtype: torch.dtype | None = None,
    name: str = "output",
    head_dim: int | None = None,
) -> None:
    """The error of `actual` is at most twice that of `plain` plus epsilon.

    `dtype` is the dtype it must have (None: that of `plain`). With `head_dim` each head is measured by its own truth:
    a head that decays fast is not hidden by one that sums up.
    """
    assert actual.dtype == (plain.dtype if dtype is None else dtype), f"{name} has dtype {actual.dtype}"
    assert actual.shape == expected.shape, f"{name}: {list(actual.shape)}, not {list(expected.shape)}"
    found = error(actual, expected, head_dim)
    allowed = 2 * error(plain, expected, head_dim) + torch.finfo(actual.dtype).eps
    assert found <= allowed, (
        f"{name} has an error of {found:.3g}, more than the {allowed:.3g} that are allowed"
    )


def assert_result(actual: Result, expected: Result, plain: Result) -> None:
    """The rule for every output and gradient."""
    assert actual.keys() == expected.keys()
    for name, y in actual.items():
        assert_close_to_truth(y, expected[name], plain[name], name=name, head_dim=HEAD_DIM[name])


def check(actual: Result, x: Inputs) -> None:
    """The rule for a result of the attention on these inputs."""
    assert_result(actual, truth(x), baseline(x))


def assert_same_bits(actual: Tensor, expected: Tensor, name: str = "output") -> None:
    """Equal bit by bit, NaN payloads and signs of zero included."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    a, b = (x.detach().cpu() for x in (actual, expected))
    a, b = (x.contiguous().view(torch.uint8) if x.dim() else x for x in (a, b))
    assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} bytes differ"


# ---- the gated norm -------------------------------------------------------------------------------------------


def norm_truth(x: Tensor, gate: Tensor, weight: Tensor, dy: Tensor, *, eps: float) -> Result:
    """y = n * weight * g, n = x / sqrt(mean(x^2) + eps), g = sigmoid(gate), and the gradients, rounded to float64.

    In float64, or in 28 decimal digits where float64 is what is tested.
    """
    exact = x.dtype == torch.float64
    x_, gate_, weight_, dy_ = (t.double().numpy() for t in (x, gate, weight, dy))
    exp, sqrt, number = np.exp, np.sqrt, float
    if exact:
        x_, gate_, weight_, dy_ = (
            np.vectorize(Decimal, otypes=[object])(t) for t in (x_, gate_, weight_, dy_)
        )
        exp, sqrt = np.frompyfunc(Decimal.exp, 1, 1), np.frompyfunc(Decimal.sqrt, 1, 1)
        number = Decimal
    D = number(x.shape[-1])
    r = number(1) / sqrt((x_ * x_).sum(-1, keepdims=True) / D + number(eps))
    n, g = x_ * r, number(1) / (number(1) + exp(-gate_))
    e = dy_ * weight_ * g  # the gradient of n
    results = {
        "y": n * weight_ * g,
        "dx": r * (e - n * (e * n).sum(-1, keepdims=True) / D),
        "dgate": e * n * (number(1) - g),
        "dweight": (dy_ * n * g).reshape(-1, x.shape[-1]).sum(0),
    }
    return {name: torch.from_numpy(np.asarray(y).astype(np.float64)) for name, y in results.items()}


def plain_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps) * gate.sigmoid()


def make_norm_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """x, gate, weight and the gradient of y."""
    random = torch.Generator().manual_seed(0)
    x, gate, dy = (torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(3))
    weight = 1 + torch.randn(shape[-1], generator=random, dtype=torch.float64)
    return [x.to(dtype), (3 * gate).to(dtype), weight.to(weight_dtype or dtype), dy.to(dtype)]


def differentiate_norm(form: Callable[..., Tensor], tensors: Sequence[Tensor], eps: float) -> Result:
    """y of form(x, gate, weight, eps=eps) and the gradients of <y, dy>, on the CPU."""
    leaves = [t.detach().requires_grad_() for t in tensors[:3]]
    y = form(*leaves, eps=eps)
    grads = torch.autograd.grad(y, leaves, tensors[3])
    return dict(zip(("y", "dx", "dgate", "dweight"), (t.detach().cpu() for t in (y, *grads)), strict=True))


def run_norm(tensors: Sequence[Tensor], eps: float, backend: str) -> Result:
    """gated_rms_norm on one backend, with its gradients."""
    on_device = [t.to(device_of(backend)) for t in tensors]
    return differentiate_norm(functools.partial(gated_rms_norm, backend=backend), on_device, eps)


def check_norm(actual: Result, tensors: Sequence[Tensor], eps: float) -> None:
    """The rule for a result of the gated norm on these inputs."""
    expected = norm_truth(*tensors, eps=eps)
    plain = differentiate_norm(plain_norm, tensors, eps)
    for name, y in actual.items():
        assert_close_to_truth(y, expected[name], plain[name], name=name)


# ---- memory ---------------------------------------------------------------------------------------------------


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that PyTorch hands out uninitialised holds NaN (integers: their largest value) inside."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            assert torch.empty(3, device=device).isnan().all()
            assert torch.ones(2, device=device).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _storage_order(*order: int) -> Callable[[Tensor], Tensor]:
    """The dimensions stored in this order, outermost first."""

    def layout(x: Tensor) -> Tensor:
        inverse = [order.index(d) for d in range(len(order))]
        return x.permute(order).contiguous().permute(inverse)

    return layout


def _inside(*margins: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """A slice of a larger tensor of NaN: so many elements before and after in each of the last dimensions."""

    def layout(x: Tensor) -> Tensor:
        pad = [(0, 0)] * (x.dim() - len(margins)) + list(margins)
        larger = x.new_full([n + a + b for n, (a, b) in zip(x.shape, pad, strict=True)], float("nan"))
        view = larger[tuple(slice(a, a + n) for n, (a, _) in zip(x.shape, pad, strict=True))]
        return view.copy_(x)

    return layout


def _every_other(dim: int) -> Callable[[Tensor], Tensor]:
    """Every other element along `dim` of a tensor of NaN."""

    def layout(x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[dim] *= 2
        steps = [slice(None)] * x.dim()
        steps[dim] = slice(None, None, 2)
        return x.new_full(shape, float("nan"))[tuple(steps)].copy_(x)

    return layout


# Of a 4-dimensional operand: equal values, other strides.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads_before_tokens": _storage_order(0, 2, 1, 3),
    "tokens_first": _storage_order(1, 0, 2, 3),
    "last_dim_outermost": _storage_order(3, 0, 1, 2),
    "slice_at_odd_offset": _inside((1, 2)),
    "slice_of_tokens_and_heads": _inside((3, 1), (1, 1), (0, 0)),
    "every_other_token": _every_other(1),
    "every_other_head": _every_other(2),
    "every_other_element": _every_other(3),
}
