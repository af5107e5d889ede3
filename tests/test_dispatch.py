"""Which backend runs a call: what "auto" takes, what a name means, and what is said when a call cannot
run."""

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import BACKENDS, HERE, assert_same_bits, device_of, make_inputs, plain_environment
from torch import Tensor

import lightning_attn
from lightning_attn import (
    GatedRMSNorm,
    LightningAttention,
    available_backends,
    backends,
    gated_rms_norm,
    lightning_attention,
    lightning_attention_decode,
    ops,
)
from lightning_attn.dispatch import BACKENDS as KNOWN
from lightning_attn.dispatch import Spec, resolve

RAW = [
    "attention_forward",
    "attention_backward",
    "attention_state",
    "attention_history",
    "attention_decode",
    "gated_rms_norm_forward",
    "gated_rms_norm_backward",
]
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend was not built")


def attend(backend: str, K: int = 16, V: int = 16) -> Tensor:
    x = make_inputs(B=2, T=5, H=2, K=K, V=V)
    return lightning_attention(x.q, x.k, x.v, x.decay, initial_state=x.initial_state, backend=backend)


def train(backend: str, K: int = 16, V: int = 16) -> Tensor:
    x = make_inputs(B=2, T=5, H=2, K=K, V=V)
    q = x.q.clone().requires_grad_()
    o = lightning_attention(q, x.k, x.v, x.decay, initial_state=x.initial_state, backend=backend)
    return torch.autograd.grad(o, q, x.do)[0]


def decode(backend: str, K: int = 16, V: int = 16) -> Tensor:
    x = make_inputs(B=2, T=5, H=2, K=K, V=V)
    return lightning_attention_decode(x.q, x.k, x.v, x.decay, x.initial_state.clone(), backend=backend)


def state_alone(backend: str, K: int = 16, V: int = 16) -> Tensor:
    x = make_inputs(B=2, T=5, H=2, K=K, V=V)
    return ops.attention_state(x.k, x.v, x.decay, 1.0, x.initial_state, False, backend)


def history(backend: str, K: int = 16, V: int = 16) -> Tensor:
    x = make_inputs(B=2, T=5, H=2, K=K, V=V)
    out = x.v.clone()
    ops.attention_history(x.q, x.initial_state, x.decay, 1.0, False, out, backend)
    return out


def norm(backend: str, K: int = 16, V: int = 16) -> Tensor:
    x = torch.linspace(-1, 1, 3 * K).reshape(3, K)
    return gated_rms_norm(x, x.flip(0), torch.ones(K), backend=backend)


def train_norm(backend: str, K: int = 16, V: int = 16) -> Tensor:
    x = torch.linspace(-1, 1, 3 * K).reshape(3, K).requires_grad_()
    y = gated_rms_norm(x, x.detach().flip(0), torch.ones(K), backend=backend)
    return torch.autograd.grad(y, x, torch.ones_like(y))[0]


def module(backend: str) -> Tensor:
    torch.manual_seed(0)
    layer = LightningAttention(12, 2, 4, layer_idx=0, num_layers=2)
    x = torch.randn(2, 5, 12)
    y = layer(x, backend=backend)
    return torch.autograd.grad(y, list(layer.parameters()), torch.ones_like(y))[0]


