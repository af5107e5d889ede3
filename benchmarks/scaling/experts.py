"""The exchanges of `ExpertParallel`: bytes by the plan of the library, every expert taken as often."""

from __future__ import annotations

import math

import numpy as np
import torch

from lightning_attn.distributed import expert_plan

from .layer import Layer, Part, Parts, doublings


def dispatch_combine(layer: Layer) -> Parts:
    """All-to-all over EP there and back, and before that, in the forward, the counts of all ranks."""
    m, size, node = layer.model, layer.model.dtype.itemsize, layer.rates.node
    ep, etp, plans = _plans(layer)
    bytes_, near = [], []
    for e, plan in enumerate(plans):
        bytes_.append(plan.dispatch_bytes(m.hidden, size) + plan.combine_bytes(m.hidden, size))
        here = [r for r in range(ep) if r != e and r * etp // node == e * etp // node]
        near.append(sum(plan.send[r] + plan.receive[r] for r in here) * m.hidden * size)
    counts = expert_plan.counts_bytes(plans[0].place, 1, m.experts)
    counts_near = int(counts * layer.rates.near(ep * etp))
    forward, backward = _products(layer, ep, etp, plans)
    rows, rows_near = np.array(bytes_, np.int64), np.array(near, np.int64)
    told, told_near = rows + counts, rows_near + counts_near
    messages = 2 * (ep - 1)
    # What is sent is as much: the combine returns what the dispatch brought.
    return (
        Part(told, told_near, told, messages + doublings(ep * etp), forward, forward),
        Part(rows, rows_near, rows, messages, backward, backward),
    )


def gather_scatter(layer: Layer) -> Parts:
    """All-gather and reduce-scatter over ETP."""
    m, size = layer.model, layer.model.dtype.itemsize
    ep, etp, plans = _plans(layer)
    found = [p.all_gather_bytes(m.hidden, size) + p.reduce_scatter_bytes(m.hidden, size) for p in plans]
    bytes_ = np.array(found, np.int64)
    near = bytes_ * layer.rates.near(etp)
    # What is sent is as much: the reduce-scatter returns what the all-gather brought.
    forward, backward = (
        Part(bytes_, near, bytes_, 2 * (etp - 1), time, time) for time in _products(layer, ep, etp, plans)
    )
    return forward, backward


def _plans(layer: Layer) -> tuple[int, int, list[expert_plan.Plan]]:
    """EP, ETP and the plans of the ranks (e, 0) of a group; those of the other t are alike. Rank (e, t) is e * ETP + t."""
    m = layer.model
    ep = math.gcd(m.experts, min(layer.ep, layer.ranks))
    etp = math.gcd(m.intermediate, min(layer.etp, layer.ranks // ep))
    base, more = divmod(layer.own * m.top_k, m.experts)
    table = torch.full((ep, etp, m.experts), base, dtype=torch.int64)
    table[..., :more] += 1
    return ep, etp, [expert_plan.plan(table, expert_plan.Place(ep, etp, e, 0)) for e in range(ep)]


def _products(layer: Layer, ep: int, etp: int, plans: list[expert_plan.Plan]) -> tuple[float, float]:
    """Seconds of the experts of the busiest rank: three products of each row, or reading their weights."""
    m = layer.model
    matrices = 3 * m.hidden * m.intermediate // etp
    flops = 2 * max(plan.rows for plan in plans) * matrices
    weights = m.experts // ep * matrices * m.dtype.itemsize
    return layer.rates.compute(flops, weights), layer.rates.compute(2 * flops, 2 * weights)
