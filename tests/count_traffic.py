"""Run by test_compiled.py, in Triton's interpreter: what each launch of some calls really reads, writes and multiplies,
beside what the launch says that it does, as JSON.

The addresses of all loads and stores are recorded, but for those of the decays, offsets and slots. `bytes` counts each
address once as read and once as written, `again` what is read more often, `flops` the products of tiles.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import interpreter
import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from lightning_attn.backends.triton import attention, config, decode, gated_rms_norm
from lightning_attn.backends.triton.attention import Call
from lightning_attn.backends.triton.config import Segments, Tiles
from lightning_attn.backends.triton.launch import Launch

interpreter.quicken()
ARCH = config.ARCHS["sm_90"]
UNCOUNTED = ("decay", "cu_seqlens", "slots")


class Split(Call):
    """In segments of one block, whatever is best."""

    def cut(
        self, columns: int, state_size: int, bytes_per_token: int, tiles: Tiles, passes: int = 2
    ) -> Segments:
        return Segments(-(-self.shape[1] // tiles.block), tiles.block)


class Counter:
    """Of what launches do while it is in use."""

    def __init__(self, launch: Launch) -> None:
        self.read: list[np.ndarray] = []
        self.written: list[np.ndarray] = []
        self.flops = 0
        tensors = (launch.arguments.get(name) for name in UNCOUNTED)
        self.uncounted = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors if x is not None]

    @contextmanager
    def in_use(self) -> Iterator[None]:
        masked_load, masked_store = (
            InterpreterBuilder.create_masked_load,
            InterpreterBuilder.create_masked_store,
        )
        create_dot = InterpreterBuilder.create_dot

        def load(builder, pointers, mask, *rest):
            self._note(self.read, pointers, mask)
            return masked_load(builder, pointers, mask, *rest)

        def store(builder, pointers, value, mask, *rest):
            self._note(self.written, pointers, mask)
            return masked_store(builder, pointers, value, mask, *rest)

        def dot(builder, a, b, *rest):
            self.flops += 2 * a.data.size * b.data.shape[-1]
            return create_dot(builder, a, b, *rest)

        with (
            patch.object(InterpreterBuilder, "create_masked_load", load),
            patch.object(InterpreterBuilder, "create_masked_store", store),
            patch.object(InterpreterBuilder, "create_dot", dot),
        ):
            yield

    def _note(self, into: list[np.ndarray], pointers, mask) -> None:
        addresses = pointers.data[mask.data.astype(bool)]
        for begin, end in self.uncounted:
            addresses = addresses[(addresses < begin) | (addresses >= end)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        into.append(np.stack([addresses, np.full(addresses.size, size, np.uint64)]))

    def totals(self) -> dict[str, int]:
        (read, all_read), (written, all_written) = map(_bytes, (self.read, self.written))
        return {
            "bytes": read + written,
            "again": all_read - read,
            "written_again": all_written - written,
            "flops": self.flops,
        }


def _bytes(accesses: list[np.ndarray]) -> tuple[int, int]:
    """Of different addresses, and of all."""
    if not accesses:
        return 0, 0
    addresses, sizes = np.concatenate(accesses, axis=1)
    _, first = np.unique(addresses, return_index=True)
    return int(sizes[first].sum()), int(sizes.sum())


def calls() -> Iterator[tuple[str, list[Launch]]]:
    """Small ones, with the tiles of `ARCH`; some lengths are no multiple of a block."""
    dtype, H, D = torch.float16, 2, 128
    decay = torch.full((H,), 0.1)

    def operand(B: int, T: int) -> Tensor:
        return torch.randn(B, T, H, D, dtype=dtype)

    for name, kind, B, T, offsets in (
        ("one pass", Call, 2, 128, None),
        ("ragged", Call, 1, 130, None),
        ("split", Split, 1, 192, None),
        ("split, ragged", Split, 2, 150, None),
        ("packed", Call, 1, 192, [0, 64, 64, 192]),
        ("split, packed", Split, 1, 192, [0, 20, 192]),
    ):
        q, k, v, o, do, dq, dk, dv = (operand(B, T) for _ in range(8))
        cu_seqlens = None if offsets is None else torch.tensor(offsets)
        call = kind(decay, 1.0, cu_seqlens, (B, T, H), config.Arch(ARCH.name, ARCH.shared, 1))
        states = [torch.randn(call.sequences, H, D, D) for _ in range(4)]
        initial, final, dstate, dinitial = states if cu_seqlens is not None else [None] * 4
        yield f"forward, {name}", attention.forward(q, k, v, o, initial, final, call)
        yield (
            f"backward, {name}",
            attention.backward(q, k, v, do, dq, dk, dv, initial, dstate, dinitial, call),
        )
        if cu_seqlens is None:
            for reverse in (False, True):
                launches, _ = attention.state_alone(k, v, None, reverse, call)
                yield f"state, {name}", launches
                yield f"history, {name}", attention.history(q, torch.randn(B, H, D, D), o, reverse, call)
    for T in (1, 4):
        q, k, v, o = (operand(3, T) for _ in range(4))
        state = torch.randn(3, H, D, D)
        yield f"decode, T={T}", decode.launches(q, k, v, o, decay, state, None, 1.0, ARCH)
    for rows, columns in ((24, 300), (5, 8192)):
        dy, x, gate, y, dx, dgate = (torch.randn(rows, columns, dtype=dtype) for _ in range(6))
        weight, dweight = (torch.randn(columns, dtype=dtype) for _ in range(2))
        rstd = torch.randn(rows)
        name = f"{rows} x {columns}"
        yield f"norm, {name}", gated_rms_norm.forward(x, gate, weight, y, rstd, 1e-6, ARCH)
        yield (
            f"norm backward, {name}",
            gated_rms_norm.backward(dy, x, gate, weight, rstd, dx, dgate, dweight, ARCH),
        )


def main() -> None:
    torch.manual_seed(0)
    counts = []
    for name, launches in calls():
        for launch in launches:
            counter = Counter(launch)
            with counter.in_use():
                launch.run()
            said = {"bytes": launch.bytes, "again": launch.again, "flops": launch.flops, "written_again": 0}
            counts.append({"call": name, "kernel": launch.name, "said": said, "done": counter.totals()})
    print(json.dumps(counts))


main()
