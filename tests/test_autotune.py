"""Tiles by trial: every option gives the same results, what is wrong is out of the race, what is known is not tried
again, and nothing happens unless the environment asks for it.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from support import BACKENDS, assert_same_bits, check, device_of, dtype_id, make_inputs, run
from torch import Tensor

from lightning_attn import lightning_attention

pytest.importorskip("triton", reason="Triton is not installed")
if "triton" not in BACKENDS:
    pytest.skip("there is neither a GPU nor Triton's interpreter", allow_module_level=True)

from lightning_attn.backends.triton import autotune, config, tile_file, trials
from lightning_attn.backends.triton.autotune import Kernel, Tuner
from lightning_attn.backends.triton.config import Tiles
from lightning_attn.backends.triton.launch import Launch

DEVICE = torch.device(device_of("triton"))
ARCH = config.device_arch(DEVICE)
KERNELS = [config.chunk, config.chunk_state, config.chunk_backward, config.chunk_backward_split]


def configurations(*dtypes: torch.dtype, K: int = 16, V: int = 16) -> list[Kernel]:
    """Those that the machine's architecture has."""
    found = [Kernel(configured, K, V, dtype, ARCH) for configured in KERNELS for dtype in dtypes]
    return [kernel for kernel in found if configured_tiles(kernel)]


def configured_tiles(kernel: Kernel) -> Tiles | None:
    try:
        return kernel.configured(kernel.K, kernel.V, kernel.dtype, kernel.arch)
    except AssertionError:  # where a whole state fits nothing is split
        return None


def kernel_id(kernel: object) -> str:
    return f"{kernel.name}-{dtype_id(kernel.dtype)}" if isinstance(kernel, Kernel) else ""


each_kernel = pytest.mark.parametrize("kernel", configurations(torch.float32), ids=kernel_id)
CHUNK = configurations(torch.float32)[0]


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A process that has just begun, with tuning on. The path of its file, which is not there yet."""
    monkeypatch.setenv("LIGHTNING_ATTN_AUTOTUNE", "1")
    monkeypatch.setenv("LIGHTNING_ATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "process", Tuner())
    return tmp_path / "cache" / "tiles.json"


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are searched for, as they come; the last option is what is found."""
    searched = []

    def search(kernel: Kernel, options: list[Tiles], device: torch.device) -> Tiles:
        searched.append(kernel.name)
        return options[-1]

    monkeypatch.setattr(autotune, "search", search)
    return searched


def ask(kernel: Kernel = CHUNK) -> Tiles:
    """The tiles of a kernel, in a process that has just begun."""
    autotune.process = Tuner()
    return autotune.tiles(kernel.configured, kernel.K, kernel.V, kernel.dtype, kernel.arch, DEVICE)


def entries(path: Path) -> dict[str, dict[str, int]]:
    return json.loads(path.read_text())["tiles"]


def attend(dtype: torch.dtype = torch.float32, **shape: object) -> Tensor:
    x = make_inputs(**{"B": 1, "T": 20, "H": 1, "K": 16, "V": 16, "dtype": dtype, **shape})
    y = x.to(str(DEVICE))
    tensors = y.q, y.k, y.v, y.decay
    return lightning_attention(*tensors, cu_seqlens=y.cu_seqlens, backend="triton")


def disagreements(caught: pytest.WarningsRecorder) -> list[str]:
    """The warnings of that kind; Triton and NumPy have others of their own."""
    return [str(warning.message) for warning in caught.list if "disagree" in str(warning.message)]


def clock_of(monkeypatch: pytest.MonkeyPatch, seconds) -> None:
    """The time of a launch is what `seconds` says of its tiles."""
    monkeypatch.setattr(trials.Problem, "time", lambda problem, tiles: seconds(tiles))


