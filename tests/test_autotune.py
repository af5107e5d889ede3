"""Tiles by trial: every option gives the same results, and what is wrong is out of the race."""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support import BACKENDS, assert_same_bits, dtype_id
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
if "triton" not in BACKENDS:
    pytest.skip("there is neither a GPU nor Triton's interpreter", allow_module_level=True)

from autotune_support import ARCH, CHUNK, DEVICE, KERNELS, configurations, configured_tiles

from lightning_attn.backends.triton import autotune, config, trials
from lightning_attn.backends.triton.autotune import Kernel
from lightning_attn.backends.triton.config import Tiles
from lightning_attn.backends.triton.launch import Launch

pytestmark = pytest.mark.gpu


def kernel_id(kernel: object) -> str:
    return f"{kernel.name}-{dtype_id(kernel.dtype)}" if isinstance(kernel, Kernel) else ""


each_kernel = pytest.mark.parametrize("kernel", configurations(torch.float32), ids=kernel_id)


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
        replace(CHUNK, arch=replace(ARCH, name="of another one")),
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
