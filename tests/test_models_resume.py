"""Training checkpoints: a run that goes on from one is bit for bit the run that was not interrupted, in one process, on ranks, and after
a worker of torchrun was killed; what is interrupted, or belongs to another run, does no harm.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from models_ranks_support import CONFIG, finished, fresh_ranks, own_text, torchrun, world_of
from models_support import tokens
from ranks_support import Ranks
from rich.progress import Progress
from support import assert_same_bits
from torch import Tensor

from models import resume, train_tiny
from models.parallel import Sizes, World
from models.resume import Checkpoints
from models.training import Recipe, Run, start, step, train

RECIPE = Recipe(steps=6, batch=3, length=13, warmup=2)
TEXT = tokens(500).to(torch.uint8)
FACTS: dict[str, object] = {
    "recipe": asdict(RECIPE),
    "config": CONFIG.to_dict(),
    "text": "sha",
    "ranks": None,
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    with fresh_ranks(timeout=120) as ranks:
        yield ranks


def steps(run: Run, until: int) -> Run:
    while len(run.curve) < until:
        step(run, RECIPE, TEXT)
    return run


def everything(run: Run) -> dict[str, Tensor]:
    """Of the next steps, all that counts."""
    held = {"generator": run.generator.get_state(), "curve": torch.tensor(run.curve, dtype=torch.float64)}
    for name, p in run.model.named_parameters():
        held[name] = p.detach().clone()
        moments = run.optimizer.state[p]
        assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
        held |= {f"{what} of {name}": value.clone() for what, value in moments.items()}
    return held


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert_same_bits(value, other[name], name)


def gone_on(directory: Path, world: World | None = None) -> None:
    """Six steps in one go against three, a checkpoint, and three of a run that begins with another seed."""
    whole = everything(steps(start(CONFIG, RECIPE, world), 6))
    first = steps(start(CONFIG, RECIPE, world), 3)
    checkpoints = Checkpoints(directory, 3, FACTS)
    assert not checkpoints.load(first) and len(first.curve) == 3, "there is none"
    checkpoints.save(first)
    assert_same(everything(first), everything(steps(start(CONFIG, RECIPE, world), 3)))
    other = start(CONFIG, replace(RECIPE, seed=5), world)
    assert Checkpoints(directory, 3, FACTS).load(other)
    assert_same(everything(other), everything(first))
    assert_same(everything(steps(other, 6)), whole)


def test_goes_on(tmp_path: Path) -> None:
    """Weights, moments, windows and curve, bit for bit."""
    gone_on(tmp_path / "training")


ON_RANKS = (Sizes(), Sizes(2, 2, 1), Sizes(2, 2, 2), Sizes(4, 1, 2))


def gone_on_across(group: dist.ProcessGroup, directory: Path) -> None:
    for sizes in ON_RANKS:
        gone_on(directory / str(sizes), world_of(sizes))


def test_goes_on_across_ranks(pool: Ranks, tmp_path: Path) -> None:
    """Each rank its own part of the experts, slices and replicas of them among others."""
    pool.run(gone_on_across, tmp_path)


def test_last_two_are_kept(tmp_path: Path) -> None:
    """One every two steps, of which the last two stay until they are cleared."""
    checkpoints = Checkpoints(tmp_path / "training", 2, FACTS)
    names: list[list[str]] = []

    def after(run: Run) -> None:
        checkpoints(run)
        names.append([path.name for path in checkpoints.complete()])

    recipe = replace(RECIPE, steps=7)
    run = start(CONFIG, recipe)
    train(run, recipe, TEXT, Progress(disable=True), after)
    two, four, six = (f"step-{n:08d}" for n in (2, 4, 6))
    assert names == [[], [two], [two], [two, four], [two, four], [four, six], [four, six]]
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == [four, six]
    again = start(CONFIG, recipe)
    assert checkpoints.load(again) and again.curve == run.curve[:6]
    Checkpoints(tmp_path / "training", 0, FACTS)(run)  # every 0: none
    assert len(checkpoints.complete()) == 2
    checkpoints.clear()
    assert not checkpoints.directory.exists() and not checkpoints.complete()
    checkpoints.clear()


# ---- interrupted -----------------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    pass


def before(function: Callable[..., Any]) -> Callable[..., Any]:
    def raises(*args: Any, **rest: Any) -> Any:
        raise Interrupted

    return raises


def afterwards(function: Callable[..., Any]) -> Callable[..., Any]:
    def raises(*args: Any, **rest: Any) -> Any:
        function(*args, **rest)
        raise Interrupted

    return raises


@pytest.mark.parametrize("when", [before, afterwards])
@pytest.mark.parametrize("where", ["dcp.save", "flush", "os.replace"])
def test_interrupted(
    where: str, when: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a save ends, a run goes on from a whole checkpoint: the one before, or the new one from the moment it has its name. The
    next save leaves nothing half-made.
    """
    checkpoints = Checkpoints(tmp_path / "training", 2, FACTS)
    run = steps(start(CONFIG, RECIPE), 2)
    checkpoints.save(run)
    held = [everything(run)]
    held.append(everything(steps(run, 4)))
    owner, _, name = where.rpartition(".")
    module = getattr(resume, owner) if owner else resume
    with monkeypatch.context() as patch:
        patch.setattr(module, name, when(getattr(module, name)))
        with pytest.raises(Interrupted):
            checkpoints.save(run)
    renamed = where == "os.replace" and when is afterwards
    half = [path for path in checkpoints.directory.iterdir() if path.suffix == ".incomplete"]
    assert len(half) == (not renamed and (where, when) != ("dcp.save", before))
    other = start(CONFIG, RECIPE)
    assert checkpoints.load(other)
    assert_same(everything(other), held[renamed])
    checkpoints.save(steps(other, 6))
    last = [path.name for path in checkpoints.complete()]
    assert last == [f"step-{4 if renamed else 2:08d}", "step-00000006"]
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == last
    again = start(CONFIG, RECIPE)
    assert checkpoints.load(again)
    assert_same(everything(again), everything(other))


