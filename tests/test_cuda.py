"""What only csrc/cuda has: two compilers, kernels by alignment, a launch through CuPy, and an emulator. The values of its
kernels are in the tests of every backend.
"""

import ctypes
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support import BACKENDS, assert_same_bits, device_of, dtype_id, make_inputs

from lightning_attn import _C, lightning_attention_decode
from lightning_attn.backends import cuda
from lightning_attn.dispatch import Spec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are not installed

from benchmarks import nvcc_report

SOURCE = ROOT / "csrc" / "cuda" / "step.cu"
COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "nvcc.json").read_text())
TYPES = ("float32", "bfloat16", "float16")
VARIANTS = [
    (dtype, state, rows, access)
    for dtype in TYPES
    for state in ("float32", "bfloat16")
    for rows, access in (("1", "aligned"), ("2", "aligned"), ("4", "aligned"), ("8", "aligned"), ("8", "any"))
]
decodes = pytest.mark.skipif("cuda" not in BACKENDS, reason="neither a GPU nor the emulator is there")
emulated = pytest.mark.skipif(not cuda.EMULATED, reason="the device has its own limits")


# ---- compilers ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
@pytest.mark.parametrize("arch", nvcc_report.ARCHS)
def test_nvcc_spills_nothing_and_moves_16_bytes_at_a_time(arch: str) -> None:
    """Every kernel, for each target of the build."""
    rows = list(nvcc_report.compile_rows(arch))
    assert {row.kernel for row in rows} == {"_".join(("step", *variant)) for variant in VARIANTS}
    assert not [row.fault for row in rows if row.fault]
    assert all(0 < row.registers <= 128 for row in rows)
    if COMMITTED["nvcc"] == nvcc_report.nvcc_version():
        assert [asdict(row) for row in rows] == [row for row in COMMITTED["rows"] if row["arch"] == arch]


def test_the_committed_figures_are_those_of_the_source() -> None:
    """Else `python -m benchmarks.nvcc_report --json benchmarks/results/nvcc.json` writes them anew."""
    assert COMMITTED["source_sha256"] == nvcc_report.digest()
    assert {row["arch"] for row in COMMITTED["rows"]} == set(nvcc_report.ARCHS)


def test_a_spill_and_a_narrow_access_are_faults() -> None:
    good = nvcc_report.Row("step_float32_float32_4_aligned", "sm_90a", 72, 0, 0, 0, 4, 4)
    assert good.fault is None
    assert replace(good, wide_loads=None, wide_stores=None).fault is None  # nobody looked
    for wrong in (
        {"stack": 8},
        {"spill_stores": 4},
        {"spill_loads": 4},
        {"wide_loads": 0},
        {"wide_stores": 0},
    ):
        assert replace(good, **wrong).fault


