"""What only csrc/cuda has: two compilers, kernels by alignment, and an emulator. Its launches are in
test_cuda_launch.py. The values of decode are in the tests of every backend, those of routing in test_cuda_route.py.
"""

import ctypes
import importlib.util
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from cuda_support import FOLDER, ROOT, decode_raw
from support import BACKENDS, assert_same_bits, device_of, dtype_id, make_inputs

from benchmarks import nvcc_report
from lightning_attn import _C, lightning_attention_decode
from lightning_attn.backends import cuda
from lightning_attn.backends.cuda import decode, launch, route

COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "nvcc.json").read_text())
TYPES = (torch.float32, torch.bfloat16, torch.float16)
STEPS = [
    decode.kernel(dtype, state, rows, access)
    for dtype in ("float32", "bfloat16", "float16")
    for state in ("float32", "bfloat16")
    for rows, access in (("1", "aligned"), ("2", "aligned"), ("4", "aligned"), ("8", "aligned"), ("8", "any"))
]
ROUTES = [
    route.route_kernel(way, dtype, 32 * per)
    for way in ("forward", "backward")
    for dtype in TYPES
    for per in route.PER_LANE
]
SORTS = [route.sort_kernel(way) for way in ("one_chunk", "count_chunk", "sum_chunks", "place_chunk")]
KERNELS = [*STEPS, *ROUTES, *SORTS]
decodes = pytest.mark.skipif("cuda" not in BACKENDS, reason="neither a GPU nor the emulator is there")
emulated = pytest.mark.skipif(not cuda.EMULATED, reason="the device has its own limits")


# ---- compilers ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
@pytest.mark.parametrize("arch", nvcc_report.ARCHS)
@pytest.mark.parametrize("file", launch.FILES)
def test_nvcc_spills_nothing_and_moves_16_bytes_at_a_time(file: str, arch: str) -> None:
    """Every kernel, for each target of the build."""
    rows = list(nvcc_report.compile_rows(arch, FOLDER / f"{file}.cu"))
    names = {kernel.name for kernel in KERNELS if kernel.file == file}
    assert {row.kernel for row in rows} == names
    assert not [row.fault for row in rows if row.fault]
    assert all(0 < row.registers <= 128 for row in rows)
    if COMMITTED["nvcc"] == nvcc_report.nvcc_version():
        committed = [row for row in COMMITTED["rows"] if row["arch"] == arch and row["kernel"] in names]
        assert [asdict(row) for row in rows] == committed


def test_the_committed_figures_are_those_of_the_sources() -> None:
    """Else `python -m benchmarks.nvcc_report --json benchmarks/results/nvcc.json` writes them anew."""
    assert COMMITTED["source_sha256"] == nvcc_report.digests()
    found = {(row["kernel"], row["arch"]) for row in COMMITTED["rows"]}
    assert found == {(kernel.name, arch) for kernel in KERNELS for arch in nvcc_report.ARCHS}


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
@pytest.mark.parametrize(
    "kernel",
    [STEPS[2], STEPS[8], STEPS[-1], ROUTES[2], ROUTES[9], ROUTES[-1], *SORTS],
    ids=lambda kernel: kernel.name,
)
def test_nvrtc_compiles_one_kernel_without_any_header(kernel: launch.Kernel, arch: str) -> None:
    """The way of a build without nvcc, and of architectures that the build did not know."""
    library, program = nvrtc(), ctypes.c_void_p()
    source = launch.source(kernel.file).encode()
    assert not library.nvrtcCreateProgram(ctypes.byref(program), source, b"kernel.cu", 0, None, None)
    options = [o.encode() for o in (*launch.OPTIONS, launch.option(kernel), f"-arch={arch}")]
    status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert not status, log.value.decode()
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, code)
    assert set(re.findall(rb"\.text\.(\w+)", code.raw)) == {kernel.name.encode()}