def test_first_save_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then there is none to go on from."""
    checkpoints = Checkpoints(tmp_path / "training", 1, FACTS)
    run = steps(start(CONFIG, RECIPE), 1)
    with monkeypatch.context() as patch:
        patch.setattr(resume.os, "replace", before(os.replace))
        with pytest.raises(Interrupted):
            checkpoints.save(run)
    assert not checkpoints.load(start(CONFIG, RECIPE))
    checkpoints.save(run)
    assert checkpoints.load(start(CONFIG, RECIPE))


# ---- of another run --------------------------------------------------------------------------------------------------

SHARED = {"world": 4, "cp": 2, "ep": 2, "etp": 1}
OTHERS = {
    "recipe": asdict(replace(RECIPE, peak_rate=1e-3)),
    "text": "another",
    "config": {**CONFIG.to_dict(), "rope_theta": 1e7},
    "ranks": SHARED,
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run(name: str, tmp_path: Path) -> None:
    """Is refused both ways, with both sides named, and the run that wanted to go on from it has not changed."""
    run = steps(start(CONFIG, RECIPE), 1)
    sides = FACTS, {**FACTS, name: OTHERS[name]}
    for mine, theirs in (sides, sides[::-1]):
        directory = tmp_path / str(mine is FACTS)
        Checkpoints(directory, 1, theirs).save(run)
        other = start(CONFIG, RECIPE)
        weights = [p.detach().clone() for p in other.model.parameters()]
        with pytest.raises(
            ValueError, match="training checkpoint: expected one of the same run, got"
        ) as error:
            Checkpoints(directory, 1, mine).load(other)
        assert "delete it or train elsewhere" in str(error.value) and str(directory) in str(error.value)
        said = (json.dumps({name: side[name]}, sort_keys=True)[1:-1] for side in (mine, theirs))
        assert all(text in str(error.value) for text in said)
        assert other.curve == [] and other.generator.get_state().equal(
            start(CONFIG, RECIPE).generator.get_state()
        )
        for p, old in zip(other.model.parameters(), weights, strict=True):
            assert_same_bits(p, old)


@pytest.mark.parametrize("mine", [{}, {"recipe": 1, "more": 2}, {"recipe": {"steps": 1}}])
def test_other_facts(mine: dict[str, object], tmp_path: Path) -> None:
    """One more, one fewer or one of another kind is another run, too."""
    Checkpoints(tmp_path, 1, {"recipe": 1}).save(steps(start(CONFIG, RECIPE), 1))
    with pytest.raises(ValueError, match="expected one of the same run"):
        Checkpoints(tmp_path, 1, mine).load(start(CONFIG, RECIPE))


def other_sizes(group: dist.ProcessGroup, directory: Path) -> None:
    sizes = Sizes(2, 2, 1), Sizes(2, 1, 2), Sizes(4, 2, 1)
    facts = [{"sizes": asdict(s)} for s in sizes]
    Checkpoints(directory, 1, facts[0]).save(steps(start(CONFIG, RECIPE, world_of(sizes[0])), 1))
    for other, fact in zip(sizes[1:], facts[1:], strict=True):
        with pytest.raises(ValueError, match="expected one of the same run"):
            Checkpoints(directory, 1, fact).load(start(CONFIG, RECIPE, world_of(other)))


def test_other_sizes(pool: Ranks, tmp_path: Path) -> None:
    """On every rank."""
    pool.run(other_sizes, tmp_path)


def test_command_refuses_another_run(tmp_path: Path) -> None:
    """With an error of the command, before it trains; what is there stays."""
    checkpoints = Checkpoints(tmp_path / "out" / "training", 1, {"recipe": "another"})
    checkpoints.save(start(train_tiny.CONFIG, Recipe()))
    args = ("--text", own_text(tmp_path), "--steps", 1, "--checkpoint-every", 1, "--out", tmp_path / "out")
    result = CliRunner().invoke(train_tiny.main, [str(a) for a in args])
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    assert "expected one of the same run" in " ".join(result.output.split()), result.output
    assert "training 0/1" not in result.output and checkpoints.complete()


# ---- a worker is killed ----------------------------------------------------------------------------------------------


def workers(parent: int) -> dict[int, int]:
    """The processes that torchrun has started: rank -> id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    variables = (entry / "environ").read_bytes().split(b"\0")
                    ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
                    found |= {rank: int(entry.name) for rank in ranks}
            except (OSError, ValueError):  # it has ended
                continue
    return found


