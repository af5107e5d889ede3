"""What an import does and does not do, seen from fresh processes; threads, forks, and the public names."""

import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from support import plain_environment

import lightning_attn

ROOT = Path(__file__).resolve().parent.parent
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def python(code: str, *arguments: str, timeout: float = 120, **environment: str) -> str:
    """What `code` prints in a fresh interpreter, which must end well and in time."""
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        check=False,
        text=True,
        timeout=timeout,
        cwd=Path(lightning_attn.__file__).resolve().parent.parent,
        env={**plain_environment(), **environment},
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def needs_cpu_backend() -> None:
    if (reason := lightning_attn.available_backends()["cpu"]) != "ok":
        pytest.skip(f"cpu: {reason}")


def loads_more_than(first: str, then: str) -> set[str]:
    """The modules that `then` loads after `first` has run."""
    code = f"import sys\n{first}\nbefore = set(sys.modules)\n{then}\nprint(*set(sys.modules) - before)"
    return set(python(code).split())


def test_import_loads_no_kernel() -> None:
    """Row 25: `import lightning_attn` loads no kernel, no backend, nothing that only some users have or
    want."""
    loaded = loads_more_than("import torch", "import lightning_attn")
    assert "lightning_attn" in loaded
    kernels = ("lightning_attn._C", "lightning_attn.backends.", "lightning_attn.cli")
    assert not [name for name in loaded if name.startswith(kernels)]
    tops = {name.partition(".")[0] for name in loaded}
    assert not tops & {"triton", "cupy", "transformers", "matplotlib", "click", "rich", "pybind11"}
    assert tops - sys.stdlib_module_names <= {"lightning_attn", "torch"}


def test_a_call_loads_one_backend() -> None:
    """Row 25: the first call loads the backend that it needs and no other."""
    call = """
x = torch.ones(1, 2, 1, 4)
lightning_attn.lightning_attention(x, x, x, lightning_attn.decay.alibi(1), backend={!r})
"""
    first = "import torch, lightning_attn"
    for name, other in (("reference", "cpu"), ("cpu", "reference")):
        if lightning_attn.available_backends()[name] != "ok":
            continue
        loaded = loads_more_than(first, call.format(name))
        assert f"lightning_attn.backends.{name}" in loaded
        assert f"lightning_attn.backends.{other}" not in loaded
        assert ("lightning_attn._C" in loaded) == (name == "cpu")
        assert not {"triton", "cupy"} & loaded


NO_CUDA = """
import torch
asked = []
for name in ("is_available", "device_count", "_lazy_init", "init", "current_device"):
    def spy(*args, name=name, old=getattr(torch.cuda, name)):
        asked.append(name)
        return old(*args)
    setattr(torch.cuda, name, spy)
import lightning_attn
assert not asked, asked
x = torch.ones(1, 2, 1, 4)
lightning_attn.lightning_attention(x, x, x, lightning_attn.decay.alibi(1))
lightning_attn.LightningAttention(4, 1, 4, layer_idx=0, num_layers=1)(x[:, :, 0])
assert not {"_lazy_init", "init", "current_device"} & set(asked), asked
assert not torch.cuda.is_initialized()
"""


def test_no_cuda() -> None:
    """Row 25: an import asks nothing of CUDA, and work on the CPU does not initialise it."""
    python(NO_CUDA)