def nvrtc() -> ctypes.CDLL | None:
    """NVIDIA's run-time compiler, of the package nvidia-cuda-nvrtc."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    # The second opens the first by its name, and finds it if it is loaded.
    libraries = [
        [*folder.glob("cu*/lib/libnvrtc-builtins.so.*"), *folder.glob("cu*/lib/libnvrtc.so.*")]
        for folder in folders
    ]
    loaded = [ctypes.CDLL(str(path)) for paths in libraries if len(paths) == 2 for path in paths]
    return loaded[-1] if loaded else None


@pytest.mark.skipif(nvrtc() is None, reason="NVRTC is not installed")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("variant", [VARIANTS[2], VARIANTS[8], VARIANTS[-1]], ids="_".join)
def test_nvrtc_compiles_one_kernel_without_any_header(variant: tuple[str, ...], arch: str) -> None:
    """The way of a build without nvcc, and of architectures that the build did not know."""
    library, program = nvrtc(), ctypes.c_void_p()
    assert not library.nvrtcCreateProgram(
        ctypes.byref(program), SOURCE.read_bytes(), b"step.cu", 0, None, None
    )
    options = [o.encode() for o in (*cuda.OPTIONS, cuda.definition(variant), f"-arch={arch}")]
    status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert not status, log.value.decode()
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, code)
    names = set(re.findall(rb"\.text\.(step_\w+)", code.raw))
    assert names == {"_".join(("step", *variant)).encode()}


def test_the_build_brings_the_source_and_compiles_as_nvrtc_does() -> None:
    """The kernel that is compiled at first use is that of the checkout, with the flags of the build."""
    assert cuda.source() == SOURCE.read_text()
    flags = re.search(r"NVCC_FLAGS = \[(.*)\]", (ROOT / "setup.py").read_text())
    assert flags and re.findall(r'"(.*?)"', flags[1]) == ["-O3", *cuda.OPTIONS]
    archs = re.search(r"CUDA_ARCHS = \[(.*)\]", (ROOT / "setup.py").read_text())
    assert archs and [f"sm_{arch}" for arch in re.findall(r'"(.*?)"', archs[1])] == [*nvcc_report.ARCHS]
    if shutil.which("nvcc"):
        assert cuda.FATBIN.stat().st_size > 10_000


def test_constants_are_those_of_the_source() -> None:
    """What Python needs to know of the kernel to launch it."""
    found = dict(re.findall(r"constexpr int (k\w+) = (\d+);", SOURCE.read_text()))
    assert found == {
        "kThreads": str(cuda.THREADS),
        "kLanes": str(cuda.LANES),
        "kTokens": str(cuda.TOKENS),
    }


# ---- kernels by shape and alignment -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("K", "rows"), [(1, "1"), (32, "1"), (33, "2"), (64, "2"), (96, "4"), (128, "4"), (129, "8"), (256, "8")]
)
def test_a_thread_holds_as_many_rows_as_it_must(K: int, rows: str) -> None:
    assert cuda.variant(torch.bfloat16, torch.empty(1, 1, K, 16)) == ("bfloat16", "float32", rows, "aligned")


def test_16_bytes_at_a_time_only_where_every_row_allows_it() -> None:
    """Row 10: the width of V, the strides and the address."""

    def access(state: torch.Tensor) -> str:
        return cuda.variant(torch.float32, state)[-1]

    float32, bfloat16 = torch.float32, torch.bfloat16
    assert access(torch.empty(3, 2, 8, 4, dtype=float32)) == "aligned"
    assert access(torch.empty(3, 2, 8, 6, dtype=float32)) == "any"
    assert access(torch.empty(3, 2, 8, 8, dtype=bfloat16)) == "aligned"
    assert access(torch.empty(3, 2, 8, 12, dtype=bfloat16)) == "any"
    storage = torch.empty(1000, dtype=float32)
    assert access(storage.as_strided((3, 2, 8, 4), (64, 32, 4, 1))) == "aligned"
    assert access(storage.as_strided((3, 2, 8, 4), (65, 32, 4, 1))) == "any"
    assert access(storage.as_strided((3, 2, 8, 4), (68, 34, 4, 1))) == "any"
    assert access(storage.as_strided((1, 1, 8, 4), (65, 33, 4, 1))) == "aligned"  # strides that lead nowhere
    assert access(storage.as_strided((3, 2, 8, 4), (64, 32, 4, 1), 1)) == "any"


@decodes
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("T", [1, 8, 9, 17])
def test_a_state_gives_the_same_bits_wherever_it_lies(T: int, state_dtype: torch.dtype) -> None:
    """Row 10: 16 bytes at a time or one element after the other, in as many rows a thread."""
    x = make_inputs(B=2, T=T, H=2, K=200, V=24).to(device_of("cuda"))
    dense = x.initial_state.to(state_dtype)
    storage = torch.full((dense.numel() + 8,), torch.nan, dtype=state_dtype, device=dense.device)
    odd = storage[1 : 1 + dense.numel()].view(dense.shape).copy_(dense)
    assert [cuda.variant(torch.float32, s)[-1] for s in (dense, odd)] == ["aligned", "any"]
    outputs = [
        lightning_attention_decode(x.q, x.k, x.v, x.decay, state, scale=x.scale, backend="cuda")
        for state in (dense, odd)
    ]
    assert_same_bits(*outputs)
    assert_same_bits(odd, dense)
    assert storage[0].isnan() and storage[1 + dense.numel() :].isnan().all()


@decodes
def test_tokens_at_once_are_tokens_in_turn() -> None:
    """Row 18: the state is rounded once for all tokens of a call, so in float32 no bit differs."""
    x = make_inputs(B=2, T=11, H=2, K=40, V=24).to(device_of("cuda"))
    once, in_turn = x.initial_state.clone(), x.initial_state.clone()
    o = lightning_attention_decode(x.q, x.k, x.v, x.decay, once, backend="cuda")
    for t in range(11):
        q, k, v = (y[:, t : t + 1] for y in (x.q, x.k, x.v))
        assert_same_bits(
            lightning_attention_decode(q, k, v, x.decay, in_turn, backend="cuda"), o[:, t : t + 1]
        )
    assert_same_bits(once, in_turn)


@emulated
def test_more_heads_than_a_grid_has_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 15: blocks take the rest in turn."""
    x = make_inputs(B=3, T=9, H=5, K=16, V=70)
    slots = torch.tensor([2, -1, 0])

    def decode() -> tuple[torch.Tensor, torch.Tensor]:
        state = x.initial_state.clone()
        o = lightning_attention_decode(x.q, x.k, x.v, x.decay, state, slots=slots, backend="cuda")
        return o, state

    expected = decode()
    monkeypatch.setattr(cuda, "GRID_LIMIT", 4)
    for a, b in zip(decode(), expected, strict=True):
        assert_same_bits(a, b)


