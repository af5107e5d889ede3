"""Checkpoints as released: safetensors with an index, and nothing else. Loading is strict; see `saving` for `save`."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_attn import LightningAttention, SparseMoE

from .config import TextConfig, VLConfig, from_file
from .placement import Device, plan
from .quantize import quantize
from .saving import save
from .shards import DTYPES, Stored, fail, part_of, read, scan
from .tensors import Entry, Index, entries, expert_parts, skeleton

__all__ = ["load", "save"]

# What transformers stores of a lightning layer beside its weights.
_DERIVED = re.compile(r"(.*\.self_attn)\.(slope_rate|query_decay|key_decay|diagonal_decay)")
_HEADS = ("lm_head.", "score.", "qa_outputs.")

Copies = dict[str, list[tuple[Index, str]]]  # by stored name: its parts, and the released name of each


def load(
    directory: str | Path,
    *,
    devices: Device | Sequence[Device] = "cpu",
    placement: Mapping[str, Device] | None = None,
    dtype: torch.dtype | None = None,
    int8: bool = False,
    tokens: int = 0,
    sequences: int = 1,
    head: Callable[..., nn.Module] | None = None,
    progress: bool = True,
) -> nn.Module:
    """The model of a checkpoint, in eval mode: `CausalLM`, or `VLForConditionalGeneration` if its config.json has pictures.

    The tensors go one by one from the mapped file to their place, so that the host never holds more than one beyond what is
    placed on it; nothing is taken before every name, shape and dtype is found to be right and the model to fit. Names may
    be the released ones or those that transformers has in memory.

    Args:
        directory: has config.json, and model.safetensors or model.safetensors.index.json with its shards.
        devices, placement, tokens, sequences: as of `placement.plan`; the cache is counted, not taken.
        dtype: floating; None is the one that most of the checkpoint's numbers have.
        int8: quantise the layers' linears and experts (`quantize`), each tensor as it comes, from the dtype that is stored.
        head: what to build in place of `CausalLM`: head(config, device=, dtype=), for example
            `partial(SequenceClassifier, num_labels=3)`. Another head's tensors are left; if the checkpoint has none of its
            own, it is drawn anew, with a warning.
        progress: table of the devices and a progress bar on standard error, if that is a terminal.

    Raises:
        TypeError: dtype is not floating.
        ValueError: no config or a wrong one; all that is wrong with the files (`shards.scan`); tensors that are missing,
            not known, or of a wrong shape or dtype, all of them in one error; as of `placement.plan`; too little memory.
    """
    directory = Path(directory)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"load: expected a floating dtype, got {dtype}")
    stored = scan(directory)
    config = from_file(directory)
    model = skeleton(config, dtype=dtype or _common_dtype(stored), head=head)
    copies, derived, new = _match(directory, model, stored, head is not None)
    placed = plan(model, devices, placement=placement, int8=int8, tokens=tokens, sequences=sequences)
    console = Console(stderr=True)
    if progress and console.is_terminal:
        console.print(placed.table())
    placed.check()
    if int8:
        quantize(model)
    placed.apply(model)
    places = entries(model)  # not before: quantising replaces modules
    _draw([places[name] for name in new], config)
    with _bar(console, progress and console.is_terminal) as bar:
        _copy(stored, copies, places, derived, bar)
    return model.eval()


def _match(
    directory: Path, model: nn.Module, stored: Mapping[str, Stored], other_heads: bool
) -> tuple[Copies, dict[str, LightningAttention], list[str]]:
    """What to copy where; the derived tensors and their layers, to be compared; and what is to be drawn anew."""
    places = entries(model)
    modules = dict(model.named_modules())
    copies: Copies = {}
    derived: dict[str, LightningAttention] = {}
    source: dict[str, str] = {}  # of each place
    problems: list[str] = []
    for given, tensor in stored.items():
        name = re.sub(r"(layers\.\d+)\.mlp\.(?=experts\.|gate\.)", r"\1.block_sparse_moe.", given)
        fused = re.fullmatch(r"(.*\.block_sparse_moe)\.(?:experts\.)?(gate_up_proj|down_proj)", name)
        other = _DERIVED.fullmatch(name)
        if fused and isinstance(moe := modules.get(fused[1]), SparseMoE):
            shape = tuple(getattr(moe, fused[2]).shape)
            targets = [(part, f"{fused[1]}.{n}") for n, part in expert_parts(fused[2], moe)]
        elif other and isinstance(layer := modules.get(other[1]), LightningAttention):
            if other[2] == "slope_rate":
                derived[given] = layer
            continue
        elif name in places:
            shape, targets = places[name].shape, [((), name)]
        elif other_heads and name.removeprefix("language_model.").startswith(_HEADS):
            continue
        else:
            problems.append(f"{given}: expected no such tensor, got {_described(tensor)}")
            continue
        for _, target in targets:
            if target in source:
                problems.append(f"{target}: expected it once, got {source[target]} and {given}")
                break
            source[target] = given
        if tensor.shape != shape:
            problems.append(f"{given}: expected shape {list(shape)}, got {_described(tensor)}")
        elif tensor.dtype not in DTYPES:
            hint = "load the floating checkpoint, with int8=True if it is to be small"
            problems.append(f"{given}: expected dtype {', '.join(DTYPES)}, got {_described(tensor)}: {hint}")
        copies[given] = targets
    missing = [name for name in places if name not in source]
    new = [name for name in missing if other_heads and name.startswith(_HEADS)]
    if len(new) != sum(name.startswith(_HEADS) for name in places):
        new = []  # half a head is none
    for name in missing:
        if name not in new:
            problems.append(f"{name}: expected {list(places[name].shape)}, got no such tensor")
    fail(f"checkpoint {directory}: expected the tensors of the network in its config.json", problems)
    return copies, derived, new


def _described(tensor: Stored) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} in {tensor.file.name}"


def _common_dtype(stored: Mapping[str, Stored]) -> torch.dtype:
    """That of the most numbers."""
    counts = dict.fromkeys(DTYPES, 0)
    for tensor in stored.values():
        if tensor.dtype in counts:
            counts[tensor.dtype] += math.prod(tensor.shape)
    return DTYPES[max(counts, key=lambda name: counts[name])]


@torch.no_grad()
def _copy(
    stored: Mapping[str, Stored],
    copies: Copies,
    places: Mapping[str, Entry],
    derived: Mapping[str, LightningAttention],
    bar: Progress,
) -> None:
    sizes: dict[Path, dict[str, int]] = {}
    for name in (*copies, *derived):
        sizes.setdefault(stored[name].file, {})[name] = stored[name].nbytes
    task = bar.add_task("loading", total=sum(sum(of.values()) for of in sizes.values()))
    for file, of in sizes.items():
        try:
            for name, handle in read(file, of):
                if name in derived:
                    _compare(name, derived[name], handle.get_tensor(name))
                for part, target in copies.get(name, []):
                    places[target].write(part_of(handle, name, part))
                bar.advance(task, of[name])
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file}: expected to read it to its end, got {error}: fetch it again"
            ) from error


def _compare(name: str, layer: LightningAttention, slope: Tensor) -> None:
    """transformers divides by L - 1 + 1e-5 where the release divides by L - 1, and may have stored it in bfloat16."""
    if layer.decay.is_meta:
        return
    ours = layer.decay.cpu()
    if slope.numel() != ours.numel() or not torch.allclose(slope.flatten().float(), ours, 1 / 128, 2e-5):
        raise ValueError(
            f"{name}: expected the decay of {layer}, got another: was the checkpoint made with other heads or layers?"
        )


@torch.no_grad()
def _draw(new: Sequence[Entry], config: TextConfig | VLConfig) -> None:
    """A head that the checkpoint does not have."""
    if not new:
        return
    std = (config if isinstance(config, TextConfig) else config.text).initializer_range
    for entry in new:
        entry.view.normal_(std=std) if len(entry.shape) > 1 else entry.view.zero_()
    warnings.warn(
        f"load: the checkpoint has no {', '.join(e.name for e in new)}: drawn anew, to be trained",
        stacklevel=3,
    )


def _bar(console: Console, shown: bool) -> Progress:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}"), *columns, console=console, disable=not shown)
