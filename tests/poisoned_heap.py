"""Run by test_memory.py: the kernels on a heap whose fresh memory is all NaN (where the C library can do that)."""

import ctypes
import platform

M_PERTURB = -6  # of glibc's mallopt: fresh memory is filled with the low byte of 0xff ^ 0x100
POISONED = platform.libc_ver()[0] == "glibc"
if POISONED:
    ctypes.CDLL(None).mallopt(M_PERTURB, 0x100)

import torch
from support import (
    HERE,
    affordable,
    check,
    check_norm,
    dtypes_of,
    make_inputs,
    make_norm_inputs,
    run,
    run_norm,
)

from lightning_attn import lightning_attention_decode

SHAPES = [
    {"B": 1, "T": 65, "H": 1, "K": 7, "V": 9},
    {"B": 1, "T": 33, "H": 2, "K": 40, "V": 5},
    {"B": 1, "T": 700, "H": 1, "K": 33, "V": 40},
    {"lengths": (3, 0, 650, 9), "H": 1, "K": 40, "V": 33},
    {"B": 1, "T": 65, "H": 1, "K": 100, "V": 129},
]
FEWER = [
    *SHAPES[:2],
    {"B": 1, "T": 130, "H": 1, "K": 33, "V": 40},
    {"lengths": (3, 0, 130, 9), "H": 1},
    SHAPES[4],
]


def main() -> None:
    assert torch.empty(100_000).isnan().all() or not POISONED
    torch.set_num_threads(2)
    for backend in HERE:
        instruction_sets = [None]
        if backend == "cpu":
            from lightning_attn import _C

            instruction_sets = _C.instruction_sets()
        for name in instruction_sets:
            if name:
                _C.use_instruction_set(name)
            for dtype in dtypes_of(backend):
                for shape in affordable(backend, SHAPES, FEWER):
                    x = make_inputs(**shape, dtype=dtype)
                    check(run(x, backend), x)
                norm = make_norm_inputs((30, 19), dtype)
                check_norm(run_norm(norm, 1e-6, backend), norm, 1e-6)
            for dtype in dtypes_of(backend, "attention_decode"):
                x = make_inputs(B=3, T=2, H=2, K=7, V=9, dtype=dtype)
                state, slots = x.initial_state.clone(), torch.tensor([0, -1, 2])
                o = lightning_attention_decode(x.q, x.k, x.v, x.decay, state, slots=slots, backend=backend)
                assert o.isfinite().all() and state.isfinite().all()
    print("checked")


main()