# ---- the launch, with a CuPy that notes what it is asked for ------------------------------------------------------


class Driver:
    """What stands for CuPy: which modules were asked for, and the launches."""

    def __init__(self, status: int | None) -> None:
        self.modules: list[dict[str, Any]] = []
        self.launches: list[tuple[Any, ...]] = []
        self.status = status  # with which ahead-of-time code fails to load

    def RawModule(self, **options: Any) -> "Driver":
        self.modules.append(options)
        if "path" in options and self.status is not None:
            raise CUDADriverError(self.status)
        return self

    def get_function(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(kernel=lambda *launch: self.launches.append((name, *launch)))


class CUDADriverError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Driver]:
    """CUDA as it would be with one device whose current stream is 1234."""
    found = Driver(getattr(request, "param", None))
    stream = SimpleNamespace(from_external=lambda x: x.__cuda_stream__())
    modules = {
        "cupy": SimpleNamespace(RawModule=found.RawModule),
        "cupy.cuda": SimpleNamespace(Stream=stream),
        "cupy_backends.cuda.api.driver": SimpleNamespace(CUDADriverError=CUDADriverError),
        "cupy_backends": ModuleType("cupy_backends"),
        "cupy_backends.cuda": ModuleType("cupy_backends.cuda"),
        "cupy_backends.cuda.api": ModuleType("cupy_backends.cuda.api"),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: memoryview(b""))  # any context manager
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=1234))
    monkeypatch.setattr(cuda, "EMULATED", False)
    cuda._kernel.cache_clear()
    yield found
    cuda._kernel.cache_clear()