def test_works_without_a_gpu() -> None:
    """Row 25: with every device hidden the package works and says why the GPU backends do not."""
    code = """
import torch, lightning_attn
status = lightning_attn.available_backends()
assert status["reference"] == "ok" and status["cuda"] != "ok", status
x = torch.randn(1, 100, 2, 4)
o = lightning_attn.lightning_attention(x, x, x, lightning_attn.decay.alibi(2))
assert o.isfinite().all()
"""
    python(code, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")


# The parent has worked with two threads when it forks; the child must neither wait for the one that the fork
# did not copy, nor get anything else than the parent. The sizes let the kernels share their work, and
# PyTorch's own operators not: those do hang in such a child.
FORK = """
import os, signal, sys
import numpy as np, torch, lightning_attn

torch.set_num_threads(2)
torch.manual_seed(0)
q, k, v, gate = (torch.randn(1, 256, 2, 64).requires_grad_() for _ in range(4))
one = [torch.randn(16, 1, 2, 64) for _ in range(3)]
weight, decay = torch.ones(64), lightning_attn.decay.alibi(2)

def work(states):
    o, state = lightning_attn.lightning_attention(q, k, v, decay, return_state=True, backend="cpu")
    y = lightning_attn.gated_rms_norm(o, gate, weight, backend="cpu")
    gradients = torch.autograd.grad(y, (q, k, v, gate), dy)
    step = lightning_attn.lightning_attention_decode(*one, decay, states, backend="cpu")
    return [x.detach().numpy() for x in (o, state, y, *gradients, step, states)]

dy = torch.randn(1, 256, 2, 64)
states = [torch.zeros(16, 2, 64, 64) for _ in range(3)]
expected = work(states[0])
pid = os.fork()
if pid == 0:
    signal.alarm(20)  # no child is left behind
    if sys.argv[1] == "one":
        torch.set_num_threads(1)
    actual = work(states[1])
    assert all(np.abs(a - b).max() <= 1e-5 * np.abs(b).max() for a, b in zip(actual, expected, strict=True))
    os._exit(0)
_, status = os.waitpid(pid, 0)
assert status == 0, f"the child ended with {os.waitstatus_to_exitcode(status)}"
assert all((a == b).all() for a, b in zip(work(states[2]), expected, strict=True))  # the parent goes on
"""


@needs_fork
@pytest.mark.parametrize("child_threads", ["all", "one"])
def test_fork(child_threads: str) -> None:
    """Row 25: compute in a parent, fork, and compute in the child, whatever number of threads it asks for."""
    needs_cpu_backend()
    python(FORK, child_threads, timeout=60)


@needs_fork
def test_forked_pool() -> None:
    """Row 25: a pool of forked workers, as data loaders and pre-forking servers have them, after work in the
    parent."""
    needs_cpu_backend()
    code = """
import multiprocessing, torch, lightning_attn

torch.set_num_threads(2)
x = torch.randn(1, 256, 2, 64)
decay = lightning_attn.decay.alibi(2)

def work(head):
    o = lightning_attn.lightning_attention(x, x, x, decay, backend="cpu")
    return o[0, -1, head, 0].item()

expected = [work(0), work(1)]
with multiprocessing.get_context("fork").Pool(2) as pool:
    actual = pool.map_async(work, [0, 1] * 4).get(timeout=20)
assert all(abs(a - b) <= 1e-5 * abs(b) for a, b in zip(actual, expected * 4)), (actual, expected)
"""
    python(code, timeout=60)


THREADS = """
import os, sys, time
import torch, lightning_attn

torch.manual_seed(0)
x = torch.randn(1, 8192, 4, 64)
weight = torch.ones(64)
decay = lightning_attn.decay.alibi(4)
states = torch.zeros(64, 16, 64, 64)
token = torch.randn(64, 1, 16, 64)
many = lightning_attn.decay.alibi(16)

def attention():
    lightning_attn.lightning_attention(x, x, x, decay, backend="cpu")

def backward():
    y = x.detach().requires_grad_()
    lightning_attn.lightning_attention(y, x, x, decay, backend="cpu").backward(x)

def decode():
    for _ in range(5):
        lightning_attn.lightning_attention_decode(token, token, token, many, states, backend="cpu")

def norm():
    for _ in range(5):
        lightning_attn.gated_rms_norm(x, x, weight, backend="cpu")

def others(work):
    # The share of the processor time of `work` that other threads than this one spend.
    work()
    time.sleep(0.2)  # the pool goes to sleep
    process, thread = time.process_time(), time.thread_time()
    for _ in range(3):
        work()
    process, thread = time.process_time() - process, time.thread_time() - thread
    return (process - thread) / process

for n in map(int, sys.argv[1:] or [0]):
    if n:
        torch.set_num_threads(n)
    for work in (attention, backward, decode, norm):
        print(work.__name__, n, others(work))
"""


def shares_of_other_threads(*counts: int, **environment: str) -> dict[tuple[str, int], float]:
    """By op and number of threads, in this order: see `others`."""
    lines = python(THREADS, *map(str, counts), **environment).splitlines()
    return {(op, int(n)): float(share) for op, n, share in map(str.split, lines)}


def test_thread_cap() -> None:
    """Row 25: torch.set_num_threads(1) means one thread of work, also after two have been at work; two do
    share it."""
    needs_cpu_backend()
    shares = shares_of_other_threads(2, 1)
    assert len(shares) == 8
    for (op, threads), share in shares.items():
        if threads == 1:
            assert share < 0.02, f"other threads do {share:.0%} of {op}"
        else:
            assert share > 0.1, f"a second thread does {share:.0%} of {op}"


def test_thread_cap_from_the_environment() -> None:
    """Row 25: OMP_NUM_THREADS=1 does the same."""
    needs_cpu_backend()
    shares = shares_of_other_threads(OMP_NUM_THREADS="1")
    assert len(shares) == 4 and max(shares.values()) < 0.02, shares


# ---- the public names -------------------------------------------------------------------------------------

PUBLIC = {
    "GatedRMSNorm": "dim, *, eps=1e-06, device=None, dtype=None",
    "LightningAttention": (
        "hidden_size, num_heads, head_dim, *, layer_idx, num_layers, norm_eps=1e-06, device=None, dtype=None"
    ),
    "SparseMoE": "hidden_size, intermediate_size, num_experts, top_k, *, device=None, dtype=None",
    "available_backends": "",
    "gated_rms_norm": "x, gate, weight, *, eps=1e-06, backend='auto'",
    "grouped_gemm": "x, w, offs, *, backend='auto'",
    "lightning_attention": (
        "q, k, v, decay, *, scale=1.0, initial_state=None, return_state=False, cu_seqlens=None, "
        "backend='auto'"
    ),
    "lightning_attention_decode": "q, k, v, decay, state, *, slots=None, scale=1.0, backend='auto'",
    "load_balancing_loss": "logits, experts",
    "moe_mlp": "x, gate_up, down, weights, experts, *, layout='concatenated', backend='auto'",
    "moe_route": "logits, top_k, *, renormalize=True, backend='auto'",
    "quantize_experts": "gate_up, down",
    "router_z_loss": "logits",
}
DECAY = {
    "alibi": "num_heads, *, device=None",
    "fla": "num_heads, layer_idx, num_layers, *, device=None",
    "minimax": "num_heads, layer_idx, num_layers, *, device=None",
    "retnet": "num_heads, *, device=None",
}


def signature(function: object) -> str:
    """Without annotations."""
    assert callable(function)
    bare = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in bare.parameters.values()]
    return str(inspect.Signature(parameters))[1:-1]


