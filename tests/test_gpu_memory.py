"""Canaries around every buffer (row 8), the memory that a call takes, and the program for compute-sanitizer (row 9)."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu_support import DEVICE, GPU, kernels, size
from support import BACKENDS, assert_same_bits, dtype_id, make_inputs, make_norm_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_attn import backends

pytestmark = pytest.mark.gpu

CANARY, MARGIN = 0x5A, 4096  # bytes


class Canaries(TorchDispatchMode):
    """Tensors between bytes that nobody may write; inside, every new tensor of a kernel's is one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.regions: list[tuple[Tensor, int]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Of bytes 0xff, which is NaN in every floating dtype."""
        count = torch.Size(shape).numel() * dtype.itemsize
        region = torch.full((2 * MARGIN + count,), CANARY, dtype=torch.uint8, device=DEVICE)
        inside = region[MARGIN : MARGIN + count].fill_(0xFF)
        self.regions.append((region, count))
        return inside.view(dtype).view(shape)

    def copy(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else self.empty(tuple(x.shape), x.dtype).copy_(x)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket._qualified_op_name
        if name in ("aten::empty", "aten::new_empty", "aten::empty_like"):
            like = function(*args, **kwargs)
            return self.empty(tuple(like.shape), like.dtype)
        return function(*args, **kwargs)

    def check(self) -> None:
        for region, count in self.regions:
            assert (region[:MARGIN] == CANARY).all(), "written before a buffer"
            assert (region[MARGIN + count :] == CANARY).all(), "written after a buffer"


# By the size of their elements: what is bfloat16's is float16's, and the interpreter takes this one.
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
SHAPES = {
    "wide": {"B": 1, "T": 65, "H": 1, "K": 100, "V": 129},
    "packed": {"lengths": (5, 0, 64, 1, size(700, 130)), "H": 1, "K": 33, "V": 40},
}


def compare(name: str, arguments: list[Tensor | None], call: Callable[..., list[Tensor]]) -> None:
    """The same bits with canaries around every argument and every new tensor, and no canary harmed."""
    expected = call(*(None if x is None else x.clone() for x in arguments))
    canaries = Canaries()
    copies = [canaries.copy(x) for x in arguments]
    with canaries:
        results = call(*copies)
    assert len(canaries.regions) > sum(x is not None for x in arguments), "no output is among canaries"
    for a, b in zip(results, expected, strict=True):
        assert_same_bits(a, b, name)
    canaries.check()


@kernels
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_writes_nothing_beyond_its_buffers(
    backend: str, dtype: torch.dtype, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 8: outputs, states, gradients and what passes between kernels; sequences are cut in segments."""
    from triton_support import of_length

    from lightning_attn.backends.triton import config

    monkeypatch.setattr(config, "segments", of_length(32))
    loaded, x = backends.load(backend), make_inputs(**SHAPES[shape], dtype=dtype).to(DEVICE)

    def call(q: Tensor, k: Tensor, v: Tensor, do: Tensor, *others: Tensor) -> list[Tensor]:
        decay, initial, dstate, cu_seqlens = others
        shared = q, k, v, decay, x.scale, initial, cu_seqlens
        return [
            *loaded.attention_forward(*shared, True),
            *loaded.attention_backward(do, dstate, *shared),
        ]

    compare(shape, [x.q, x.k, x.v, x.do, x.decay, x.initial_state, x.dstate, x.cu_seqlens], call)


# What no check has seen: on a GPU nobody looks at offsets and slots.
GARBAGE = [
    (0, 3, 90, 66, 140),
    (0, -5, -(2**40), 2**40, 140),
    (2**31 - 1, 2**31 - 1, 0, 0, 0),
    (5000, 5000, 5000, 5000, 5000),
    (-1, -1, -1, -1, -1),
]


@kernels
@pytest.mark.parametrize("offsets", GARBAGE, ids=str)
def test_offsets_that_are_none_write_nothing_beyond_the_buffers(
    backend: str, offsets: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows 7 and 8: results are of no use, and nothing else is touched."""
    from triton_support import of_length

    from lightning_attn.backends.triton import config

    monkeypatch.setattr(config, "segments", of_length(64))
    x = make_inputs(lengths=(10, 60, 30, 40), H=2, K=16, V=9).to(DEVICE)
    loaded, canaries = backends.load(backend), Canaries()
    tensors = (x.q, x.k, x.v, x.do, x.decay, x.initial_state, x.dstate, torch.tensor(offsets, device=DEVICE))
    q, k, v, do, decay, initial, dstate, cu_seqlens = map(canaries.copy, tensors)
    shared = q, k, v, decay, x.scale, initial, cu_seqlens
    with canaries:
        loaded.attention_forward(*shared, True)
        loaded.attention_backward(do, dstate, *shared)
    canaries.check()


@kernels
@pytest.mark.op("attention_decode")
@dtypes
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize(("K", "V"), [(9, 7), (16, 16), (100, 129)])
@pytest.mark.parametrize(
    "slots", [None, (2, 0, 1), (-1, -2, 3), (2**31, -(2**31), 2**62), (1, 1000, -(2**62))], ids=str
)
def test_decode_writes_nothing_beyond_its_buffers(
    backend: str, dtype: torch.dtype, state_dtype: torch.dtype, K: int, V: int, slots: tuple[int, ...] | None
) -> None:
    """Row 8: whatever the slots are."""
    loaded, x = backends.load(backend), make_inputs(B=3, T=2, H=2, K=K, V=V, dtype=dtype).to(DEVICE)

    def call(
        q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, rows: Tensor | None
    ) -> list[Tensor]:
        return [loaded.attention_decode(q, k, v, decay, state, rows, x.scale), state]

    rows = None if slots is None else torch.tensor(slots, device=DEVICE)
    compare("decode", [x.q, x.k, x.v, x.decay, x.initial_state.to(state_dtype), rows], call)


@kernels
@dtypes
@pytest.mark.parametrize(("rows", "D"), [(3, 5), (7, 127), (200, 300)])
def test_the_norm_writes_nothing_beyond_its_buffers(
    backend: str, dtype: torch.dtype, rows: int, D: int
) -> None:
    """Row 8: y, the statistics, gradients and partial sums."""
    loaded = backends.load(backend)

    def call(x: Tensor, gate: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
        y, rstd = loaded.gated_rms_norm_forward(x, gate, weight, 1e-6)
        return [y, rstd, *loaded.gated_rms_norm_backward(dy, x, gate, weight, rstd)]

    compare("norm", [t.to(DEVICE) for t in make_norm_inputs((rows, D), dtype)], call)


@kernels
@pytest.mark.op("attention_decode")
def test_a_write_beyond_a_buffer_would_be_seen(backend: str) -> None:
    """Of one element, on either side."""
    for at in (-1, 4):
        canaries = Canaries()
        x = canaries.empty((4,), torch.float32)
        outside = x.as_strided((1,), (1,), x.storage_offset() + at)
        outside.fill_(1.0)
        with pytest.raises(AssertionError, match="written"):
            canaries.check()


def test_the_program_for_the_sanitizer_runs() -> None:
    """Row 9: every kernel of every backend that is here, on small shapes."""
    program = Path(__file__).parent / "sanitize.py"
    process = subprocess.run(
        [sys.executable, str(program), *([] if GPU else ["--dry"])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    kernels = set(process.stdout.split())
    assert {"chunk", "chunk_state", "scan", "decode", "chunk_backward", "chunk_backward_split"} <= kernels
    assert {"gated_rms_norm_forward", "gated_rms_norm_backward", "gated_rms_norm_dweight"} <= kernels
    steps = {name for name in kernels if name.startswith("step_")}
    assert "cuda" not in BACKENDS or {name.split("_")[-2] for name in steps} == {"1", "2", "4", "8"}
