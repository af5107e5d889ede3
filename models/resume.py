"""Training checkpoints: a run to go on from, bit for bit, written by all of its ranks with torch.distributed.checkpoint.

The experts' parameters are split over ranks, so a run goes on only with as many ranks, shared out alike. A checkpoint is written
into a directory whose name ends in ".incomplete" and renamed when all of it is there and on the disk: what is there under its
name is whole. They are for the process that wrote them: torch.distributed.checkpoint reads its own file of metadata
with pickle, so do not read one that comes from elsewhere; `models.checkpoint` is for models.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from .parallel import experts_of
from .saving import flush
from .training import Across, Run

_HALF = ".incomplete"
_KEPT = 2


class Checkpoints:
    """Of one run, in a directory that all ranks see, every so many steps.

    facts: what must be the same when a run goes on from one, such as recipe, config and sizes; plain values.
    """

    def __init__(self, directory: Path, every: int, facts: Mapping[str, object]) -> None:
        self.directory, self.every, self.facts = directory, every, dict(facts)

    def __call__(self, run: Run) -> None:
        """After a step."""
        if self.every and len(run.curve) % self.every == 0:
            self.save(run)

    def complete(self) -> list[Path]:
        """Those that are whole, the oldest first."""
        found = (p for p in self.directory.glob("step-*") if p.suffix != _HALF)
        return sorted(p for p in found if (p / ".metadata").is_file())  # which is written last

    def save(self, run: Run) -> None:
        """Collective. If it fails or is interrupted, those before it are still there, whole."""
        path = self.directory / f"step-{len(run.curve):08d}"
        half = path.with_name(path.name + _HALF)
        if is_first():
            self.directory.mkdir(parents=True, exist_ok=True)
            for old in self.directory.glob(f"*{_HALF}"):
                shutil.rmtree(old)
        _together()
        dcp.save(_tensors(run) | {"run": self._facts(run)}, checkpoint_id=half)
        if is_first():
            for file in (*half.iterdir(), half):
                flush(file)
            if path.exists():
                _remove(path)
            os.replace(half, path)
            flush(self.directory)
            for old in self.complete()[:-_KEPT]:
                _remove(old)
        _together()

    def load(self, run: Run) -> bool:
        """Brings a run that has not begun to the last checkpoint; False if there is none. Collective.

        Raises ValueError if it is of another run.
        """
        name = self._last()
        if name is None:
            return False
        path = self.directory / name
        for p in run.model.parameters():  # what the optimizer makes in its first step
            run.optimizer.state[p] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        tensors, told = _tensors(run), {"run": self._facts(run)}
        mine = told["run"]["facts"]
        dcp.load(told, checkpoint_id=path)
        if told["run"]["facts"] != mine:
            raise ValueError(
                f"training checkpoint: expected one of the same run, got {path} of {told['run']['facts']}, not {mine}: "
                "delete it or train elsewhere"
            )
        dcp.load(tensors, checkpoint_id=path)
        run.generator.set_state(tensors["generator"])
        run.curve[:] = told["run"]["curve"]
        return True

    def _last(self) -> str | None:
        """The name of the last complete one, as the first rank sees it: on a shared file system others may see less."""
        found: list[Any] = [path.name for path in self.complete()[-1:]] or [None]
        if dist.is_initialized():
            dist.broadcast_object_list(found)
        return found[0]

    def clear(self) -> None:
        """Deletes them, when the run is done and its model saved."""
        if is_first():
            for path in self.complete():
                _remove(path)
            shutil.rmtree(self.directory, ignore_errors=True)

    def _facts(self, run: Run) -> dict[str, Any]:
        # As text: what is nested would be loaded key by key, into the very dicts that it is compared with.
        return {"facts": json.dumps(self.facts, sort_keys=True), "curve": list(run.curve)}


def _tensors(run: Run) -> dict[str, Tensor]:
    """Parameters and what the optimizer knows of them, those of an expert's part under a name of that part."""
    places: dict[str, str] = {}
    if isinstance(run.side, Across):
        for name, experts in experts_of(run.model):
            places[f"{name}."] = f"{experts.place.e}.{experts.place.t}."
    found = {"generator": run.generator.get_state()}
    for name, p in run.model.named_parameters():
        place = next((place for prefix, place in places.items() if name.startswith(prefix)), "")
        key = "" if name.endswith(".gate.weight") else place
        found[f"model.{key}{name}"] = p.data
        for what, value in run.optimizer.state[p].items():
            found[f"optimizer.{what}.{key}{name}"] = value
    return found


def _remove(path: Path) -> None:
    """A checkpoint, which is not there under its name when it is no longer whole."""
    half = path.with_name(f"old-{path.name}{_HALF}")
    os.replace(path, half)
    shutil.rmtree(half)


def is_first() -> bool:
    """Whether this is rank 0, or there are no ranks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _together() -> None:
    if dist.is_initialized():
        dist.barrier()