def weights(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the workers in /proc")
def test_restart(tmp_path: Path) -> None:
    """Row 29: torchrun starts its workers again when one is killed, they go on from the last checkpoint that is whole, and the weights
    and the curve are, bit for bit, those of a run that nothing happened to.
    """
    base = ("--text", own_text(tmp_path), "--steps", 6, "--parallel", "cp=2,ep=2", "--checkpoint-every", 2)
    logs = [tmp_path / name for name in ("calm.log", "killed.log")]
    out = [tmp_path / name for name in ("calm", "killed")]
    files = [("--out", directory, "--json", directory.with_suffix(".json")) for directory in out]
    calm = torchrun(2, *base, *files[0], log=logs[0])
    assert "going on" not in finished(calm, logs[0])
    killed = torchrun(2, *base, *files[1], restarts=1, log=logs[1])
    try:
        deadline = time.monotonic() + 300
        while not (out[1] / "training" / "step-00000002").is_dir():
            assert killed.poll() is None and time.monotonic() < deadline, logs[1].read_text()
            time.sleep(0.02)
        os.kill(workers(killed.pid)[0], signal.SIGKILL)
    except BaseException:
        killed.terminate()
        raise
    said = finished(killed, logs[1])
    assert "going on after step 2" in said or "going on after step 4" in said, said
    records = [json.loads(directory.with_suffix(".json").read_text()) for directory in out]
    for name in ("bits_per_byte", "held_out_bits_per_byte", "recipe", "ranks"):
        assert records[0][name] == records[1][name]
    assert len(records[0]["bits_per_byte"]) == 6
    assert weights(out[0]) == weights(out[1]) and weights(out[0])
    assert not (out[1] / "training").exists(), "deleted at the end"
