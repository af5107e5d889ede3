"""Bytes and compute of every operation on R ranks. The bytes are those of `lightning_attn.distributed.*_plan`, which its tests
compare with what was sent; those of a head all-to-all, which the library has not, stand here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lightning_attn.cli.case import BACKWARD, FORWARD, TRAIN
from lightning_attn.cli.cases import Attention
from lightning_attn.distributed.lasp_plan import even_cuts, lasp_bytes

from . import experts, ring
from .layer import Impossible, Layer, Part, Parts, doublings, even
from .rates import Rates

ACC = 4  # bytes of a sum: states, gradients on their way


@dataclass(frozen=True)
class Row:
    """An operation at one pass: bytes, seconds. `impossible`: why this many ranks cannot do it, all else being None then."""

    operation: str
    ranks: int
    tokens: int
    pass_: str
    received_max: int | None = None
    received_mean: float | None = None
    sent_max: int | None = None
    messages: int | None = None
    compute: float | None = None
    communication: float | None = None
    exposed: float | None = None
    time: float | None = None  # compute + exposed
    impossible: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {name.rstrip("_"): value for name, value in asdict(self).items()}


def rows(layer: Layer) -> Iterator[Row]:
    """Every operation: the forward alone, and with the backward."""
    for name, parts in OPERATIONS.items():
        where = name, layer.ranks, layer.tokens
        try:
            forward, backward = parts(layer)
        except Impossible as reason:
            for pass_ in (FORWARD, TRAIN):
                yield Row(*where, pass_, impossible=str(reason))
            continue
        yield _row(where, FORWARD, layer.rates, [forward])
        yield _row(where, TRAIN, layer.rates, [forward, backward])


def _row(where: tuple[str, int, int], pass_: str, rates: Rates, parts: list[Part]) -> Row:
    received, sent = sum(p.received for p in parts), sum(p.sent for p in parts)
    seconds = [rates.transfer(p.received, p.near, p.messages) for p in parts]
    exposed = sum(max(t - p.hides, 0.0) for t, p in zip(seconds, parts, strict=True))
    compute = sum(p.compute for p in parts)
    return Row(
        *where,
        pass_,
        received_max=int(np.max(received)),
        received_mean=float(np.mean(received)),
        sent_max=int(np.max(sent)),
        messages=sum(p.messages for p in parts),
        compute=compute,
        communication=sum(seconds),
        exposed=exposed,
        time=compute + exposed,
    )


# ---- lightning attention -------------------------------------------------------------------------------------------


def lasp(layer: Layer) -> Parts:
    """The state that a rank leaves is computed before the all-gather, what entering states add after it."""
    m, L, size = layer.model, layer.own, layer.model.dtype.itemsize
    bytes_ = lasp_bytes(layer.ranks, m.heads, m.head_dim, m.head_dim, ACC)
    crossing = min(L, layer.document or L) * (layer.ranks > 1)  # tokens of the document that crosses a cut
    rows_, product = crossing * m.heads * m.head_dim * size, 2 * crossing * m.heads * m.head_dim**2
    state = layer.rates.compute(product, 2 * rows_)
    history = layer.rates.compute(product, 3 * rows_)  # reads a row and the output, writes the output
    forward, backward = _attention(layer)
    steps = doublings(layer.ranks)
    return (
        even(layer, bytes_, steps, forward + state + history, forward),
        even(layer, bytes_, steps, backward + state + 2 * history, backward),
    )


def lightning_heads(layer: Layer) -> Parts:
    """q, k, v to the ranks of their heads and o back; in the backward do, and dq, dk, dv back."""
    m = layer.model
    _heads_divide(layer)
    rows_ = (layer.tokens - layer.own) * (m.heads // layer.ranks)  # of other ranks' tokens in one's own heads
    bytes_ = 4 * rows_ * m.head_dim * m.dtype.itemsize
    forward, backward = (even(layer, bytes_, 2 * (layer.ranks - 1), t, t) for t in _attention(layer))
    return forward, backward


def _attention(layer: Layer) -> tuple[float, float]:
    """Seconds of lightning attention on a rank's tokens."""
    m = layer.model
    case = Attention(m.dtype, T=layer.own, H=m.heads, K=m.head_dim, V=m.head_dim)
    forward, backward = (
        layer.rates.compute(case.part_flops(part), case.part_bytes(part)) for part in (FORWARD, BACKWARD)
    )
    return forward, backward


# ---- softmax attention ---------------------------------------------------------------------------------------------


def softmax(zigzag: bool, method: str) -> Callable[[Layer], Parts]:
    """`ring_attention` on even cuts."""

    def parts(layer: Layer) -> Parts:
        m, size = layer.model, layer.model.dtype.itemsize
        pieces = layer.ranks * (2 if zigzag else 1)
        if layer.tokens < pieces:
            raise Impossible(f"fewer tokens than {pieces} pieces")
        cuts, offsets = even_cuts(layer.tokens, pieces), layer.offsets
        found = ring.rows(cuts, offsets, zigzag=zigzag, method=method, node=layer.rates.node)
        width = 2 * m.kv_heads * m.head_dim
        forward, backward = _pairs(layer, int(ring.pairs(cuts, offsets, zigzag=zigzag).max()), m.heads)
        received, whole = found.bytes(width, size, ACC)
        kv, grads = width * size, width * ACC
        home = int(found.gradients.any())  # one message more: the gradients go one step behind
        return (
            Part(received, found.near * kv, found.sent * kv, found.messages, forward, forward),
            Part(
                whole,
                found.near * kv + found.gradients_near * grads,
                found.sent * kv + found.gradients_sent * grads,
                found.messages + home if method == "ring" else 2 * found.messages,
                backward,
                backward,
            ),
        )

    return parts


def softmax_heads(layer: Layer) -> Parts:
    """As `lightning_heads`; beyond kv_heads ranks, several have the same head of keys and values."""
    m, R = layer.model, layer.ranks
    _heads_divide(layer)
    heads = 2 * (m.heads // R) + 2 * max(m.kv_heads // R, 1)
    bytes_ = (layer.tokens - layer.own) * heads * m.head_dim * m.dtype.itemsize
    total = int(ring.pairs([0, layer.tokens], layer.offsets, zigzag=False)[0])
    times = _pairs(layer, total, m.heads // R)
    forward, backward = (even(layer, bytes_, 2 * (R - 1), t, t) for t in times)
    return forward, backward


def _pairs(layer: Layer, pairs: int, heads: int) -> tuple[float, float]:
    """Seconds: two products of a row for each pair of query and key, in the backward five."""
    forward = 2 * 2 * pairs * heads * layer.model.head_dim / layer.rates.flops
    return forward, forward * 5 / 2


OPERATIONS: dict[str, Callable[[Layer], Parts]] = {
    "lightning, LASP+": lasp,
    "lightning, head all-to-all": lightning_heads,
    "softmax, ring, contiguous": softmax(False, "ring"),
    "softmax, ring, zigzag": softmax(True, "ring"),
    "softmax, all-gather, contiguous": softmax(False, "all_gather"),
    "softmax, all-gather, zigzag": softmax(True, "all_gather"),
    "softmax, head all-to-all": softmax_heads,
    "experts, EP dispatch + combine": experts.dispatch_combine,
    "experts, ETP all-gather + reduce-scatter": experts.gather_scatter,
}


def _heads_divide(layer: Layer) -> None:
    if layer.model.heads % layer.ranks:
        raise Impossible(f"{layer.model.heads} heads")
