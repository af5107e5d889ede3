"""Every kernel once or twice on small odd shapes, for compute-sanitizer. Prints the names of the kernels that ran.

    python tests/sanitize.py            # on the GPU
    python tests/sanitize.py --dry      # on the CPU: interpreted, emulated

Kernels are watched by compute-sanitizer; what this checks itself is that nothing but garbage gives what is not finite.
"""

import os
import sys
from typing import Any

DRY = "--dry" in sys.argv[1:]
if DRY:
    os.environ |= {"TRITON_INTERPRET": "1", "LIGHTNING_ATTN_EMULATE_CUDA": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
from torch import Tensor

from lightning_attn import available_backends, backends

if DRY and available_backends()["triton"] == "ok":
    import interpreter

    interpreter.quicken()

DEVICE = "cpu" if DRY else "cuda"
SLOTS = ((2, 0, 1), (-1, 1, -1), (0, 7, -5), (2**31, -(2**31), 2))  # of 3 states: some are none
SEGMENT = 48


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to(DEVICE, dtype)


def finite(*tensors: Tensor) -> None:
    assert all(x.isfinite().all() for x in tensors), "not finite, or not all written"


def attention(dtype: torch.dtype, K: int, V: int, ends: list[int] | None, stateful: bool = True) -> None:
    """Forward and backward of 2 heads and 101 tokens, dense or packed; if dense the states alone too."""
    triton = backends.load("triton")
    H, T, N = 2, 101, 1 if ends is None else len(ends) - 1
    q, k = (normal(1, T, H, K, dtype=dtype) for _ in range(2))
    v, do = (normal(1, T, H, V, dtype=dtype) for _ in range(2))
    initial, dstate = (normal(N, H, K, V) if stateful else None for _ in range(2))
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    shared = q, k, v, torch.tensor([0.01, 2.0], device=DEVICE), K**-0.5, initial, cu_seqlens
    o, state = triton.attention_forward(*shared, True)
    gradients = triton.attention_backward(do, dstate, *shared)
    if ends is None:
        finite(triton.attention_state(k, v, shared[3], K**-0.5, initial, False))
        finite(triton.attention_state(q, do, shared[3], K**-0.5, dstate, True))
        if initial is not None:
            triton.attention_history(q, initial, shared[3], K**-0.5, False, o)
    if ends is None or ends[-1] == T:
        finite(o, state, *(x for x in gradients if x is not None))


def decode(backend: str, dtype: torch.dtype, state_dtype: torch.dtype, K: int, V: int, tokens: int) -> None:
    """With slots and without; garbage in a slot touches no state, and its output is zero."""
    kernels = backends.load(backend)
    q, k = (normal(3, tokens, 2, K, dtype=dtype) for _ in range(2))
    v, rates = normal(3, tokens, 2, V, dtype=dtype), torch.tensor([0.01, 2.0], device=DEVICE)
    state = normal(3, 2, K, V, dtype=state_dtype)
    for slots in (None, *SLOTS):
        rows = None if slots is None else torch.tensor(slots, device=DEVICE)
        finite(kernels.attention_decode(q, k, v, rates, state, rows, 1.0), state)


def norm(dtype: torch.dtype, rows: int, D: int) -> None:
    triton = backends.load("triton")
    x, gate, dy = (normal(rows, D, dtype=dtype) for _ in range(3))
    weight = normal(D, dtype=dtype)
    y, rstd = triton.gated_rms_norm_forward(x, gate, weight, 1e-6)
    finite(y, rstd, *triton.gated_rms_norm_backward(dy, x, gate, weight, rstd))


def with_triton() -> set[str]:
    """-> the kernels that it launched."""
    from lightning_attn.backends.triton import config, launch

    ran: set[str] = set()
    run, segments = launch.Launch.run, config.segments

    def noted(x: launch.Launch) -> None:
        if x.programs:
            ran.add(x.name)
        run(x)

    def cut(programs: int, tokens: int, *rest: object) -> config.Segments:
        return config.Segments(max(1, -(-tokens // SEGMENT)), SEGMENT)

    launch.Launch.run = noted
    half = torch.float16 if DRY else torch.bfloat16
    packed, garbage = [0, 0, 40, 41, 101], [5, -7, 2**31 - 1, 0, 60]
    for how in (segments, cut):
        config.segments = how
        attention(torch.float32, 20, 33, packed)
        attention(half, 20, 33, None, stateful=False)
        attention(half, 100, 65, packed)  # too large for a program to hold a whole state's gradient
    attention(half, 20, 33, garbage)
    decode("triton", half, torch.float32, 20, 33, tokens=1)
    decode("triton", torch.float32, torch.bfloat16, 64, 64, tokens=3)
    norm(torch.float32, 37, 45)
    norm(half, 5, 2049)
    return ran


def routing(dtype: torch.dtype, T: int, E: int, k: int) -> None:
    """To experts and back, and sorted; with garbage for experts too."""
    from lightning_attn.backends import cuda

    logits, dweights = normal(T, E, dtype=dtype), normal(T, k)
    for renormalize in (True, False):
        weights, experts = cuda.moe_route_forward(logits, k, renormalize)
        finite(weights, cuda.moe_route_backward(dweights, logits, weights, experts, renormalize))
    for found in (experts, experts * 3 - 2, experts.fill_(-(2**31))):
        _, position, offs = cuda.moe_sort(found, E)
        assert offs[-1] == (position >= 0).sum(), "not all pairs have a place"
        cuda.moe_route_backward(dweights, logits, weights, found, False)


def with_cuda() -> set[str]:
    """Aligned states and any others, in registers of several sizes, and few pairs and many -> the kernels that it launched."""
    from lightning_attn.backends import cuda
    from lightning_attn.backends.cuda import launch

    ran: set[str] = set()
    run = cuda._run

    def noted(launches: list[launch.Launch], *rest: Any) -> None:
        ran.update(x.kernel.name for x in launches)
        run(launches, *rest)

    cuda._run = noted
    decode("cuda", torch.float32, torch.float32, 20, 36, tokens=1)
    decode("cuda", torch.float16, torch.bfloat16, 64, 64, tokens=3)
    decode("cuda", torch.bfloat16, torch.float32, 128, 128, tokens=1)
    decode("cuda", torch.bfloat16, torch.bfloat16, 256, 7, tokens=17)
    routing(torch.float32, 7, 33, 33)
    routing(torch.bfloat16, 2500, 32, 2)
    routing(torch.float16, 3, 500, 8)
    cuda._run = run
    return ran


def main() -> None:
    torch.manual_seed(0)
    status = available_backends()
    ran: set[str] = set()
    for name, run in (("triton", with_triton), ("cuda", with_cuda)):
        if status[name] == "ok":
            ran |= run()
        else:
            print(f"{name}: {status[name]}", file=sys.stderr)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert ran, "there is no GPU backend"
    print(*sorted(ran), sep="\n")


main()