# ---- what there is to choose from -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [*config.ARCHS.values(), config.INTERPRETER], ids=lambda arch: arch.name)
def test_candidates(arch: config.Arch) -> None:
    """The configured tiles and a couple of dozen of their neighbours at most, whatever the shape."""
    for K, V in ((1, 1), (16, 256), (64, 64), (100, 130), (256, 256), (256, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            for configured in KERNELS:
                kernel = Kernel(configured, K, V, dtype, arch)
                if not (usual := configured_tiles(kernel)):
                    continue
                options = autotune.candidates(kernel)
                assert options[0] == usual and len(set(options)) == len(options)
                assert 1 < len(options) <= 24 or (arch == config.INTERPRETER and options)
                for x in options:
                    assert x.key == usual.key
                    assert x == usual or (
                        16 <= x.block <= 128 and x.warps in (4, 8, 16) and 1 <= x.stages <= 4
                    )
                    assert all(n & (n - 1) == 0 for n in (x.block, x.value, x.warps))
                    assert 16 <= x.value <= config.power_of_two(max(K, V))
                    if configured is config.chunk_backward:
                        assert x.value >= V  # a whole state


def test_candidates_that_cannot_fit_are_left_out() -> None:
    """No stages that ask for more than the shared memory, no tiles that ask for more than the registers."""
    ampere = config.ARCHS["sm_86"]
    kernel = Kernel(config.chunk, 256, 256, torch.bfloat16, ampere)
    least = [x.block * (x.key + x.value) * 2 * (x.stages - 1) for x in autotune.candidates(kernel)]
    assert max(least) <= ampere.shared
    assert max(x.stages for x in autotune.candidates(replace(kernel, arch=replace(ampere, shared=4096)))) <= 2
    for x in autotune.candidates(replace(kernel, arch=config.ARCHS["sm_90"])):
        assert x.key * x.value <= x.warps * 32 * 255


def test_a_key_has_no_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 22: it is for a kernel, K, V, dtype, architecture, compiler and source, not for how many processors."""
    assert replace(CHUNK, arch=replace(ARCH, processors=7)).key == CHUNK.key
    others = [
        replace(CHUNK, configured=config.chunk_state),
        replace(CHUNK, K=17),
        replace(CHUNK, V=17),
        replace(CHUNK, dtype=torch.float16),
        replace(CHUNK, arch=replace(ARCH, name="sm_90")),
    ]
    keys = {kernel.key for kernel in (CHUNK, *others)}
    monkeypatch.setattr("triton.__version__", "3.9.9")
    keys.add(CHUNK.key)
    monkeypatch.setattr(autotune, "_source", lambda: "another")
    assert len({*keys, CHUNK.key}) == len(others) + 3


# ---- the race -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel", [*configurations(torch.float32), *configurations(torch.float16, V=24)], ids=kernel_id
)
def test_every_candidate_agrees(kernel, monkeypatch, caplog, recwarn) -> None:
    """Row 22: outputs, states and gradients, in time or not."""
    timed = []
    clock_of(monkeypatch, lambda tiles: timed.append(tiles) or 1.0)
    caplog.set_level(logging.INFO, logger=autotune.__name__)
    options = autotune.candidates(kernel)
    assert autotune.search(kernel, options, DEVICE) == options[0]
    assert not disagreements(recwarn)
    out = [message for message in caplog.messages if " is out: " in message]
    assert len(timed) + len(out) == len(options)
    assert all("OutOfResources" in message for message in out)  # on a device that has less than it takes


def test_every_candidate_of_the_split_backward_agrees(monkeypatch, recwarn) -> None:
    """Where a whole state does not fit, which in the interpreter takes states that are too large for a test."""

    def chunk_backward_split(K: int, V: int, dtype: torch.dtype, arch: config.Arch) -> Tiles:
        return Tiles(128, 16, 16, 4, 1)

    monkeypatch.setattr(config, "chunk_backward", lambda K, V, dtype, arch: None)
    monkeypatch.setattr(config, "chunk_backward_split", chunk_backward_split)
    kernel = Kernel(chunk_backward_split, 10, 20, torch.float16, ARCH)
    timed = []
    clock_of(monkeypatch, lambda tiles: timed.append(tiles) or 1.0)
    options = autotune.candidates(kernel)
    assert {x.value for x in options} == {16, 32}
    autotune.search(kernel, options, DEVICE)
    assert timed == options and not disagreements(recwarn)


def spoil(monkeypatch, kernel: Kernel, bad: Tiles, how: Callable[[Tensor], None], output: str, only) -> None:
    """The kernel with the tiles `bad` gets the last head of an output wrong, in launches of which `only` is true."""
    right = Launch.run

    def run_wrong(launch: Launch) -> None:
        right(launch)
        if launch.name == kernel.name and launch.tiles == bad and only(launch):
            x = launch.arguments[output][0]
            how(x.select(2 if output in ("o", "dk", "dv") else 1, -1))

    monkeypatch.setattr(Launch, "run", run_wrong)


def off(x: Tensor) -> None:
    """The last element that is written is off by a hundredth of the largest."""
    x[_last(x)] += 0.01 * x.nan_to_num().abs().max()


def unwritten(x: Tensor) -> None:
    """As if the last element that is written were not."""
    x[_last(x)] = torch.nan


def _last(x: Tensor) -> tuple[Tensor, ...]:
    return x.isfinite().nonzero()[-1].unbind()


OUTPUTS = {
    "chunk": ("o", "final"),
    "chunk_state": ("entering",),
    "chunk_backward": ("dk", "dv", "dinitial"),
    "chunk_backward_split": ("dk", "dv", "dinitial"),
}


def unlike(launch: Launch) -> bool:
    """Whether it is of the call that is not timed."""
    backward_in_time = launch.name == "chunk_state" and launch.constants["REVERSE"]
    return launch.arguments["cu_seqlens"] is not None or backward_in_time


def alike(launch: Launch) -> bool:
    return not unlike(launch)


@pytest.mark.parametrize(
    ("kernel", "output", "how", "only"),
    [
        pytest.param(kernel, output, how, only, id=f"{kernel.name}-{output}-{how.__name__}-{only.__name__}")
        for kernel in configurations(torch.float16)
        for output in OUTPUTS[kernel.name]
        for how, only in ((off, alike), (off, unlike), (unwritten, unlike))
    ],
)
def test_a_candidate_that_disagrees_is_out(kernel, output, how, only, monkeypatch) -> None:
    """One wrong element of one output, of the call that is timed or of the other: the fastest, but not chosen."""
    good, bad, *_ = autotune.candidates(kernel)
    spoil(monkeypatch, kernel, bad, how, output, only)
    clock_of(monkeypatch, lambda tiles: 0.1 if tiles == bad else 1.0)
    with pytest.warns(RuntimeWarning, match="disagree") as caught:
        assert autotune.search(kernel, [good, bad], DEVICE) == good
    (message,) = disagreements(caught)
    assert str(bad) in message and kernel.key in message


@each_kernel
def test_a_candidate_that_fails_is_out(kernel, monkeypatch, recwarn, caplog) -> None:
    """For want of shared memory or whatever else; a failure of the configured tiles is raised."""
    from triton.runtime.errors import OutOfResources

    good, bad, *_ = autotune.candidates(kernel)
    right, failing = Launch.run, bad

    def launched(launch: Launch) -> None:
        if launch.name == kernel.name and launch.tiles == failing:
            raise OutOfResources(300_000, 232_448, "shared memory")
        right(launch)

    monkeypatch.setattr(Launch, "run", launched)
    clock_of(monkeypatch, lambda tiles: 0.1 if tiles == bad else 1.0)
    caplog.set_level(logging.INFO, logger=autotune.__name__)
    assert autotune.search(kernel, [good, bad], DEVICE) == good
    assert not disagreements(recwarn) and "OutOfResources" in caplog.text
    failing = good
    with pytest.raises(OutOfResources):
        autotune.search(kernel, [good, bad], DEVICE)


def test_configured_tiles_that_leave_something_unwritten(monkeypatch) -> None:
    """Nothing could be compared with them."""
    good, bad, *_ = autotune.candidates(CHUNK)
    spoil(monkeypatch, CHUNK, good, unwritten, "o", alike)
    with pytest.raises(FloatingPointError, match="^o is not finite, or not all written"):
        autotune.search(CHUNK, [good, bad], DEVICE)


def test_the_fastest_is_chosen(monkeypatch) -> None:
    """If it saves more than noise would."""
    usual, *others = (Tiles(64, 16, 16, 4, stages) for stages in (3, 1, 2, 4))
    empty = trials.Problem(lambda tiles: trials.Trial([], {"o": (torch.zeros(1, 1, 1, 1), 2)}), 0.0)
    monkeypatch.setattr(trials, "problems", lambda kernel, device: [empty])
    for fastest in others:
        clock_of(monkeypatch, lambda tiles, x=fastest: 0.5 if tiles == x else 0.9 if tiles != usual else 1.0)
        assert autotune.search(CHUNK, [usual, *others], DEVICE) == fastest
    clock_of(monkeypatch, lambda tiles: 1.0 if tiles == usual else 0.99)
    assert autotune.search(CHUNK, [usual, *others], DEVICE) == usual


@pytest.mark.parametrize("configured", KERNELS, ids=lambda configured: configured.__name__)
def test_the_launch_that_is_timed(configured) -> None:
    """It is that of the kernel, with the tiles that are tried, and keeps every processor of a device busy."""
    arch = replace(config.ARCHS["sm_90"], processors=3)
    K = V = 64 if configured is config.chunk_backward else 128
    kernel = Kernel(configured, K, V, torch.bfloat16, arch)
    for tiles in autotune.candidates(kernel):
        for problem in trials.problems(kernel, torch.device("cpu")):
            assert problem.make(tiles).launches[-1].name == kernel.name
            assert problem.make(tiles).launches[-1].tiles == tiles
            tokens = problem.make(tiles).launches[-1].arguments["tokens"]
            assert tokens % 16 and tokens > 512  # more than one block of any tiles, the last one not full
        trial = trials.problems(kernel, torch.device("cpu"))[0].make(tiles)
        assert trial.launches[-1].programs >= 3
        assert trial.launches[-1].bytes > 3 * 2**19  # per processor, more than its share of any L2 cache


@each_kernel
def test_runs_start_afresh(kernel: Kernel) -> None:
    """Row 22: outputs hold NaN, and two runs of one problem have the same bits and share no output."""
    for problem in trials.problems(kernel, DEVICE):
        usual = autotune.candidates(kernel)[0]
        assert all(x.isnan().all() for x, _ in problem.make(usual).outputs.values())
        first, second = (problem.results(usual) for _ in range(2))
        for name, (x, _) in first.items():
            assert_same_bits(x, second[name][0], name)
            assert x.data_ptr() != second[name][0].data_ptr()


# ---- once, and for all lengths --------------------------------------------------------------------------------


def test_a_call_that_tunes_is_right(process: Path, monkeypatch) -> None:
    """The rule for outputs and gradients; the first call is the second and that of the next process, bit by bit."""
    x = make_inputs(B=2, T=70, H=2, K=16, V=16, dtype=torch.float16)
    numbers = torch.get_rng_state()
    first = run(x, "triton")
    check(first, x)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert {key.split()[0] for key in entries(process)} >= {"chunk"}
    monkeypatch.setattr(autotune, "search", lambda *arguments: pytest.fail("tuned again"))
    for tuner in (autotune.process, Tuner()):
        monkeypatch.setattr(autotune, "process", tuner)
        for name, y in run(x, "triton").items():
            assert_same_bits(y, first[name], name)


def test_no_length_is_tuned_for(searches: list[str]) -> None:
    """Row 22, fla #1147: nor a batch, a number of heads or of documents."""
    attend()
    assert searches == ["chunk"]
    for shape in ({"T": 1}, {"T": 333}, {"B": 3}, {"H": 2}, {"lengths": (3, 0, 20)}, {"lengths": (7,)}):
        attend(**shape)
    assert searches == ["chunk"]
    attend(K=17)
    attend(dtype=torch.float16)
    assert searches == ["chunk"] * 3


def test_threads_tune_once(monkeypatch) -> None:
    """Whoever comes while another one searches waits for what it finds."""
    searched = []

    def search(kernel: Kernel, options: list[Tiles], device: torch.device) -> Tiles:
        searched.append(kernel)
        time.sleep(0.1)
        return options[-1]

    monkeypatch.setattr(autotune, "search", search)
    found = []

    def tiles() -> None:
        found.append(autotune.process.tiles(CHUNK, DEVICE))

    threads = [threading.Thread(target=tiles) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert searched == [CHUNK] and found == [autotune.candidates(CHUNK)[-1]] * 4


def test_nothing_is_tried_in_the_capture_of_a_graph(monkeypatch, process: Path, searches: list[str]) -> None:
    """The configured tiles, and they are not kept; what is known already is used."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    device = torch.device("cuda", 0)
    usual, *_, last = autotune.candidates(CHUNK)
    assert autotune.process.tiles(CHUNK, device) == usual
    assert not searches and not process.exists()
    capturing = False
    assert autotune.process.tiles(CHUNK, device) == last
    capturing = True
    assert autotune.process.tiles(CHUNK, device) == last


# ---- when not asked for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "0"])
def test_without_the_environment_no_file_is_touched(value, process: Path, searches, monkeypatch) -> None:
    """The tiles of `config`, even where the file has others."""
    ask()
    before = process.stat().st_mtime_ns, process.stat().st_atime_ns
    for name in ("read", "store"):
        monkeypatch.setattr(tile_file, name, lambda *arguments: pytest.fail("the file is touched"))
    if value is None:
        monkeypatch.delenv("LIGHTNING_ATTN_AUTOTUNE")
    else:
        monkeypatch.setenv("LIGHTNING_ATTN_AUTOTUNE", value)
    assert ask() == autotune.candidates(CHUNK)[0]
    attend()
    assert searches == ["chunk"] and (process.stat().st_mtime_ns, process.stat().st_atime_ns) == before


def test_launches_that_never_run_are_not_tuned(searches: list[str]) -> None:
    """On the meta device, where they are compiled and counted."""
    arguments = (16, 16, torch.float16, config.ARCHS["sm_90"])
    found = autotune.tiles(config.chunk, *arguments, torch.device("meta"))
    assert found == config.chunk(*arguments) and not searches


def test_what_cannot_run_is_not_tuned(searches: list[str]) -> None:
    """No program can hold a whole state of this size."""
    assert autotune.tiles(config.chunk_backward, 256, 256, torch.float32, ARCH, DEVICE) is None
    assert not searches


# ---- the file -------------------------------------------------------------------------------------------------


def test_the_file_keeps_what_was_found(process: Path, searches: list[str]) -> None:
    """From one process to the next; and with it what others have found meanwhile."""
    found = ask()
    assert entries(process) == {CHUNK.key: asdict(found)}
    assert found != autotune.candidates(CHUNK)[0]
    assert ask() == found and searches == ["chunk"]

    ours, theirs = Tuner(), Tuner()
    ours.tiles(CHUNK, DEVICE)
    backward, states = replace(CHUNK, K=17), replace(CHUNK, V=17)
    theirs.tiles(backward, DEVICE)
    ours.tiles(states, DEVICE)
    assert entries(process).keys() == {CHUNK.key, backward.key, states.key}
    assert [path.name for path in process.parent.iterdir()] == ["tiles.json"]  # and no half of one


def test_the_file_is_read_once(process: Path, searches: list[str]) -> None:
    """What it held at first stays known."""
    other = replace(CHUNK, K=17)
    ask(CHUNK)
    ask(other)
    tuner = Tuner()
    tuner.tiles(CHUNK, DEVICE)
    process.unlink()
    tuner.tiles(other, DEVICE)
    assert searches == ["chunk"] * 2


FOREIGN = {
    "empty": b"",
    "half": b'{"format": 1, "tiles": {"chunk',
    "not text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "a list": b"[1, 2]",
    "another format": b'{"format": 2, "tiles": {}}',
    "no tiles": b'{"format": 1}',
    "a list of tiles": b'{"format": 1, "tiles": []}',
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_that_is_not_ours_is_replaced(content: bytes, process: Path, searches: list[str]) -> None:
    process.parent.mkdir()
    process.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="^no tuned tiles are read: "):
        found = ask()
    assert searches == ["chunk"] and entries(process) == {CHUNK.key: asdict(found)}


@pytest.mark.parametrize(
    "change",
    [
        {"block": 48},
        {"block": 1024},
        {"block": "64"},
        {"block": None},
        {"key": 32},
        {"value": -16},
        {"warps": 5},
        {"stages": 99},
        {"more": 1},
    ],
    ids=str,
)
def test_an_entry_that_cannot_be_is_replaced(change: dict, process: Path, searches: list[str]) -> None:
    """Whatever its types and values: tiles come from the candidates alone. Other entries stay."""
    usual = asdict(autotune.candidates(CHUNK)[0])
    other = {"block": "of another version"}
    process.parent.mkdir()
    process.write_text(json.dumps({"format": 1, "tiles": {CHUNK.key: usual | change, "other": other}}))
    with pytest.warns(RuntimeWarning, match="are no tiles that it can have"):
        found = ask()
    assert searches == ["chunk"]
    assert entries(process) == {CHUNK.key: asdict(found), "other": other}


@pytest.mark.parametrize("entry", [None, 3, [], "tiles", {}], ids=str)
def test_an_entry_that_is_no_tiles_is_replaced(entry: object, process: Path, searches: list[str]) -> None:
    process.parent.mkdir()
    process.write_text(json.dumps({"format": 1, "tiles": {CHUNK.key: entry}}))
    with pytest.warns(RuntimeWarning, match="are no tiles that it can have"):
        found = ask()
    assert searches == ["chunk"] and entries(process) == {CHUNK.key: asdict(found)}


@pytest.mark.filterwarnings("ignore:no tuned tiles are read")
def test_a_directory_that_cannot_be_written(tmp_path: Path, searches: list[str], monkeypatch) -> None:
    """A warning; the process knows what it has found all the same."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTNING_ATTN_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="^tuned tiles are not kept: "):
        found = ask()
    assert autotune.process.tiles(CHUNK, DEVICE) == found and searches == ["chunk"]


def test_a_write_that_fails_leaves_the_file_as_it_was(
    process: Path, searches: list[str], monkeypatch
) -> None:
    ask()
    before = process.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tile_file.os, "replace", full)
    with pytest.warns(RuntimeWarning, match="no space left on device"):
        ask(replace(CHUNK, K=17))
    assert process.read_bytes() == before
    assert [path.name for path in process.parent.iterdir()] == ["tiles.json"]


def test_where_the_file_is(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tile_file.path() == tmp_path / "cache" / "tiles.json"
    monkeypatch.setenv("LIGHTNING_ATTN_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tile_file.path() == tmp_path / "xdg" / "lightning_attn" / "tiles.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tile_file.path() == tmp_path / ".cache" / "lightning_attn" / "tiles.json"


@pytest.mark.filterwarnings("ignore:no tuned tiles are read")
def test_a_user_without_a_home(monkeypatch, searches: list[str]) -> None:
    """As in some containers: nothing is kept, and nothing fails."""

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LIGHTNING_ATTN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.warns(RuntimeWarning, match="not kept"):
        ask()
    assert searches == ["chunk"]
