"""Run by test_memory.py: the peak of resident memory during one call, as JSON in bytes.

    python peak_memory.py BACKEND [packed] forward|backward

`extra` is what the call took beyond what was there; `allowed` its outputs and a constant; `saved_states` what it would
take if it kept a state per block of 64 tokens or per document; `control` what this measures when that is allocated.
"""

import json
import re
import resource
import sys
from pathlib import Path

import torch
from support import offsets

from lightning_attn import lightning_attention

T, H, D = 65536, 1, 128
THREADS = 2
CONSTANT = 16 << 20  # scratch of the threads, huge pages rounded up, allocators' leftovers
STATE = 4 * H * D * D


def peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include what the parent process had
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(backend: str, *case: str) -> None:
    torch.set_num_threads(THREADS)
    backward = "backward" in case
    decay = torch.tensor([0.01] * H)
    # One long document, which is cut into segments, and many short ones.
    cu_seqlens = offsets([T - 2048, *[2] * 1024]) if "packed" in case else None

    def inputs(tokens: int) -> list[torch.Tensor]:
        return [torch.randn(1, tokens, H, D) for _ in range(4)]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor, cu_seqlens=None):
        leaves = [x.requires_grad_(backward) for x in (q, k, v)]
        o = lightning_attention(*leaves, decay, cu_seqlens=cu_seqlens, backend=backend)
        return [o, *torch.autograd.grad(o, leaves, do)] if backward else [o]

    tensors = inputs(T)
    call(*inputs(2000))  # loads code, grows each thread's scratch
    before = peak()
    outputs = call(*tensors, cu_seqlens)
    extra = peak() - before

    sizes = sum(x.nbytes for x in outputs)
    saved_states = STATE * (1024 if cu_seqlens is not None else T // 64)
    before = peak()
    control = [torch.ones(saved_states // 4)]
    report = {
        "extra": extra,
        "allowed": sizes + CONSTANT,
        "saved_states": sizes + saved_states,
        "control": sizes + peak() - before,
    }
    del control
    print(json.dumps(report))


main(*sys.argv[1:])