def public_names(module: types.ModuleType) -> set[str]:
    """What a user sees: no submodules, nothing private."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def test_public_names() -> None:
    """Row 25: the names and signatures that are documented, and no others."""
    assert set(lightning_attn.__all__) == {*PUBLIC, "decay"}
    assert public_names(lightning_attn) == {*PUBLIC}
    assert {name: signature(getattr(lightning_attn, name)) for name in PUBLIC} == PUBLIC
    starred = python("before = set(globals())\nfrom lightning_attn import *\nprint(*set(globals()) - before)")
    assert set(starred.split()) - {"before"} == set(lightning_attn.__all__)


def test_public_names_of_decay() -> None:
    """Row 25: the formulas that are documented."""
    own = {
        name
        for name in public_names(lightning_attn.decay)
        if getattr(getattr(lightning_attn.decay, name), "__module__", "") == "lightning_attn.decay"
    }
    assert own == {*DECAY}
    assert {name: signature(getattr(lightning_attn.decay, name)) for name in DECAY} == DECAY


def test_forward_signature() -> None:
    """Row 25: of the module."""
    assert signature(lightning_attn.LightningAttention.forward) == (
        "self, x, *, state=None, return_state=False, attention_mask=None, cu_seqlens=None, backend='auto'"
    )


def test_public_docstrings() -> None:
    """Everything public says what it is."""
    public = [getattr(lightning_attn, name) for name in PUBLIC]
    for x in (lightning_attn, *public, *(getattr(lightning_attn.decay, name) for name in DECAY)):
        assert (x.__doc__ or "").strip(), x


def test_version() -> None:
    """The version is written once, in the package; what is installed has it."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", lightning_attn.__version__)
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert 'version = { attr = "lightning_attn.__version__" }' in project
    try:
        installed = importlib.metadata.version("lightning-attn-kernels")
    except importlib.metadata.PackageNotFoundError:
        return  # run from the source tree
    assert installed == lightning_attn.__version__