CALLS: dict[Callable[..., Tensor], set[str]] = {
    attend: {"attention_forward"},
    train: {"attention_forward", "attention_backward"},
    decode: {"attention_decode"},
    state_alone: {"attention_state"},
    history: {"attention_history"},
    norm: {"gated_rms_norm_forward"},
    train_norm: {"gated_rms_norm_forward", "gated_rms_norm_backward"},
    module: {*RAW} - {"attention_decode", "attention_state", "attention_history"},
}
calls = pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
Log = list[tuple[str, str]]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """The raw functions that run, as (backend, function)."""
    seen: Log = []

    def recorded(backend: str, name: str, function: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> object:
            seen.append((backend, name))
            return function(*args, **kwargs)

        return call

    for backend in BACKENDS:
        loaded = backends.load(backend)
        for name in (name for name in RAW if hasattr(loaded, name)):
            monkeypatch.setattr(loaded, name, recorded(backend, name, getattr(loaded, name)))
    return seen


# ---- what runs --------------------------------------------------------------------------------------------


@calls
@pytest.mark.parametrize("backend", HERE)
def test_a_named_backend_runs(call: Callable[..., Tensor], backend: str, log: Log) -> None:
    """Each of its raw functions, and none of any other's."""
    call(backend)
    assert set(log) == {(backend, name) for name in CALLS[call]}


@needs_cpu
@calls
def test_auto_takes_the_kernels(call: Callable[..., Tensor], log: Log) -> None:
    """On CPU tensors "auto" is the cpu backend, and it is the default."""
    call("auto")
    assert set(log) == {("cpu", name) for name in CALLS[call]}
    log.clear()
    x = make_inputs(B=2, T=5, H=2)
    lightning_attention(x.q, x.k, x.v, x.decay)
    lightning_attention_decode(x.q, x.k, x.v, x.decay, x.initial_state.clone())
    gated_rms_norm(x.q, x.q, torch.ones(16))
    GatedRMSNorm(16)(x.q, x.q)
    assert log and {backend for backend, _ in log} == {"cpu"}


@needs_cpu
@calls
def test_environment(call: Callable[..., Tensor], log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """LIGHTNING_ATTN_BACKEND says what "auto" means, read at each call; a named backend does not care."""
    for value, expected in (("reference", "reference"), ("cpu", "cpu"), ("auto", "cpu"), ("", "cpu")):
        monkeypatch.setenv("LIGHTNING_ATTN_BACKEND", value)
        log.clear()
        call("auto")
        assert set(log) == {(expected, name) for name in CALLS[call]}
        log.clear()
        call("cpu")
        assert {backend for backend, _ in log} == {"cpu"}


@needs_cpu
def test_environment_of_compiled_code(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code chooses when it runs, as eager code does."""
    x = make_inputs(B=2, T=5, H=2)
    compiled = torch.compile(lightning_attention, fullgraph=True, backend="eager")
    for value in ("reference", "cpu", "reference"):
        monkeypatch.setenv("LIGHTNING_ATTN_BACKEND", value)
        log.clear()
        compiled(x.q, x.k, x.v, x.decay)
        assert {backend for backend, _ in log} == {value}


@needs_cpu
@pytest.mark.parametrize("K, V", [(257, 16), (16, 257), (300, 300)])
@pytest.mark.parametrize("call", [attend, train, decode], ids=lambda f: f.__name__)
def test_large_heads(call: Callable[..., Tensor], K: int, V: int, log: Log) -> None:
    """Row 24: beyond 256 "auto" takes the reference; "cpu" does not, and says why."""
    expected = call("reference", K, V)
    log.clear()
    assert_same_bits(call("auto", K, V), expected)
    assert {backend for backend, _ in log} == {"reference"}
    log.clear()
    with pytest.raises(ValueError, match=rf"got 'cpu' \(cpu: .*{'K' if K > 256 else 'V'}.*256"):
        call("cpu", K, V)
    assert not log


@needs_cpu
def test_largest_heads(log: Log) -> None:
    """Rows 12, 24: 256 is not beyond."""
    for call in (attend, train, decode):
        call("auto", 256, 256)
    norm("auto", 5000)  # a norm has no heads
    assert {backend for backend, _ in log} == {"cpu"}


@needs_cpu
def test_large_heads_where_auto_means_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 24: who says "cpu" in the environment has named it."""
    monkeypatch.setenv("LIGHTNING_ATTN_BACKEND", "cpu")
    with pytest.raises(ValueError, match="got 'cpu'.*256"):
        attend("auto", K=257)


# ---- what is said -----------------------------------------------------------------------------------------


@calls
def test_unknown_backend(call: Callable[..., Tensor], log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """The known names are listed; nothing runs."""
    for bad in ("nonsense", "CPU", "", "cpu "):
        with pytest.raises(ValueError, match="expected backend to be one of .*, got ") as raised:
            call(bad)
        assert repr(bad) in str(raised.value)
        assert all(name in str(raised.value) for name in ("auto", *KNOWN))
    monkeypatch.setenv("LIGHTNING_ATTN_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="expected backend to be one of .*, got 'nonsense'"):
        call("auto")
    assert not log


@pytest.mark.parametrize(
    "call", [call for call in CALLS if call not in (state_alone, history)], ids=lambda f: f.__name__
)  # of operators the types are PyTorch's to check
@pytest.mark.parametrize("bad", [None, 0, ["cpu"], torch.device("cpu")], ids=repr)
def test_backend_of_another_type(call: Callable[..., Tensor], bad: object) -> None:
    with pytest.raises(TypeError, match=f"expected backend to be a str, got {type(bad).__name__}"):
        call(bad)


@calls
def test_absent_backend(
    call: Callable[..., Tensor], log: Log, absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that is not there raises with the reason that available_backends() gives; nothing else runs
    instead."""
    reason = available_backends()[absent]
    assert reason != "ok"
    with pytest.raises(ValueError) as raised:
        call(absent)
    assert f"got {absent!r}" in str(raised.value) and reason in str(raised.value)
    monkeypatch.setenv("LIGHTNING_ATTN_BACKEND", absent)
    with pytest.raises(ValueError, match=f"got {absent!r}"):
        call("auto")
    assert not log


def test_state_is_untouched(absent: str) -> None:
    """Row 17: by a decode that cannot run."""
    for name in (absent, "nonsense"):
        assert_decode_leaves_the_state(name)


def assert_decode_leaves_the_state(name: str) -> None:
    x = make_inputs(B=2, T=1, H=2)
    state = x.initial_state.clone()
    with pytest.raises(ValueError, match=f"^lightning_attention_decode: .*got '{name}'"):
        lightning_attention_decode(x.q, x.k, x.v, x.decay, state, backend=name)
    assert_same_bits(state, x.initial_state)


def test_available_backends() -> None:
    """All four are named, each with "ok" or a reason; the reference is always there; the caller gets a dict
    of his own."""
    found = available_backends()
    assert list(found) == ["reference", "cpu", "triton", "cuda"] == list(KNOWN)
    assert all(isinstance(reason, str) and reason for reason in found.values())
    assert found["reference"] == "ok"
    found.clear()
    assert available_backends()


@pytest.mark.parametrize("name", BACKENDS)
def test_available_backends_tells_the_truth(name: str) -> None:
    """ "ok" is what runs, on the device it is for: decode at least."""
    x = make_inputs(B=2, T=5, H=2).to(device_of(name))
    o = lightning_attention_decode(x.q, x.k, x.v, x.decay, x.initial_state.clone(), backend=name)
    assert o.isfinite().all() and o.device.type == device_of(name)


def test_available_backends_tells_the_truth_of_what_is_absent(absent: str) -> None:
    """A reason is why it does not run."""
    x = make_inputs(B=2, T=5, H=2)
    with pytest.raises(ValueError, match="expected a backend that can run it"):
        lightning_attention(x.q, x.k, x.v, x.decay, backend=absent)


WITHOUT_EXTENSION = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "lightning_attn._C":
            raise ImportError("the extension was not built")
sys.meta_path.insert(0, Broken())
import torch, lightning_attn
status = lightning_attn.available_backends()
assert status["reference"] == "ok" and "the extension was not built" in status["cpu"], status
x = torch.randn(2, 70, 3, 8, requires_grad=True)
decay = lightning_attn.decay.alibi(3)
o = lightning_attn.lightning_attention(x, x, x, decay)
assert torch.equal(o, lightning_attn.lightning_attention(x, x, x, decay, backend="reference"))
o.sum().backward()
assert x.grad.isfinite().all()
try:
    lightning_attn.lightning_attention(x, x, x, decay, backend="cpu")
except ValueError as error:
    assert "got 'cpu'" in str(error) and "the extension was not built" in str(error), error
else:
    raise AssertionError("cpu ran without its extension")
"""


def test_without_the_extension() -> None:
    """Row 25: a package whose extension does not load says so, computes with the reference, and fails for
    "cpu"."""
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
        cwd=Path(lightning_attn.__file__).resolve().parent.parent,
        env=plain_environment(),
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("name", BACKENDS)
def test_raw_interface(name: str) -> None:
    """Every backend that loads exports the functions that it says it supports, and no backend but "cuda" lacks one."""
    loaded = backends.load(name)
    exported = {function for function in RAW if callable(getattr(loaded, function, None))}
    assert exported == ({"attention_decode"} if name == "cuda" else set(RAW))
    specs = {op: Spec(op, device_of(name), torch.float32, torch.float32, 16, 16) for op in RAW}
    assert exported == {op for op, spec in specs.items() if not loaded.supports(spec)}


def test_absent_backend_does_not_load(absent: str) -> None:
    with pytest.raises(ImportError):
        backends.load(absent)


# ---- resolve, on plain data -------------------------------------------------------------------------------

SPEC = Spec("attention_forward", "cpu", torch.float32, torch.float32, 16, 16)


def refusing(*names: str) -> Callable[[str, Spec], list[str]]:
    return lambda name, spec: [f"{name} is tired", "so it is"] if name in names else []


@pytest.mark.parametrize(
    "device, refused, chosen",
    [
        ("cpu", (), "cpu"),
        ("cpu", ("cpu",), "reference"),
        ("cuda", (), "cuda"),
        ("cuda", ("cuda",), "triton"),
        ("cuda", ("cuda", "triton"), "reference"),
        ("xpu", (), "reference"),
    ],
)
def test_resolve_auto(device: str, refused: tuple[str, ...], chosen: str) -> None:
    """The best backend of a device, then the next, then the reference."""
    assert resolve("auto", replace(SPEC, device=device), refusing(*refused)) == chosen


def test_resolve_named() -> None:
    """The name or an error, whatever else could run; every reason is in the error."""
    for name in KNOWN:
        assert resolve(name, SPEC, refusing(*set(KNOWN) - {name})) == name
        with pytest.raises(ValueError, match=rf"got '{name}' \({name}: {name} is tired, so it is\)"):
            resolve(name, SPEC, refusing(name))
    with pytest.raises(
        ValueError, match=r"cuda: cuda is tired.*triton: triton is tired.*reference: reference is"
    ):
        resolve("auto", replace(SPEC, device="cuda"), refusing(*KNOWN))


def test_resolve_asks_no_more_than_it_must() -> None:
    """A backend behind the one that is chosen is not asked, so it is not imported either."""
    asked = []

    def supports(name: str, spec: Spec) -> list[str]:
        asked.append(name)
        return []

    resolve("auto", SPEC, supports)
    resolve("reference", SPEC, supports)
    assert asked == ["cpu", "reference"]
