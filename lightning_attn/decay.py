"""The decay rates of published models: s >= 0 per head, a token at distance n weighs e^{-s n}.

Each function returns a float32 tensor [H], computed in float64 and rounded once; TypeError or ValueError for a number
of heads or layers that is not an int >= 1, or a layer outside [0, num_layers).
"""

import math

import torch
from torch import Tensor


def alibi(num_heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """ALiBi slopes (arXiv 2108.12409): s_h = 2^(-8(h+1)/H).

    For H not a power of two: the slopes of the power of two below, then every other slope of the one above.
    """
    _check(num_heads)
    return _rates(_alibi(num_heads), device)


def minimax(
    num_heads: int, layer_idx: int, num_layers: int, *, device: torch.device | str | None = None
) -> Tensor:
    """MiniMax-Text-01 (arXiv 2501.08313): ALiBi slopes times 1 - l/(L-1) + 1e-5, l the global layer index."""
    _check(num_heads, layer_idx, num_layers)
    factor = 1 - layer_idx / max(num_layers - 1, 1) + 1e-5
    return _rates([slope * factor for slope in _alibi(num_heads)], device)


def retnet(num_heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """RetNet (arXiv 2307.08621): e^{-s_h} = 1 - 2^(-5-h)."""
    _check(num_heads)
    return _rates([-math.log1p(-(2.0 ** (-5 - h))) for h in range(num_heads)], device)


def fla(
    num_heads: int, layer_idx: int, num_layers: int, *, device: torch.device | str | None = None
) -> Tensor:
    """The lightning attention of flash-linear-attention: s_h = (8/H)(1 - l/L) h, so head 0 never decays."""
    _check(num_heads, layer_idx, num_layers)
    return _rates([8 / num_heads * (1 - layer_idx / num_layers) * h for h in range(num_heads)], device)


def _alibi(num_heads: int) -> list[float]:
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    if power < num_heads:
        slopes += _alibi(2 * power)[::2][: num_heads - power]
    return slopes


def _rates(values: list[float], device: torch.device | str | None) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _check(num_heads: int, layer_idx: int = 0, num_layers: int = 1) -> None:
    for name, value in (("num_heads", num_heads), ("layer_idx", layer_idx), ("num_layers", num_layers)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"decay: expected {name} to be an int, got {value!r}")
    if num_heads < 1:
        raise ValueError(f"decay: expected num_heads >= 1, got {num_heads}")
    if not 0 <= layer_idx < num_layers:
        raise ValueError(
            f"decay: expected 0 <= layer_idx < num_layers = {num_layers}, got layer_idx = {layer_idx}"
        )
