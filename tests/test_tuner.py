"""What a process knows of tuned tiles: it tunes once and for all lengths, only when asked to, and keeps what it found in
a file.
"""

import json
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from support import BACKENDS, assert_same_bits, check, make_inputs, run
from torch import Tensor

from lightning_attn import lightning_attention

pytest.importorskip("triton", reason="Triton is not installed")
if "triton" not in BACKENDS:
    pytest.skip("there is neither a GPU nor Triton's interpreter", allow_module_level=True)

from autotune_support import ARCH, CHUNK, DEVICE

from lightning_attn.backends.triton import autotune, config, tile_file
from lightning_attn.backends.triton.autotune import Kernel, Tuner
from lightning_attn.backends.triton.config import Tiles

pytestmark = pytest.mark.gpu


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
