"""What launches the kernels of csrc/cuda, with a CuPy that notes what it is asked for; and the reasons why it cannot."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_support import FOLDER, decode_raw
from support import make_inputs

from lightning_attn.backends import cuda
from lightning_attn.backends.cuda import launch, route
from lightning_attn.dispatch import Spec

# ---- launches -------------------------------------------------------------------------------------------------


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
    launch._loaded.cache_clear()
    yield found
    launch._loaded.cache_clear()


@pytest.fixture
def with_fatbin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A build that had nvcc."""
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(launch, "CODE", tmp_path)
    for file in launch.FILES:
        launch.fatbin(file).touch()
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
    wanted = ("-std=c++17", "-ftz=true", "-DLIGHTNING_KERNEL=STEP(float32,float32,8,any,false)")
    assert [*driver.modules[1:]] == [{"code": launch.source("step"), "options": wanted}]
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
    weights, experts = cuda.moe_route_forward(torch.empty(0, 32), 2, True)
    dlogits = cuda.moe_route_backward(weights, torch.empty(0, 32), weights, experts, True)
    assert [y.shape for y in (o, weights, dlogits)] == [x.v.shape, (0, 2), (0, 32)] and not driver.launches


def test_a_sort_is_one_launch_or_three(driver: Driver, with_fatbin: Path) -> None:
    """One block where launches are the time."""
    for pairs in (0, route.CHUNK, route.CHUNK + 1):
        cuda.moe_sort(torch.zeros(pairs, 1, dtype=torch.int32), 40)
    found = [(name, grid[0], shared) for name, grid, _, _, shared, _ in driver.launches]
    one = ("sort_one_chunk", 1, 4 * (8 * 40 + 8))
    counted, placed = ("sort_count_chunk", 2, 4 * 8 * 40), ("sort_place_chunk", 2, 4 * (40 + 8))
    assert found == [one, one, counted, ("sort_sum_chunks", 40, 4 * 8), placed]
    assert driver.modules == [{"path": str(with_fatbin / "sort.fatbin")}] * 4


@pytest.mark.parametrize("driver", [200], indirect=True)
def test_without_code_for_the_device_nvrtc_compiles_a_route(driver: Driver, with_fatbin: Path) -> None:
    """As it does a step; a block has a token for each of its warps."""
    cuda.moe_route_forward(torch.zeros(9, 100), 2, True)
    assert driver.modules[-1]["code"] == launch.source("route")
    assert driver.modules[-1]["options"][-1] == "-DLIGHTNING_KERNEL=ROUTE(forward,float32,4)"
    ((name, grid, _, (parameters,), _, _),) = driver.launches
    assert (name, grid) == ("route_forward_float32_4", (2,)) and parameters["num_experts"] == 100


# ---- reasons --------------------------------------------------------------------------------------------------

SPEC = Spec("attention_decode", "cuda", torch.bfloat16, torch.float32, 128, 128)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ""),
        ({"op": "attention_forward"}, "lightning_attention_decode, moe_route and moe_sort only"),
        ({"op": "gated_rms_norm_forward"}, "lightning_attention_decode, moe_route and moe_sort only"),
        ({"op": "moe_mlp_forward"}, "lightning_attention_decode, moe_route and moe_sort only"),
        ({"device": "cpu"}, "CUDA tensors, not on cpu"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"state_dtype": torch.float16}, "states in float32 or bfloat16"),
        ({"K": 257}, "K from 1 to 256, not 257"),
        ({"V": 0}, "V from 1 to 256, not 0"),
        ({"op": "moe_route_forward", "K": 512, "V": 512, "state_dtype": torch.float32}, ""),
        ({"op": "moe_route_forward", "K": 513}, "1 to 512 experts, not 513"),
        ({"op": "moe_route_backward", "dtype": torch.float64}, "not torch.float64"),
        ({"op": "moe_sort", "K": 8, "V": 512, "dtype": torch.int32}, ""),
        ({"op": "moe_sort", "K": 8, "V": 513, "dtype": torch.int32}, "1 to 512 experts, not 513"),
        ({"op": "moe_sort", "dtype": torch.int64}, "int32, not torch.int64"),
        ({"op": "moe_sort", "device": "cpu", "dtype": torch.int32}, "CUDA tensors, not on cpu"),
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
    monkeypatch.setattr(launch, "CODE", tmp_path)
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
