"""What large buffers of the CPU kernels lie in: kept for the next call, never shared by two."""

import copy
import gc
import io
import mmap
import multiprocessing
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from support import BACKENDS, poisoned_memory

import lightning_attn

if "cpu" not in BACKENDS:
    pytest.skip("the cpu backend was not built", allow_module_level=True)

from lightning_attn.backends.cpu import memory

SIZE = memory.LARGE + (1 << 20)  # bytes


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch):
    """An empty one."""
    if not memory._CAN_MAP:
        pytest.skip("the system does not take memory back that is marked as free")
    gc.collect()
    monkeypatch.setattr(memory, "pool", memory.MemoryPool(1 << 30))
    return memory.pool


def empty(size: int = SIZE, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return memory.empty(torch.empty(0, dtype=dtype), size // dtype.itemsize)


def test_the_next_call_has_the_memory_of_the_last(pool) -> None:
    out = empty(2 * SIZE)
    address = out.data_ptr()
    view = out[1:]
    del out
    assert not pool.blocks, "a view is left"
    del view
    for part, again in ((1.01, False), (1 / 1.3, False), (1 / 1.2, True), (1, True)):
        pool.blocks[:] = [block for block in pool.blocks if len(block) == 2 * SIZE][-1:]
        other = empty(int(part * 2 * SIZE))
        assert (other.data_ptr() == address) == again, part
        del other


def test_the_smallest_that_fits_and_of_these_the_last(pool) -> None:
    blocks = [memory._map(size) for size in (SIZE, SIZE, int(1.2 * SIZE))]
    for block in blocks:
        pool.free(block)
    assert pool.allocate(SIZE) is blocks[1]
    assert pool.allocate(SIZE) is blocks[0]
    assert pool.allocate(SIZE) is blocks[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_buffer_is_an_ordinary_tensor(dtype) -> None:
    """Of its own storage, no larger than it; copied, saved, shared and changed in place like any."""
    like, shape = torch.empty(0, dtype=dtype), (1024, SIZE // 2048)
    for out in (memory.empty(like, *shape), memory.zeros(like, *shape)):
        assert out.shape == shape and out.dtype == dtype and out.is_contiguous() and not out._is_view()
        assert out.untyped_storage().nbytes() == out.nbytes and out.data_ptr() % 64 == 0
        out[:8].normal_()
        out[8:] = 1
        file = io.BytesIO()
        torch.save(out, file)
        file.seek(0)
        expected = out.clone()
        for other in (torch.load(file), copy.deepcopy(out)):
            assert torch.equal(other, expected)
        with pytest.raises(RuntimeError, match="not resizable"):  # but this, as the README says
            out.view(-1).resize_(SIZE)
        assert torch.equal(out.share_memory_(), expected) and out.is_shared()


def test_zeros_are_zero_where_nothing_is_written(pool) -> None:
    for _ in range(3):
        empty(4 * SIZE, torch.float32).fill_(float("nan"))
        assert pool.blocks
        out = memory.zeros(torch.empty(0), SIZE)
        assert not out.any()
        out.fill_(float("nan"))


@pytest.mark.parametrize("busy", [2, 12])
@pytest.mark.parametrize("layer", ["grouped_gemm", "moe_mlp"])
def test_experts_without_rows_have_no_gradient_in_used_memory(pool, layer, busy, monkeypatch) -> None:
    """Whichever way their zeros come, and whatever was in the memory."""
    monkeypatch.setattr(memory, "LARGE", 1 << 20)
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
        for dw in gradients:
            assert dw.nbytes > memory.LARGE
            assert not dw[idle].any() and dw[~idle].ne(0).any((1, 2)).all()
            dw.fill_(float("nan"))
        del gradients, dw
    assert bool(pool.blocks) == (busy == 12), "memory for few of many experts is fresh"


def test_no_more_than_the_limit_is_kept() -> None:
    few = memory.MemoryPool(2 * SIZE)
    blocks = [few.allocate(SIZE) for _ in range(4)]
    for block in blocks:
        few.free(block)
    assert few.blocks == blocks[2:]
    few.free(few.allocate(3 * SIZE))
    assert few.blocks == blocks[2:], "what is too large drives nothing out"


def test_the_limit_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "LIGHTNING_ATTN_KEEP_BYTES"
    monkeypatch.setenv(name, "0")
    nothing = memory.MemoryPool(memory._limit())
    nothing.free(nothing.allocate(SIZE))
    assert not nothing.blocks
    monkeypatch.setenv(name, "2GB")
    with pytest.raises(ValueError, match=f"{name}: expected a number of bytes, got '2GB'"):
        memory._limit()
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setenv(name, "")
    assert memory._limit() == physical // 8
    monkeypatch.delenv(name)
    assert memory._limit() == physical // 8


def test_what_is_kept_is_the_systems_to_take(pool) -> None:
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


def test_no_room(pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept goes first; then PyTorch says that there is none, or has some."""
    left = [1]

    def full(size: int) -> mmap.mmap:
        if left and left.pop():
            raise OSError(12, "Cannot allocate memory")
        return mmap.mmap(-1, size)

    kept = empty()
    del kept
    monkeypatch.setattr(memory, "_map", full)
    assert empty(2 * SIZE).nbytes == 2 * SIZE and not left
    for block in pool.blocks:
        assert len(block) == 2 * SIZE, "what was kept is gone"
    pool.clear()
    left[:] = [1, 1]
    assert empty().nbytes == SIZE and not left and not pool.blocks
    left[:] = [1, 1]
    assert not memory.zeros(torch.empty(0), SIZE).any() and not left
    with pytest.raises(RuntimeError, match="memory|allocate"):
        monkeypatch.undo()
        memory.empty(torch.empty(0), 1 << 60)


def test_systems_without_the_means(monkeypatch: pytest.MonkeyPatch, pool) -> None:
    """Nothing is kept where MADV_FREE is not known; where there are no huge pages it goes without."""

    class Old(mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Old)
    assert not memory.zeros(torch.empty(0), SIZE).any()
    out = empty()
    assert out.nbytes == SIZE
    del out
    assert not pool.blocks
    monkeypatch.setattr(memory, "_CAN_MAP", False)
    assert empty().nbytes == SIZE and not memory.zeros(torch.empty(0), SIZE).any()


def test_deterministic_mode_fills_what_is_not_initialised(pool) -> None:
    with poisoned_memory():
        assert empty(dtype=torch.float32).isnan().all()
    assert not pool.blocks


def test_threads_do_not_share(pool) -> None:
    done: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            out = empty(dtype=torch.int32).fill_(number)
            assert (out == number).all()
        done.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3]
    assert len(pool.blocks) <= 8, "a thread has a new one before its last is freed"


def test_another_thread_was_faster(pool) -> None:
    """A block that is gone between the choice and the taking is left to who took it."""

    class Raced(list):
        def remove(self, block):
            super().remove(block)
            if len(self) == 1:
                raise ValueError

    blocks = [pool.allocate(SIZE) for _ in range(2)]
    for block in blocks:
        pool.free(block)
    pool.blocks = Raced(pool.blocks)
    assert pool.allocate(SIZE) is blocks[0]


def _child(out: torch.Tensor, queue) -> None:
    torch.set_num_threads(1)  # those of the parent are not here
    kept = len(memory.pool.blocks)
    other = memory.empty(out, *out.shape).fill_(2)
    queue.put((kept, bool((out == 1).all()), bool((other == 2).all())))


def test_a_forked_child_has_its_own(pool) -> None:
    out, freed = empty().fill_(1), empty().fill_(3)
    del freed
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(out, queue))
    child.start()
    assert queue.get(timeout=60) == (0, True, True)
    child.join()
    assert (out == 1).all() and len(pool.blocks) == 1
