"""The files of a checkpoint: what is in them, found out and checked before anything is read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LISTED = 20  # problems of one error
_MAPPED = 1 << 28  # bytes read before a file is mapped anew: what was read does not stay in memory


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: shape, and dtype in the words of safetensors."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1)


def fail(title: str, problems: list[str]) -> None:
    """Raises ValueError if there are problems, with the first of them."""
    if problems:
        lines = problems[:_LISTED]
        if len(problems) > _LISTED:
            lines.append(f"and {len(problems) - _LISTED:,} more")
        plural = "s" * (len(problems) > 1)
        raise ValueError(f"{title}, got {len(problems):,} problem{plural}:\n  " + "\n  ".join(lines))


def scan(directory: Path) -> dict[str, Stored]:
    """The tensors of the checkpoint in a directory, by name; reads headers alone. `model.safetensors` goes before an index, as
    in transformers.

    Raises ValueError, with all problems that were found: no checkpoint, or pickles in its stead; an index that is not JSON,
    names files outside the directory or that are not there, or does not agree with what they hold; a tensor that
    is there twice; a file that is truncated or corrupt.
    """
    if not directory.is_dir():
        raise ValueError(f"checkpoint: expected a directory, got {directory}, which is none")
    problems: list[str] = []
    found: dict[str, Stored] = {}
    if (directory / SINGLE).is_file():
        placed, files = None, [SINGLE]
    elif (directory / INDEX).is_file():
        placed = _read_index(directory / INDEX)
        files = _shards(directory, sorted(set(placed.values())), problems)
    else:
        raise ValueError(_explain(directory))
    readable = set()
    for file in files:
        try:
            held = _read_header(directory / file)
        except (SafetensorError, OSError) as error:
            problems.append(
                f"{file}: expected a safetensors file, got one that is truncated or corrupt ({error}): fetch it again"
            )
            continue
        readable.add(file)
        for name, stored in held.items():
            if name in found:
                problems.append(f"{name}: expected it once, got it in {found[name].file.name} and in {file}")
            elif placed is not None and name not in placed:
                problems.append(f"{name}: expected it in {INDEX}, got it only in {file}")
            found.setdefault(name, stored)
    for name, file in (placed or {}).items():
        if file in readable and (name not in found or found[name].file.name != file):
            problems.append(f"{name}: expected it in {file}, as {INDEX} says, got a file that lacks it")
    fail(f"checkpoint {directory}: expected whole safetensors files", problems)
    return found


def read(file: Path, sizes: dict[str, int]) -> Iterator[tuple[str, safe_open]]:
    """Each of the named tensors of a file with a handle that gives it, in the order of the file, so that never more than
    256 MB beyond one tensor are mapped; sizes: bytes, by name.
    """
    with safe_open(file, framework="pt") as handle:
        order = [name for name in handle.offset_keys() if name in sizes]
    while order:
        with safe_open(file, framework="pt") as handle:
            budget = _MAPPED
            while order and budget > 0:
                name = order.pop(0)
                budget -= sizes[name]
                yield name, handle


def part_of(handle: safe_open, name: str, part: tuple) -> Tensor:
    """A tensor of a file, or a part of it, on the CPU; mapped, not read."""
    return handle.get_slice(name)[part] if part else handle.get_tensor(name)


def _read_header(file: Path) -> dict[str, Stored]:
    with safe_open(file, framework="pt") as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a dict
        return {name: Stored(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def _read_index(file: Path) -> dict[str, str]:
    try:
        fields = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected JSON, got {error}: fetch it again") from None
    placed = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise ValueError(f"{file}: expected a weight_map of names and files, got {str(fields)[:100]}")
    return placed


def _shards(directory: Path, files: list[str], problems: list[str]) -> list[str]:
    """Those that may be opened."""
    good = []
    for file in files:
        # Backslashes and colons are separators on some systems; "" and ".." have no suffix.
        if set(file) & set("/\\:\0") or Path(file).suffix != ".safetensors":
            problems.append(f"{INDEX}: expected names of .safetensors files beside it, got {file!r}")
        elif not (directory / file).is_file():
            problems.append(f"{file}: expected it beside {INDEX}, got no such file: fetch it")
        else:
            good.append(file)
    return good


def _explain(directory: Path) -> str:
    """Why there is no checkpoint in a directory."""
    expected = f"checkpoint {directory}: expected {INDEX} with its shards or {SINGLE}, got"
    shards = sorted(file.name for file in directory.glob("*.safetensors"))
    if shards:
        return f"{expected} {len(shards)} file(s) without an index ({shards[0]}, …): fetch the index too"
    pickles = sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern))
    if pickles:
        return (
            f"{expected} pickles ({pickles[0]}, …). To load a pickle is to run whatever code it holds, so it is refused: get "
            "the checkpoint as safetensors, or convert it where you trust it, with safetensors.torch.save_file"
        )
    return f"{expected} neither"