def decode_raw(B: int = 3, T: int = 1, state_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = make_inputs(B=B, T=T, H=5, K=128, V=70)
    return cuda.attention_decode(
        x.q, x.k, x.v, x.decay, x.initial_state.to(state_dtype), torch.tensor([2, -1, 0]), 0.5
    )


@pytest.fixture
def with_fatbin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A build that had nvcc."""
    (tmp_path / "step.fatbin").touch()
    shutil.copy(SOURCE, tmp_path)
    monkeypatch.setattr(cuda, "SOURCE", tmp_path / "step.cu")
    monkeypatch.setattr(cuda, "FATBIN", tmp_path / "step.fatbin")
    return tmp_path


def test_a_launch_is_on_the_current_stream_with_blocks_for_every_tile(
    driver: Driver, with_fatbin: Path
) -> None:
    """Row 23: and the code of the build is loaded once."""
    decode_raw(T=3)
    decode_raw(T=20)
    assert driver.modules == [{"path": str(with_fatbin / "step.fatbin")}]
    (name, grid, block, arguments, shared, stream), second = driver.launches
    assert (name, grid, block) == ("step_float32_float32_8_any", (3 * 5 * 3,), (256,))  # 70 columns: 3 tiles
    assert stream == (0, 1234)
    assert shared == 3 * 8 * 32 * 4 and second[4] == 8 * 8 * 32 * 4  # [tokens, warps, columns]
    (parameters,) = arguments
    assert parameters.size == 1 and parameters["tokens"] == 3 and parameters["slot_bytes"] == 8


@pytest.mark.parametrize("driver", [200, 209], indirect=True)
def test_without_code_for_the_device_nvrtc_compiles_the_one_kernel(driver: Driver, with_fatbin: Path) -> None:
    """An architecture that the build did not know."""
    decode_raw()
    wanted = ("-std=c++17", "-ftz=true", "-DLIGHTNING_STEP=float32,float32,8,any,false")
    assert [*driver.modules[1:]] == [{"code": SOURCE.read_text(), "options": wanted}]
    assert len(driver.launches) == 1


@pytest.mark.parametrize("driver", [2, 700], indirect=True)
def test_other_errors_of_the_driver_are_not_swallowed(driver: Driver, with_fatbin: Path) -> None:
    """Out of memory, or an error of a kernel before."""
    with pytest.raises(CUDADriverError):
        decode_raw()


def test_without_nvcc_at_the_build_nvrtc_compiles(driver: Driver, with_fatbin: Path) -> None:
    (with_fatbin / "step.fatbin").unlink()
    decode_raw()
    assert [set(module) for module in driver.modules] == [{"code", "options"}]


def test_nothing_to_do_launches_nothing(driver: Driver) -> None:
    """Row 11."""
    x = make_inputs(B=2, T=0, H=3)
    o = cuda.attention_decode(x.q, x.k, x.v, x.decay, x.initial_state, None, 1.0)
    assert o.shape == x.v.shape and not driver.launches


# ---- the emulator ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not _C.can_emulate_cuda(), reason="this build has no emulator")
def test_the_emulator_refuses_what_is_not_there() -> None:
    size = cuda._DECODE.itemsize
    with pytest.raises(ValueError, match="no kernel step_float64"):
        _C.emulate_cuda("step_float64", 1, 0, bytes(size))
    with pytest.raises(ValueError, match="another size"):
        _C.emulate_cuda("step_float32_float32_8_any", 1, 0, bytes(size - 8))
    with pytest.raises(ValueError, match="too much shared memory"):
        _C.emulate_cuda("step_float32_float32_8_any", 1, 1 << 20, bytes(size))


@emulated
def test_the_emulator_sees_shared_memory_that_was_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = cuda._launch
    monkeypatch.setattr(
        cuda, "_launch", lambda variant, blocks, shared, *rest: launch(variant, blocks, shared - 4, *rest)
    )
    with pytest.raises(RuntimeError, match="shared memory"):
        decode_raw()


# ---- reasons --------------------------------------------------------------------------------------------------

SPEC = Spec("attention_decode", "cuda", torch.bfloat16, torch.float32, 128, 128)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ""),
        ({"op": "attention_forward"}, "lightning_attention_decode only"),
        ({"op": "gated_rms_norm_forward"}, "lightning_attention_decode only"),
        ({"device": "cpu"}, "CUDA tensors, not on cpu"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"state_dtype": torch.float16}, "states in float32 or bfloat16"),
        ({"K": 257}, "K from 1 to 256, not 257"),
        ({"V": 0}, "V from 1 to 256, not 0"),
    ],
)
def test_reasons(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], says: str) -> None:
    """What it takes, on a device of capability 9.0."""
    monkeypatch.setattr(cuda, "EMULATED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    reasons = ", ".join(cuda.supports(replace(SPEC, **change)))
    assert says in reasons if says else not reasons


def test_an_old_device_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "EMULATED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert cuda.supports(SPEC) == ["it needs compute capability 8.0 or later"]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, another maker's, no CuPy."""
    monkeypatch.setattr(cuda, "EMULATED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "NVIDIA GPU" in (cuda.unavailable() or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "NVIDIA GPU" in (cuda.unavailable() or "")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "CuPy is not installed" in (cuda.unavailable() or "")


def a_cupy(*, version: str = "14.2.0", driver: bool = True, nvrtc: bool = True) -> SimpleNamespace:
    """As much of CuPy as is looked at; something of it may not be there."""

    def fails() -> None:
        raise RuntimeError("cudaErrorInsufficientDriver")

    stream = SimpleNamespace(from_external=None) if version >= "14" else SimpleNamespace()
    works = SimpleNamespace(getDeviceCount=lambda: 1, getVersion=lambda: (13, 0))
    broken = SimpleNamespace(getDeviceCount=fails, getVersion=fails)
    cuda = SimpleNamespace(
        Stream=stream, runtime=works if driver else broken, nvrtc=works if nvrtc else broken
    )
    return SimpleNamespace(__version__=version, cuda=cuda)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (a_cupy(), None),
        (a_cupy(version="13.6.0"), "it needs CuPy 14 or later, not 13.6.0"),
        (a_cupy(driver=False), "CuPy does not work: cudaErrorInsufficientDriver"),
        (a_cupy(nvrtc=False), "CuPy does not work: cudaErrorInsufficientDriver"),
    ],
)
def test_a_cupy_that_cannot_do_it_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: SimpleNamespace, says: str | None
) -> None:
    """So that "auto" goes on to the next backend."""
    monkeypatch.setattr(cuda, "EMULATED", False)
    monkeypatch.setattr(cuda, "FATBIN", tmp_path / "step.fatbin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(sys.modules, "cupy", found)
    assert cuda.unavailable() == says


def test_a_cupy_that_fails_on_import_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It makes its cache directory then, which may not be allowed."""
    (tmp_path / "cupy.py").write_text("raise PermissionError('/home/.cupy')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(cuda, "EMULATED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    assert cuda.unavailable() == "CuPy does not work: /home/.cupy"
