"""Which tests run on which backend, and fixtures: a backend, a variant of one (a backend and, on the CPU, an instruction
set), a backend that is not here, a clean process state, no compiled code where a test asks for that, sequences that
are not cut, and a command line with small cases."""

import logging
import os
from collections.abc import Iterator
from typing import Any

# Before torch. Idle threads leave the cores to other work; MKL, with which plain PyTorch computes the baselines, gives
# the same bits wherever the memory lies.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("MKL_CBWR", "AUTO")
# On a GPU PyTorch wants it for products of matrices in the mode that fills memory with NaN (`poisoned_memory`).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Before the backends that are made for GPUs, which then run on CPU tensors. To count devices does not initialise CUDA.
if not torch.cuda.device_count():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("LIGHTNING_ATTN_EMULATE_CUDA", "1")

from support import ABSENT, BACKENDS, DTYPES, GPU_BACKENDS, INTERPRETED, ON_CPU, dtypes_of

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")


# Files that one process runs, one after the other: what their tests share takes long to make and several processes, or they
# need gigabytes.
ONE_BY_ONE = (
    "test_compiled.py",
    "test_benchmarks_gpu.py",
    "test_moe_large.py",
    "test_long.py",
    "test_gpu_large.py",
    "test_selection.py",
)
LONG = ("test_cli.py", "test_memory.py")  # of which single tests take long
MOST_PROCESSES = 8
WORKER = "PYTEST_XDIST_WORKER"  # which pytest-xdist sets in each, and what they start inherits


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in as many processes as there are cores; not so on a GPU, which they would share, nor where the
    command line selects tests, is to show what they print, or says how many processes there are (-n).
    """
    option = config.option
    whole = all(os.path.isdir(path) for path in config.args) and not (option.keyword or option.markexpr)
    shown = option.usepdb or option.trace or option.capture == "no"
    # Or this is one of the processes, or there is no pytest-xdist.
    said = WORKER in os.environ or getattr(option, "numprocesses", 0) is not None or option.dist != "no"
    if whole and not shown and not said and not torch.cuda.device_count():
        option.numprocesses = "auto"
        option.maxprocesses = option.maxprocesses or MOST_PROCESSES


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each process takes all cases of a test function, which have inputs and true results in common, and then the next."""
    if config.option.dist != "load":  # the default
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFunction(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            if os.path.basename(file) in ONE_BY_ONE:
                return "one by one"
            return f"{file}::{test.partition('[')[0]}"

    config.option.loadscopereorder = False  # the longest are the first, see below
    return ByFunction(config, log)


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "gpu: runs what is made for GPUs, on the GPU or, without one, interpreted or emulated on the CPU",
        "op(name): of a backend's raw functions needs this one, not attention_forward",
    ):
        config.addinivalue_line("markers", marker)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what runs on a GPU, and leaves out what says nothing of a backend: operators and dtypes that it does not
    take, and another number of threads if it has none of its own.
    """
    fewest: dict[object, int] = {}  # of each test that takes numbers of threads
    for item in items:
        if _backend(item) in GPU_BACKENDS:
            item.add_marker(pytest.mark.gpu)
        if threads := _parameters(item).get("threads"):
            fewest[item.function] = min(threads, fewest.get(item.function, threads))

    def idle(item: pytest.Item) -> bool:
        parameters, backend = _parameters(item), _backend(item)
        if backend not in BACKENDS or backend in ON_CPU:  # those take all there is
            return False
        taken = dtypes_of(backend, _op(item))
        if not taken or ((dtype := parameters.get("dtype")) in DTYPES and dtype not in taken):
            return True
        return parameters.get("threads", 0) > fewest.get(item.function, 0)

    kept, left_out = [], []
    for item in items:
        (left_out if idle(item) else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
    if WORKER in os.environ:  # so that no process is left alone with them at the end
        first = (*ONE_BY_ONE, *LONG)
        items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


def _op(item: pytest.Item) -> str:
    """The raw function that a test is about."""
    marker = item.get_closest_marker("op")
    return marker.args[0] if marker else "attention_forward"


def _backend(item: pytest.Item) -> object:
    parameters = _parameters(item)
    return parameters.get("variant", parameters.get("backend"))


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _variants() -> list[str]:
    """Every backend, and the cpu backend once for each instruction set that this machine has."""
    names = []
    for backend in BACKENDS:
        if backend == "cpu":
            from lightning_attn import _C

            names += [f"cpu-{name}" for name in _C.instruction_sets()]
        else:
            names.append(backend)
    return names


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend that works here."""
    return request.param


@pytest.fixture(params=_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend that works here, one instruction set after the other in use."""
    backend, _, instruction_set = request.param.partition("-")
    if not instruction_set:
        yield backend
        return
    from lightning_attn import _C

    best = _C.instruction_set()
    _C.use_instruction_set(instruction_set)
    yield backend
    _C.use_instruction_set(best)


@pytest.fixture(params=ABSENT)
def absent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a backend that is not here; one that is only interpreted or emulated is as it is without."""
    from lightning_attn import backends, ops

    if request.param in INTERPRETED:
        how = {"triton": "INTERPRETED", "cuda": "EMULATED"}[request.param]
        monkeypatch.setattr(backends.load(request.param), how, False)
    ops._resolve.cache_clear()
    yield request.param
    ops._resolve.cache_clear()


@pytest.fixture(autouse=True)
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with the default backend and two threads, whatever the environment says."""
    monkeypatch.delenv("LIGHTNING_ATTN_BACKEND", raising=False)
    monkeypatch.delenv("LIGHTNING_ATTN_CHECK", raising=False)
    monkeypatch.delenv("LIGHTNING_ATTN_AUTOTUNE", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()  # other processes want some of the GPU too


@pytest.fixture
def uncut(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sequence is cut in segments, as it may be where there is little beside it: its bits are its own."""
    torch.set_num_threads(1)
    if "triton" in BACKENDS:
        from triton_support import in_segments

        from lightning_attn.backends.triton import config

        monkeypatch.setattr(config, "segments", in_segments(1))


@pytest.fixture
def no_compiled_code(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """torch.compile starts with nothing compiled, and leaves nothing."""
    # Or a failure is buried under thousands of lines.
    caplog.set_level(logging.WARNING, logger="torch.__trace")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """check and bench see small cases, bench measures small limits and times each call a few times."""
    # Not at the top: only some tests want the command line.
    from cli_support import SMALL, bench_module, cases_module, check_module, machine_module

    monkeypatch.setattr(check_module, "check_cases", lambda: iter(SMALL))
    monkeypatch.setattr(bench_module, "bench_cases", lambda preset, dtypes, module: SMALL)
    monkeypatch.setattr(bench_module, "SECONDS_PER_CALL", 0.001)
    monkeypatch.setattr(cases_module, "COLD_BYTES", 2**16)
    monkeypatch.setattr(machine_module, "GEMM_SIZES", (64,))
    monkeypatch.setattr(machine_module, "COPY_BYTES", 2**20)
