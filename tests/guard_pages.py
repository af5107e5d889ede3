"""Run by test_memory.py: raw kernels on buffers that end (or begin) where a page begins that nobody may touch.

    python guard_pages.py BACKEND after|before

A kernel that reads or writes beyond a buffer ends the process; the last line printed names the case.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from support import (
    GPU_BACKENDS,
    Inputs,
    affordable,
    assert_same_bits,
    dtypes_of,
    make_inputs,
    make_norm_inputs,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_attn import backends
from lightning_attn.dispatch import accumulation_dtype

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PROT_NONE = 0


class Guards(TorchDispatchMode):
    """Tensors between pages that nobody may touch; inside, every new tensor of a kernel's is one of them."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.side = side
        self.regions: list[tuple[mmap.mmap, object]] = []
        self.count = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of bytes 0xff, which is NaN in every floating dtype."""
        self.count += 1
        size = torch.Size(shape).numel() * dtype.itemsize
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        pages = -(-size // PAGE)
        region = mmap.mmap(-1, (pages + 2) * PAGE)
        region[PAGE : PAGE + pages * PAGE] = b"\xff" * (pages * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(region))
        for guard in (address, address + (pages + 1) * PAGE):
            if libc.mprotect(guard, PAGE, PROT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")
        start = address + PAGE + (pages * PAGE - size if self.side == "after" else 0)
        buffer = (ctypes.c_char * size).from_address(start)
        self.regions.append((region, buffer))
        return torch.frombuffer(buffer, dtype=dtype).view(shape)

    def copy(self, x: Tensor, order: tuple[int, ...] | None = None) -> Tensor:
        """x between guards, its dimensions stored in this order."""
        order = order or tuple(range(x.dim()))
        stored = self.empty(tuple(x.permute(order).shape), x.dtype).copy_(x.permute(order))
        return stored.permute([order.index(d) for d in range(x.dim())])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket._qualified_op_name
        if name in ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::zeros", "aten::new_zeros"):
            like = function(*args, **kwargs)
            y = self.empty(tuple(like.shape), like.dtype)
            return y.zero_() if "zeros" in name else y
        return function(*args, **kwargs)

    def attention(self, kernels, x: Inputs, order: tuple[int, ...] | None) -> list[Tensor]:
        q, k, v, do = (self.copy(t, order) for t in (x.q, x.k, x.v, x.do))
        decay, initial, dstate = (self.copy(t) for t in (x.decay, x.initial_state, x.dstate))
        cu_seqlens = None if x.cu_seqlens is None else self.copy(x.cu_seqlens.long())
        shared = (q, k, v, decay, x.scale, initial, cu_seqlens)
        with self:
            outputs = kernels.attention_forward(*shared, True)
            gradients = kernels.attention_backward(do, dstate, *shared)
            states = []
            if cu_seqlens is None:
                states.append(kernels.attention_state(k, v, decay, x.scale, initial, False))
                states.append(kernels.attention_state(q, do, decay, x.scale, dstate, True))
                kernels.attention_history(q, initial, decay, x.scale, False, outputs[0])
                kernels.attention_history(k, dstate, decay, x.scale, True, gradients[2])
        return [*outputs, *gradients, *states]

    def decode(
        self,
        kernels,
        x: Inputs,
        state_dtype: torch.dtype,
        order: tuple[int, ...] | None,
        slots: Tensor | None = None,
    ) -> list[Tensor]:
        q, k, v = (self.copy(t, order) for t in (x.q, x.k, x.v))
        decay, state = self.copy(x.decay), self.copy(x.initial_state.to(state_dtype))
        slots = self.copy(torch.arange(x.q.shape[0] - 1, -1, -1) if slots is None else slots)
        with self:
            o = kernels.attention_decode(q, k, v, decay, state, slots, x.scale)
        return [o, state]

    def norm(self, kernels, tensors: list[Tensor]) -> list[Tensor]:
        x, gate, weight, dy = (self.copy(t) for t in tensors)
        with self:
            y, rstd = kernels.gated_rms_norm_forward(x, gate, weight, 1e-6)
            gradients = kernels.gated_rms_norm_backward(dy, x, gate, weight, rstd)
        return [y, rstd, *gradients]


class NoGuards(Guards):
    """The same calls on ordinary memory."""

    def copy(self, x: Tensor, order: tuple[int, ...] | None = None) -> Tensor:
        return x.clone()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def compare(case: object, call: Callable[[Guards], list[Tensor]], side: str) -> None:
    print(case, flush=True)
    guards = Guards(side)
    guarded = call(guards)
    assert guards.count > len(guarded), "outputs were not placed between guards"
    for a, b in zip(guarded, call(NoGuards(side)), strict=True):
        assert_same_bits(a, b)


def check(kernels, backend: str, side: str, name: str) -> None:
    dims = [(1, 1), (3, 5), (9, 7), (16, 16), (17, 33), (48, 64), (100, 129), (256, 255)]
    dims = affordable(backend, dims, [(1, 1), (100, 129)])
    heads_first = (0, 2, 1, 3)
    for dtype in dtypes_of(backend):
        for K, V in dims:
            for T, order in ((65, None), (2, heads_first)):
                x = make_inputs(B=1, T=T, H=2, K=K, V=V, dtype=dtype)
                compare((name, dtype, K, V, T), lambda g, x=x, o=order: g.attention(kernels, x, o), side)
        for shape in (
            {"B": 2, "T": 64, "H": 2, "K": 16, "V": 16},
            {"B": 1, "T": 63, "H": 1, "K": 9, "V": 7},
            {"B": 1, "T": affordable(backend, 1000, 130), "H": 1, "K": 33, "V": 31},
            {"lengths": (5, 0, 64, affordable(backend, 700, 130), 1), "H": 1, "K": 40, "V": 33},
        ):
            x = make_inputs(**shape, dtype=dtype)
            compare((name, dtype, shape), lambda g, x=x: g.attention(kernels, x, None), side)
        for rows, D in ((1, 1), (3, 5), (2, 16), (5, 33), (7, 127), (200, 300)):
            norm = make_norm_inputs((rows, D), dtype, accumulation_dtype(dtype))
            compare((name, "norm", dtype, rows, D), lambda g, norm=norm: g.norm(kernels, norm), side)
    for dtype in dtypes_of(backend, "attention_decode"):
        state_dtypes = {accumulation_dtype(dtype), torch.bfloat16 if dtype != torch.float64 else dtype}
        for state_dtype in sorted(state_dtypes, key=str):
            for K, V in dims:
                x = make_inputs(B=3, T=2, H=2, K=K, V=V, dtype=dtype)
                compare(
                    (name, "decode", dtype, state_dtype, K, V),
                    lambda g, x=x, s=state_dtype: g.decode(kernels, x, s, heads_first),
                    side,
                )


GARBAGE = [
    (0, 3, 90, 66, 140),
    (0, -5, -(2**40), 2**40, 140),
    (-7, 2**33, 2**33, -1, 139),
    (2**31 - 1, 2**31 - 1, 0, 0, 0),
    (140, 100, 64, 1, 0),
    (5000, 5000, 5000, 5000, 5000),
    (-1, -1, -1, -1, -1),
]


def check_garbage_offsets(kernels, side: str) -> None:
    """Offsets that nobody has looked at, as on a GPU: results are of no use, and nothing else is touched."""
    x = make_inputs(lengths=(10, 60, 30, 40), H=2, K=16, V=9)
    for offsets in GARBAGE:
        print("offsets", offsets, flush=True)
        Guards(side).attention(kernels, replace(x, cu_seqlens=torch.tensor(offsets)), None)


def check_garbage_slots(kernels, side: str) -> None:
    """So it is with slots."""
    few = make_inputs(B=3, T=2, H=2, K=16, V=9)
    for slots in ((-1, -2, 3), (2**31, -(2**31), 2**62), (3, 1000, -(2**62))):
        print("slots", slots, flush=True)
        Guards(side).decode(kernels, few, torch.float32, None, torch.tensor(slots))


def main(backend: str, side: str) -> None:
    torch.set_num_threads(2)
    kernels = backends.load(backend)
    if backend == "cpu":
        from lightning_attn import _C

        for name in _C.instruction_sets():
            _C.use_instruction_set(name)
            check(kernels, backend, side, name)
    elif backend == "triton":
        from triton_support import of_length

        from lightning_attn.backends.triton import config

        config.segments = of_length(64)
        check_garbage_offsets(kernels, side)
    if backend in GPU_BACKENDS:
        check_garbage_slots(kernels, side)
    if backend != "cpu":
        check(kernels, backend, side, backend)
    print("checked")


main(*sys.argv[1:])
