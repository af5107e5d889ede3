"""What breaks kernel libraries in use: fresh processes, forks, threads, tight memory, forward-mode derivatives."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import BACKENDS, affordable, device_of, plain_environment

from lightning_attn import (
    LightningAttention,
    decay,
    gated_rms_norm,
    lightning_attention,
    lightning_attention_decode,
)
from lightning_attn.backends.reference import block_form


def run_fresh(code: str) -> None:
    """Runs `code` in a process of its own; a crash, a hang or an exception fails the test."""
    program = textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=plain_environment(),
    )
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stderr[-2000:]}"


def test_no_tokens_are_decoded_by_the_first_call_of_a_process() -> None:
    """Row 11: T = 0 before any scratch memory was ever asked for, in every thread."""
    run_fresh(
        """
        import torch
        from lightning_attn import lightning_attention_decode
        torch.set_num_threads(2)
        q, state = torch.empty(16, 0, 8, 64), torch.randn(16, 8, 64, 64)
        kept = state.clone()
        o = lightning_attention_decode(q, q, q, torch.rand(8), state, backend="cpu")
        assert o.shape == q.shape and torch.equal(state, kept)
        """
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_computes_when_only_pytorch_had_threads_before_the_fork() -> None:
    """Row 25: the thread pool that PyTorch started is gone in the child, and ours never existed."""
    run_fresh(
        """
        import os, signal, torch, lightning_attn
        torch.set_num_threads(2)
        q, s = torch.randn(1, 1024, 2, 64), torch.rand(2)
        torch.randn(4_000_000).exp_()
        if (child := os.fork()) == 0:
            signal.alarm(60)
            lightning_attn.lightning_attention(q, q, q, s, backend="cpu")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        """
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_one_long_document_among_many_costs_no_state_for_each() -> None:
    """Segment states belong to cut sequences: 4,000 short documents beside a long one must not multiply them."""
    run_fresh(
        """
        import re, resource, torch
        from pathlib import Path
        from lightning_attn.backends import cpu
        torch.set_num_threads(4)
        H, D, long, short = 4, 128, 20_000, 4_000
        q, s = torch.randn(1, long + short, H, D), torch.rand(H)
        ends = torch.cat([torch.arange(short + 1), torch.tensor([long + short])])
        cpu.attention_forward(q[:, :64], q[:, :64], q[:, :64], s, 1.0, None, None, False)  # threads start
        used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        spare = q.nbytes + (200 << 20)  # the output, and what a state for every document and head would exceed
        resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))
        cpu.attention_forward(q, q, q, s, 1.0, None, ends, False)
        """
    )


def test_calls_from_several_python_threads_do_not_meet() -> None:
    """The kernels run without the interpreter's lock: scratch memory belongs to a thread, not to the process."""
    torch.manual_seed(0)
    inputs = [[torch.randn(1, 300 + 7 * i, 2, 32) for _ in range(3)] for i in range(6)]
    rates = torch.tensor([0.1, 1e-3])

    def work(i: int) -> torch.Tensor:
        q, k, v = (x.clone().requires_grad_() for x in inputs[i])
        o, state = lightning_attention(q, k, v, rates, return_state=True, backend="cpu")
        return torch.cat([x.flatten() for x in torch.autograd.grad(o.sum() + state.sum(), (q, k, v))])

    alone = [work(i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(10):
            for i, together in enumerate(pool.map(work, range(6))):
                assert torch.equal(alone[i], together)


def test_a_slow_decay_keeps_its_rate_over_many_blocks() -> None:
    """Row 16: float32 rounds lambda^64 of a rate of 1e-7 by the same amount at every block; it must not add up."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 30_000, 1, 16) for _ in range(3))
    rate = torch.tensor([1e-7])
    _, truth = block_form(q.double(), k.double(), v.double(), rate)
    _, state = lightning_attention(q, k, v, rate, return_state=True, backend="cpu")
    largest = truth.abs().max()
    # 470 blocks, each rounded once to float32 in either direction; a bias of half an eps a block would reach 2.8e-5.
    assert ((state - truth).abs().max() / largest).item() < 4e-6


@pytest.mark.op("attention_decode")
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_a_slow_decay_keeps_its_rate_over_many_decoded_tokens(backend: str) -> None:
    """Row 16: float32 rounds lambda of a rate of 3e-8 by the same amount at every token; it must not add up."""
    torch.manual_seed(0)
    tokens = affordable(backend, 30_000, 4_000)
    q, k, v = (torch.randn(1, tokens, 1, 16) for _ in range(3))
    rate = torch.tensor([3e-8])
    _, truth = block_form(q.double(), k.double(), v.double(), rate)
    state = torch.zeros(1, 1, 16, 16, device=device_of(backend))
    on_device = (x.to(state.device) for x in (q, k, v, rate))
    lightning_attention_decode(*on_device, state, backend=backend)
    # Roundings of the state in either direction: of 30,000 some 173 of half an eps; a bias would reach 4e-4, of 4,000 6e-5.
    assert ((state.cpu() - truth).abs().max() / truth.abs().max()).item() < 2e-5


@pytest.mark.parametrize("name", ["q", "k", "v", "initial_state"])
def test_forward_mode_derivatives_raise(name: str) -> None:
    """Row 3: a derivative that is not there is an error, not a zero."""
    tensors = {name: torch.randn(1, 4, 1, 2) for name in ("q", "k", "v")} | {
        "initial_state": torch.randn(1, 1, 2, 2)
    }

    def call(x: torch.Tensor) -> torch.Tensor:
        t = tensors | {name: x}
        return lightning_attention(t["q"], t["k"], t["v"], torch.ones(1), initial_state=t["initial_state"])

    with pytest.raises(ValueError, match=f"{name} without a tangent"):
        torch.func.jvp(call, (tensors[name],), (tensors[name],))


def test_forward_mode_derivatives_of_the_norm_and_of_decode_raise() -> None:
    """Row 3, the other operators."""
    x, w = torch.randn(3, 4), torch.ones(4)
    with pytest.raises(ValueError, match="gate without a tangent"):
        torch.func.jvp(lambda g: gated_rms_norm(x, g, w), (x,), (x,))
    q, state = torch.randn(1, 1, 1, 2), torch.randn(1, 1, 2, 2)
    with pytest.raises(ValueError, match="state without a tangent"):
        torch.func.jvp(lambda s: lightning_attention_decode(q, q, q, torch.ones(1), s), (state,), (state,))


def test_a_layer_of_one_16_bit_dtype_runs_under_autocast_of_the_other() -> None:
    """Row 20: as nn.Linear does."""
    layer = LightningAttention(16, 2, 8, layer_idx=0, num_layers=2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        assert layer(torch.randn(1, 4, 16).bfloat16()).dtype == torch.float16


def test_a_decay_that_was_set_survives_a_move() -> None:
    """Changing the module's dtype keeps the rates a user gave, in float32."""
    layer = LightningAttention(16, 2, 8, layer_idx=0, num_layers=2)
    layer.decay = torch.tensor([0.5, 0.3])
    layer = layer.to(torch.bfloat16)
    assert layer.decay.dtype == torch.float32 and torch.equal(layer.decay, torch.tensor([0.5, 0.3]))
    assert torch.equal(
        LightningAttention(16, 2, 8, layer_idx=0, num_layers=2).half().decay, decay.minimax(2, 0, 2)
    )


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"state": torch.zeros(2, 2, 8, 8)}, ValueError, "expected state of shape"),
        ({"state": torch.zeros(1, 2, 8, 8).bfloat16()}, TypeError, "expected state of dtype torch.float32"),
        ({"cu_seqlens": [0, 5]}, TypeError, "expected cu_seqlens to be a torch.Tensor"),
    ],
)
def test_errors_of_the_layer_name_its_own_arguments(options: dict, error: type, says: str) -> None:
    """Row 13."""
    layer = LightningAttention(16, 2, 8, layer_idx=0, num_layers=2)
    with pytest.raises(error, match=f"LightningAttention: {says}"):
        layer(torch.randn(1, 5, 16), **options)
