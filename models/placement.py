"""Which part of a model lies on which device, and whether it fits, before any memory is taken."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from .config import SOFTMAX, TextConfig
from .tensors import Entry
from .text import TextModel
from .units import in_order, layer_of, summary, units_of

Device = torch.device | str


@dataclass(frozen=True)
class Share:
    """What one device gets; units are modules (or parameters) by name, a layer each; sizes in bytes."""

    device: torch.device
    units: tuple[str, ...]
    weights: int
    states: int  # of the lightning layers, float32
    keys_values: int  # of the softmax layers

    @property
    def total(self) -> int:
        return self.weights + self.states + self.keys_values


@dataclass(frozen=True)
class Plan:
    """Shares in the order of the devices; `tokens` x `sequences` is the cache that they count."""

    shares: tuple[Share, ...]
    tokens: int
    sequences: int

    def table(self) -> Table:
        """Bytes by device, for `rich.print`. Activations, and what a cache holds to go back, are not counted."""
        title = f"Weights and a cache of {self.tokens:,} tokens x {self.sequences:,} sequence{'s' * (self.sequences != 1)}"
        table = Table(title=title, title_justify="left")
        table.add_column("device")
        table.add_column("holds", overflow="fold")
        for column in ("weights", "lightning states", "keys, values", "total", "available"):
            table.add_column(column, justify="right")
        for share in self.shares:
            free = available(share.device)
            sizes = (share.weights, share.states, share.keys_values, share.total)
            table.add_row(
                str(share.device), summary(share.units), *map(size, sizes), "" if free is None else size(free)
            )
        whole = [
            sum(getattr(s, f) for s in self.shares) for f in ("weights", "states", "keys_values", "total")
        ]
        table.add_section()
        table.add_row("all", "", *map(size, whole), "")
        return table

    def check(self) -> None:
        """Raises ValueError if what a device gets is more than it has free, naming each such device."""
        lacking = []
        for device in dict.fromkeys(share.device for share in self.shares):
            mine = [share for share in self.shares if share.device == device]
            needed, free = sum(share.total for share in mine), available(device)
            if free is not None and needed > free:
                weights = sum(share.weights for share in mine)
                cache = f" and {size(needed - weights)} of cache" if needed > weights else ""
                lacking.append(
                    f"{size(needed)} on {device} ({size(weights)} of weights{cache}), got {size(free)} available"
                )
        if lacking:
            raise ValueError(
                f"placement: expected {'; '.join(lacking)}. Give it more devices, int8=True (half the weights), fewer "
                "tokens or sequences, or a placement with less there"
            )

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Moves a model's units to their devices, in place; from the meta device they come without values."""
        for share in self.shares:
            for unit in share.units:
                parent = model.get_submodule(unit.rpartition(".")[0])
                name = unit.rpartition(".")[2]
                child = getattr(parent, name)
                if isinstance(child, nn.Module):
                    empty = any(t.is_meta for t in (*child.parameters(), *child.buffers()))
                    child.to_empty(device=share.device) if empty else child.to(share.device)
                elif child.is_meta or child.device != share.device:
                    moved = (
                        torch.empty_like(child, device=share.device)
                        if child.is_meta
                        else child.to(share.device)
                    )
                    setattr(parent, name, nn.Parameter(moved, requires_grad=child.requires_grad))


