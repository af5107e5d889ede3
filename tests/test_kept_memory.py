"""What large outputs of the CPU kernels lie in: kept for the next call, never shared by two."""

import copy
import gc
import io
import mmap
import multiprocessing
import re
import threading
from pathlib import Path

import pytest
import torch
from cli_support import needs_cpu
from support import poisoned_memory

import lightning_attn

pytestmark = needs_cpu
SIZE = 6 << 20  # bytes
MEMORY = pytest.importorskip("lightning_attn.backends.cpu.memory")


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch):
    """Nothing is kept yet."""
    if not MEMORY._CAN_MAP:
        pytest.skip("the system does not take memory back that is marked as free")
    gc.collect()
    monkeypatch.setattr(MEMORY, "kept", MEMORY.Kept(1 << 30))
    return MEMORY.kept


def empty(size: int = SIZE, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return MEMORY.empty(torch.empty(0, dtype=dtype), size // dtype.itemsize)


def test_the_next_call_has_the_memory_of_the_last(kept) -> None:
    out = empty()
    address = out.data_ptr()
    view = out[1:]
    del out
    assert not kept.pieces, "a view is left"
    del view
    for size, again in ((SIZE + 1, False), (int(SIZE / 1.3), False), (int(SIZE / 1.2), True), (SIZE, True)):
        kept.pieces[:] = [piece for piece in kept.pieces if len(piece) == SIZE][-1:]
        other = empty(size)
        assert (other.data_ptr() == address) == again, size
        del other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_output_is_an_ordinary_tensor(dtype, tmp_path) -> None:
    """Of its own storage, no larger than it; copied, saved, shared and changed in place like any."""
    like = torch.empty(0, dtype=dtype)
    for out in (MEMORY.empty(like, 1024, 3072), MEMORY.zeros(like, 1024, 3072)):
        assert out.shape == (1024, 3072) and out.dtype == dtype and out.is_contiguous() and not out._is_view()
        assert out.untyped_storage().nbytes() == out.nbytes and out.data_ptr() % 64 == 0
        out.normal_()
        file = io.BytesIO()
        torch.save(out, file)
        file.seek(0)
        for other in (torch.load(file), copy.deepcopy(out), out.clone().share_memory_()):
            assert torch.equal(other, out)
        with pytest.raises(RuntimeError, match="not resizable"):  # but this, as the README says
            out.resize_(2048, 3072)


def test_zeros_are_zero_where_nothing_is_written() -> None:
    for _ in range(3):
        out = MEMORY.zeros(torch.empty(0), SIZE)
        assert not out.any()
        out.fill_(float("nan"))


@pytest.mark.parametrize("busy", [2, 12])
@pytest.mark.parametrize("layer", ["grouped_gemm", "moe_mlp"])
def test_experts_without_rows_have_no_gradient_in_used_memory(layer, busy) -> None:
    """Whichever way their zeros come, and whatever was in the memory."""
    torch.manual_seed(0)
    E, D, F = 16, 256, 384
    x, w = torch.randn(24, D), torch.randn(E, 2 * F, D, requires_grad=True)
    down = torch.randn(E, D, F, requires_grad=True)
    experts = (torch.arange(24, dtype=torch.int32) % busy * (E // busy))[:, None]
    offs = torch.bincount(experts[:, 0], minlength=E).cumsum(0).int()
    idle = torch.ones(E, dtype=torch.bool).index_fill(0, experts[:, 0].long(), False)
    for _ in range(3):
        if layer == "moe_mlp":
            y = lightning_attn.moe_mlp(x, w, down, torch.ones(24, 1), experts, backend="cpu")
            gradients = torch.autograd.grad(y.sum(), [w, down])
        else:
            gradients = torch.autograd.grad(lightning_attn.grouped_gemm(x, w, offs, backend="cpu").sum(), [w])
        assert gradients[0].nbytes > MEMORY.LARGE
        for dw in gradients:
            assert not dw[idle].any() and dw[~idle].ne(0).any((1, 2)).all()
            dw.fill_(float("nan"))
        del gradients, dw


def test_no_more_than_the_limit_is_kept() -> None:
    few = MEMORY.Kept(2 * SIZE)
    pieces = [few.take(SIZE) for _ in range(4)]
    for piece in pieces:
        few.give(piece)
    assert few.pieces == pieces[2:]
    few.give(few.take(3 * SIZE))
    assert few.pieces == pieces[2:], "what is too large drives nothing out"


def test_the_limit_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_ATTN_KEEP_BYTES", "0")
    nothing = MEMORY.Kept(MEMORY._limit())
    nothing.give(nothing.take(SIZE))
    assert not nothing.pieces
    monkeypatch.setenv("LIGHTNING_ATTN_KEEP_BYTES", "2GB")
    with pytest.raises(ValueError, match="LIGHTNING_ATTN_KEEP_BYTES: expected a number of bytes, got '2GB'"):
        MEMORY._limit()
    monkeypatch.delenv("LIGHTNING_ATTN_KEEP_BYTES")
    assert MEMORY._limit() > 8 * SIZE


def test_what_is_kept_is_the_systems_to_take(kept) -> None:
    smaps = Path("/proc/self/smaps_rollup")

    def lazily_freed() -> int:
        return int(re.search(r"LazyFree:\s*(\d+) kB", smaps.read_text())[1]) * 1024

    if not smaps.exists() or "LazyFree" not in smaps.read_text():
        pytest.skip("the system does not say what it may take")
    size = 64 << 20
    out = empty(size).fill_(1)
    before = lazily_freed()
    del out
    assert lazily_freed() - before >= 0.9 * size


def test_systems_without_the_means(monkeypatch: pytest.MonkeyPatch, kept) -> None:
    """Nothing is kept where MADV_FREE is not known; where there are no huge pages it goes without."""

    class Old(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(MEMORY.mmap, "mmap", Old)
    assert not MEMORY.zeros(torch.empty(0), SIZE).any()
    del_me = empty()
    del del_me
    assert not kept.pieces
    monkeypatch.setattr(MEMORY, "_CAN_MAP", False)
    assert empty().nbytes == SIZE and not MEMORY.zeros(torch.empty(0), SIZE).any()


def test_deterministic_mode_fills_what_is_not_initialised() -> None:
    with poisoned_memory():
        assert empty(dtype=torch.float32).isnan().all()


def test_threads_do_not_share(kept) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(40):
            out = empty(dtype=torch.int32).fill_(number)
            if not (out == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(kept.pieces) <= 8  # a thread has a new one before its last is freed


def _child(out: torch.Tensor, queue) -> None:
    torch.set_num_threads(1)  # those of the parent are not here
    other = MEMORY.empty(out, *out.shape).fill_(2)  # what the parent keeps, in the child's own copy
    queue.put((bool((out == 1).all()), bool((other == 2).all())))


def test_a_forked_child_has_its_own(kept) -> None:
    out, freed = empty().fill_(1), empty().fill_(3)
    del freed
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(out, queue))
    child.start()
    assert queue.get(timeout=60) == (True, True)
    child.join()
    assert (out == 1).all() and len(kept.pieces) == 1
