"""Saving with the released names, so that a reader at any time sees one whole checkpoint or none.

Shards are written under temporary names, flushed to the disk, and renamed to names that no file there has yet; the index
comes last, by one rename, which is the moment from which the new checkpoint is there. Only then are the files of the one
before it deleted, of which a `model.safetensors`, that readers prefer to an index, goes first. The config.json of a
checkpoint that is replaced stays as it is, so the new one must be of the same network. What is killed half-way
leaves the old checkpoint, and files that end in ".incomplete", which the next save into the directory removes. A reader that
has opened the old index while its shards are deleted misses files, and says so.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import nn

from .config import from_file
from .shards import INDEX, SINGLE
from .tensors import Entry, entries

_HALF = ".incomplete"


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    max_shard_size: int = 5_000_000_000,
    progress: bool = False,
) -> None:
    """Writes config.json, model.safetensors.index.json and shards of at most max_shard_size bytes (but one tensor at least) with
    the released names. Nothing is copied from a CPU; from another device a shard at a time.

    Args:
        model: any of this package, with a `config`, floating.
        directory: is made if need be. A checkpoint of the same config in it is replaced; if that fails or is
            interrupted, the old one is still there, whole.
        progress: a progress bar on standard error, if that is a terminal.

    Raises:
        TypeError, ValueError: a model without a config, without values (meta) or in int8; a directory with the checkpoint of
            another config.
        OSError: the disk is full, say.
    """
    directory = Path(directory)
    places = list(entries(model).values())
    _check(model, places)
    directory.mkdir(parents=True, exist_ok=True)
    old = replaced(directory, model)
    for file in directory.glob(f"model*{_HALF}"):
        file.unlink()
    shards = _split(places, max_shard_size)
    names = _free_names(directory, len(shards))
    index = {
        "metadata": {"total_size": sum(e.nbytes() for e in places)},
        "weight_map": {e.name: name for name, shard in zip(names, shards, strict=True) for e in shard},
    }
    console = Console(stderr=True)
    shown = progress and console.is_terminal
    made: list[Path] = []  # to be deleted if anything goes wrong
    try:
        for name, shard in track(
            list(zip(names, shards, strict=True)), "saving", console=console, disable=not shown
        ):
            half = directory / (name + _HALF)
            made.append(half)
            half.touch()
            mode = half.stat().st_mode  # save_file makes its file readable by its owner alone
            save_file({e.name: e.view.contiguous() for e in shard}, half, metadata={"format": "pt"})
            half.chmod(stat.S_IMODE(mode))
            flush(half)
        for name in names:
            made.append(directory / name)
            os.replace(directory / (name + _HALF), directory / name)
        if not old:
            config: Any = model.config
            _write_json(directory / "config.json", config.to_dict(), made)
        flush(directory)  # the shards are there, whatever happens, before the index that names them
        _write_json(directory / INDEX, index, made)
    except BaseException:
        if not _is_index(directory / INDEX, index):  # else it was interrupted a moment too late
            for file in made:
                file.unlink(missing_ok=True)
        raise
    flush(directory)
    for name in old:
        if name not in (INDEX, *names):
            (directory / name).unlink(missing_ok=True)


def _check(model: nn.Module, places: Sequence[Entry]) -> None:
    if any(entry.scale is not None for entry in places):
        raise ValueError("save: expected a floating model, got int8: save it first, or load with int8=True")
    empty = [entry.name for entry in places if entry.view.is_meta]
    if empty:
        raise ValueError(f"save: expected a model with values, got {empty[0]} on the meta device")
    if not callable(getattr(getattr(model, "config", None), "to_dict", None)):
        raise TypeError(f"save: expected a model with a config that has to_dict, got {type(model).__name__}")


def replaced(directory: Path, model: nn.Module) -> list[str]:
    """The files of the checkpoint that is there, if one is, which `save` deletes, in that order. Raises ValueError if `save`
    may not replace it, for those who want to know before the model (its config counts) is made.
    """
    old = [name for name in (SINGLE, INDEX) if (directory / name).is_file()]
    if not old:
        return []
    other = f"save: expected a directory without a checkpoint or with one of the same config, got {directory}"
    try:
        same = from_file(directory) == model.config
    except (ValueError, TypeError) as error:
        raise ValueError(f"{other}, whose config.json cannot be read ({error}): save elsewhere") from None
    if not same:
        raise ValueError(f"{other}, whose config.json says another: save elsewhere, or delete that one first")
    if INDEX in old:
        try:
            placed = json.loads((directory / INDEX).read_text())["weight_map"]
            old += sorted({n for n in placed.values() if Path(n).name == n and n.endswith(".safetensors")})
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # no checkpoint after all: its shards, whatever they are, stay
    return old


def _split(places: Sequence[Entry], limit: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = []
    size = 0
    for entry in places:
        if not shards or size + entry.nbytes() > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes()
    return shards


def _free_names(directory: Path, n: int) -> list[str]:
    """Of n shards: the usual ones, or if any of them is taken, others of which none is."""
    again = 1
    while True:
        stem = "model" if again == 1 else f"model-v{again}"
        names = [f"{stem}-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
        if not any((directory / name).exists() for name in names):
            return names
        again += 1


def _is_index(file: Path, index: dict) -> bool:
    try:
        return json.loads(file.read_text()) == index
    except (OSError, ValueError):
        return False


def _write_json(file: Path, fields: dict, made: list[Path]) -> None:
    half = file.with_name(file.name + _HALF)
    made.append(half)
    half.write_text(json.dumps(fields, indent=2) + "\n")
    flush(half)
    os.replace(half, file)


def flush(path: Path) -> None:
    """To the disk; a directory's list of names too, where the system has that."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