def test_the_build_brings_the_sources_and_compiles_as_nvrtc_does() -> None:
    """A kernel that is compiled at first use is that of the checkout, with the flags of the build."""
    assert {path.stem for path in FOLDER.glob("*.cu")} == set(launch.FILES)
    for file in launch.FILES:
        texts = [(FOLDER / name).read_text() for name in ("prelude.cuh", f"{file}.cu")]
        assert launch.source(file) == "".join(texts)
        if shutil.which("nvcc"):
            assert launch.fatbin(file).stat().st_size > 10_000
    flags = re.search(r"NVCC_FLAGS = \[(.*)\]", (ROOT / "setup.py").read_text())
    assert flags and re.findall(r'"(.*?)"', flags[1]) == ["-O3", *launch.OPTIONS]
    archs = re.search(r"CUDA_ARCHS = \[(.*)\]", (ROOT / "setup.py").read_text())
    assert archs and [f"sm_{arch}" for arch in re.findall(r'"(.*?)"', archs[1])] == [*nvcc_report.ARCHS]


def test_constants_are_those_of_the_sources() -> None:
    """What Python needs to know of the kernels to launch them."""
    texts = [path.read_text() for path in sorted(FOLDER.glob("*.cu*"))]
    found = dict(re.findall(r"constexpr int (k\w+) = (\d+);", "".join(texts)))
    assert found == {
        "kThreads": str(launch.THREADS),
        "kLanes": str(decode.LANES),
        "kTokens": str(decode.TOKENS),
        "kChunk": str(route.CHUNK),
        "kOwn": str(route.OWN),
    }


# ---- kernels by shape and alignment -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("K", "rows"), [(1, "1"), (32, "1"), (33, "2"), (64, "2"), (96, "4"), (128, "4"), (129, "8"), (256, "8")]
)
def test_a_thread_holds_as_many_rows_as_it_must(K: int, rows: str) -> None:
    assert decode.variant(torch.bfloat16, torch.empty(1, 1, K, 16)) == (
        "bfloat16",
        "float32",
        rows,
        "aligned",
    )


def test_16_bytes_at_a_time_only_where_every_row_allows_it() -> None:
    """Row 10: the width of V, the strides and the address."""

    def access(state: torch.Tensor) -> str:
        return decode.variant(torch.float32, state)[-1]

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
    assert [decode.variant(torch.float32, s)[-1] for s in (dense, odd)] == ["aligned", "any"]
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

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        state = x.initial_state.clone()
        o = lightning_attention_decode(x.q, x.k, x.v, x.decay, state, slots=slots, backend="cuda")
        return o, state

    expected = run()
    monkeypatch.setattr(decode, "GRID_LIMIT", 4)
    for a, b in zip(run(), expected, strict=True):
        assert_same_bits(a, b)


# ---- the emulator ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not _C.can_emulate_cuda(), reason="this build has no emulator")
def test_the_emulator_refuses_what_is_not_there() -> None:
    size = decode.PARAMETERS.itemsize
    with pytest.raises(ValueError, match="no kernel step_float64"):
        _C.emulate_cuda("step_float64", 1, 0, bytes(size))
    for name in ("step_float32_float32_8_any", "route_forward_float32_1", "sort_one_chunk"):
        with pytest.raises(ValueError, match="another size"):
            _C.emulate_cuda(name, 1, 0, bytes(size - 8))
    with pytest.raises(ValueError, match="too much shared memory"):
        _C.emulate_cuda("step_float32_float32_8_any", 1, 1 << 20, bytes(size))


@emulated
def test_the_emulator_sees_shared_memory_that_was_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate = launch.emulate
    monkeypatch.setattr(
        launch, "emulate", lambda launches: emulate(x._replace(shared=x.shared - 4) for x in launches)
    )
    experts = torch.zeros(3, 1, dtype=torch.int32)
    for call in (decode_raw, lambda: cuda.moe_sort(experts, 5), lambda: cuda.moe_sort(experts[:0], 1)):
        with pytest.raises(RuntimeError, match="shared memory"):
            call()