def plan(
    model: nn.Module,
    devices: Device | Sequence[Device] = "cpu",
    *,
    placement: Mapping[str, Device] | None = None,
    int8: bool = False,
    tokens: int = 0,
    sequences: int = 1,
) -> Plan:
    """Places the layers on the devices in order: embeddings (and all that reads pictures) on the first, the last norm and
    the head on the last. Eight devices get as many layers each, as the release has it, where that comes out even; any
    other number gets what makes the largest share of bytes smallest.

    Args:
        model: any of this package, on any device; usually a `tensors.skeleton`.
        devices: one or several, "cpu" and "meta" among them; one may stand there more than once.
        placement: instead of devices: a device for the prefixes of names ("model.layers.3", "lm_head", "" for all the
            rest); the longest that fits a layer wins.
        int8: count the bytes that `quantize` would leave.
        tokens, sequences: length and number of sequences of the cache to count, without what it needs to go back.

    Raises:
        ValueError: no devices, one that is not there, a placement that leaves something out or names what is not there.
    """
    groups = units_of(model)
    config = next(m.config for m in model.modules() if isinstance(m, TextModel))
    itemsize = _itemsize(groups)
    weights = {unit: sum(e.nbytes(int8) for e in held) for unit, held in groups.items()}
    caches = {unit: _cache(unit, config, itemsize, tokens, sequences) for unit in groups}
    if placement is not None:
        order, devices_of = _explicit(groups, placement)
    else:
        order = _devices(devices)
        devices_of = in_order({unit: weights[unit] + sum(caches[unit]) for unit in groups}, len(order))
    shares = []
    for i, device in enumerate(order):
        mine = tuple(unit for unit in groups if devices_of[unit] == i)
        states, kv = (sum(caches[unit][c] for unit in mine) for c in (0, 1))
        shares.append(Share(device, mine, sum(weights[unit] for unit in mine), states, kv))
    return Plan(tuple(shares), tokens, sequences)


def _itemsize(groups: Mapping[str, list[Entry]]) -> int:
    """Of the model's dtype: the router's, which is never quantised."""
    return next(e for held in groups.values() for e in held if e.scale is None).view.element_size()


def _cache(unit: str, config: TextConfig, itemsize: int, tokens: int, sequences: int) -> tuple[int, int]:
    """Bytes of (states, keys and values)."""
    layer = layer_of(unit)
    if layer is None or not tokens * sequences:
        return 0, 0
    D = config.head_dim
    if config.attn_type_list[layer] == SOFTMAX:
        held = min(tokens, config.sliding_window or tokens)
        return 0, 2 * config.num_key_value_heads * D * held * sequences * itemsize
    return config.num_attention_heads * D * D * 4 * sequences, 0


def _explicit(
    groups: Mapping[str, object], placement: Mapping[str, Device]
) -> tuple[list[torch.device], dict[str, int]]:
    used: set[str] = set()
    chosen: dict[str, torch.device] = {}
    missing = []
    for unit in groups:
        fitting = [p for p in placement if not p or unit == p or unit.startswith(f"{p}.")]
        if fitting:
            longest = max(fitting, key=len)
            chosen[unit] = _devices(placement[longest])[0]
        else:
            missing.append(unit)
        used.update(fitting)
    if missing:
        raise ValueError(
            f"placement: expected a device for every part, got none for {', '.join(missing[:5])}"
        )
    unknown = [prefix for prefix in placement if prefix not in used]
    if unknown:
        raise ValueError(
            f"placement: expected parts such as {next(iter(groups))!r} or whole layers, got {', '.join(unknown[:5])}"
        )
    order = list(dict.fromkeys(chosen.values()))
    return order, {unit: order.index(device) for unit, device in chosen.items()}


def _devices(devices: Device | Sequence[Device]) -> list[torch.device]:
    given = [devices] if isinstance(devices, (str, torch.device)) else list(devices)
    if not given:
        raise ValueError("devices: expected at least one, got none")
    return [_device(device) for device in given]


def _device(name: Device) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"devices: expected names as 'cpu', 'cuda:0' or 'meta', got {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"devices: expected one of the {count} CUDA devices here, got {str(device)!r}")
        if device.index is None:
            return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


def available(device: torch.device) -> int | None:
    """Bytes that are free there; None where that is not known or has no meaning (meta)."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type != "cpu":
        return None
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and (found := re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())):
        return int(found[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def size(n: int) -> str:
    """Bytes in words, as they are sold: 1 GB is 10^9."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= scale:
            return f"{n / scale:,.1f} {unit}"
    return f"{n} B" if n else "-"
