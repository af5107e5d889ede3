"""The parts of a model that are placed as a whole, and how to share them out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from .tensors import Entry, entries
from .text import TextModel


def units_of(model: nn.Module) -> dict[str, list[Entry]]:
    """The tensors of each unit, in the order in which a forward pass meets the units."""
    text = next(path for path, module in model.named_modules() if isinstance(module, TextModel))
    outer = text.rpartition(".")[0]
    groups: dict[str, list[Entry]] = {}
    for name, entry in entries(model).items():
        if name.startswith(f"{text}." if text else ""):
            parts = 2 if name.removeprefix(f"{text}.").startswith("layers.") else 1
            base = text
        else:
            parts, base = 1, outer if name.startswith(f"{outer}.") else ""
        inner = name.removeprefix(f"{base}.") if base else name
        unit = ".".join(filter(None, [base, *inner.split(".")[:parts]]))
        groups.setdefault(unit, []).append(entry)
    return groups


def _positions(groups: Mapping[str, object]) -> dict[str, int]:
    """-1 for what comes before the layers, their number for layers, their count for what comes after."""
    layers = [unit for unit in groups if layer_of(unit) is not None]
    found: dict[str, int] = {}
    for unit in groups:
        layer = layer_of(unit)
        found[unit] = layer if layer is not None else (len(layers) if layers[0] in found else -1)
    return found


def layer_of(unit: str) -> int | None:
    match = re.fullmatch(r"(?:.*\.)?layers\.(\d+)", unit)
    return int(match[1]) if match else None


def in_order(sizes: Mapping[str, int], n: int) -> dict[str, int]:
    """The index of each unit's device, of n; sizes: bytes by unit, in order."""
    positions = _positions(sizes)
    L = max(positions.values())
    layer_sizes = [sum(sizes[u] for u, p in positions.items() if p == layer) for layer in range(-1, L + 1)]
    counts = [L // 8] * 8 if n == 8 and L % 8 == 0 else _balanced(layer_sizes, n)
    of_layer = [i for i, count in enumerate(counts) for _ in range(count)]
    return {u: 0 if p < 0 else n - 1 if p == L else of_layer[p] for u, p in positions.items()}


def _balanced(sizes: Sequence[int], n: int) -> list[int]:
    """How many layers each of n devices gets; sizes: what comes first, each layer, what comes last. Of all ways the one
    with the smallest largest sum, then with the smallest sum of squares.
    """
    first, *layers, last = sizes
    sums = [0]
    for s in layers:
        sums.append(sums[-1] + s)
    L = len(layers)
    # best[end]: (largest, squares, counts) of the devices so far with the layers before `end`
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [])}
    for i in range(n):
        extra = (first if i == 0 else 0) + (last if i == n - 1 else 0)
        reached: dict[int, tuple[int, int, list[int]]] = {}
        for start, (largest, squares, counts) in best.items():
            for end in range(start, L + 1) if i < n - 1 else [L]:
                load = sums[end] - sums[start] + extra
                candidate = (max(largest, load), squares + load * load, [*counts, end - start])
                if end not in reached or candidate < reached[end]:
                    reached[end] = candidate
        best = reached
    return best[L][2]


def summary(units: Sequence[str]) -> str:
    """Layers as ranges."""
    words: list[str] = []
    run: list[int] = []
    for unit in [*units, ""]:
        layer = layer_of(unit) if unit else None
        if layer is not None and (not run or layer == run[-1] + 1):
            run.append(layer)
            continue
        if run:
            words.append(f"layers {run[0]}-{run[-1]}" if len(run) > 1 else f"layer {run[0]}")
            run = [] if layer is None else [layer]
        if unit and layer is None:
            words.append(unit.rpartition(".")[2])
    return ", ".join(words)
