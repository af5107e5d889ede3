"""What the kernels are to reach, as data, and what a run makes of it.

The floor of a pass is the bytes of its inputs and outputs, each once, at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OURS = "lightning_attn"
# Other maths, and no kernels: to be faster is no merit.
YARDSTICKS = ("sdpa", "eager-256", "per-expert", "softmax-topk")
FLOOR, PEER, MICROSECONDS = "fraction of the floor", "times the best peer's speed", "microseconds"
TFLOPS = "TFLOP/s"
MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"

Shape = dict[str, int | str]
Row = dict[str, Any]

HEADS: Shape = {"K": 128, "V": 128}
FULL: Shape = {"B": 2, "T": 8192, "H": 64, **HEADS}
LONG: Shape = {"B": 1, "T": 131_072, "H": 8, **HEADS}
DECODE: Shape = {"B": 128, "T": 1, "H": 64, **HEADS, "state": "float32"}
ONE: Shape = {**DECODE, "B": 1}

# Of the mixture of experts in MiniMax-01.
EXPERTS: Shape = {"T": 1, "D": 6144, "F": 9216, "E": 32, "k": 2}
PREFILL: Shape = {**EXPERTS, "T": 8192}
TRAINING: Shape = {**EXPERTS, "T": 16_384}
GEMM: Shape = {"M": 16_384, "E": 32, "N": 18_432, "K": 6144}  # the first product of the prefill
ROUTE: Shape = {"T": 8192, "E": 32, "k": 2}


@dataclass(frozen=True)
class Target:
    """At least `value`; of microseconds at most."""

    case: str
    step: str
    op: str
    pass_: str
    shape: Shape
    metric: str
    value: float

    def reached(self, measured: float) -> bool:
        return measured <= self.value if self.metric == MICROSECONDS else measured >= self.value

    def __str__(self) -> str:
        unit = {MICROSECONDS: " us", PEER: "x", TFLOPS: " TFLOP/s"}.get(self.metric, "")
        return f"{'<=' if self.metric == MICROSECONDS else '>='} {self.value:g}{unit}"


def _targets() -> Iterator[Target]:
    forward = ("forward", "attention", "forward")
    backward = ("backward", "attention", "backward")
    for case, (step, op, pass_), shape, floor, peer in (
        ("forward, 128 heads, T = 8192", forward, FULL, 0.55, 2.0),
        ("forward, 8 heads, T = 131,072 (segments)", forward, LONG, 0.40, 2.0),
        ("backward alone, 128 heads, T = 8192", backward, FULL, 0.40, 2.5),
        (
            "decode, 128 sequences x 64 heads, float32 state",
            ("decode", "decode", "forward"),
            DECODE,
            0.85,
            1.2,
        ),
    ):
        yield Target(case, step, op, pass_, shape, FLOOR, floor)
        yield Target(case, step, op, pass_, shape, PEER, peer)
    case = "decode, 1 sequence x 64 heads, a call in a CUDA graph"
    yield Target(case, "decode", "decode", "graph", ONE, MICROSECONDS, 8.0)
    experts = ("experts", "moe_mlp")
    yield Target("experts, T = 8192, forward", *experts, "forward", PREFILL, TFLOPS, 600)
    case = "grouped product, 16,384 x 6144 x 18,432, 32 groups"
    yield Target(case, "experts", "grouped_gemm", "forward", GEMM, PEER, 1.05)
    yield Target("experts, T = 16,384, training", *experts, "forward+backward", TRAINING, TFLOPS, 500)
    for tokens in (1, 8, 32, 128):
        case = f"experts, decode, T = {tokens}, a call in a CUDA graph"
        yield Target(case, "expert_decode", "moe_mlp", "graph", EXPERTS | {"T": tokens}, FLOOR, 0.75)


TARGETS = tuple(_targets())
DTYPE = "bfloat16"


def judged(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target beside what the run of `document` (`gpu.json`) has measured; a dry run has measured nothing."""
    return [_judged(target, document) for target in TARGETS]


def rows_of(document: dict[str, Any], step: str) -> list[Row]:
    """The rows that a step of measurements has left."""
    return ((document.get("results") or {}).get(step) or {}).get("rows") or []


def is_main(row: Row) -> bool:
    """Of ours: the row of the backend that "auto" takes, where others were timed beside it."""
    return row["provider"] == OURS and row.get("asked", "auto") == "auto"


def fraction_of_floor(row: Row, document: dict[str, Any]) -> float | None:
    bandwidth = document.get("copy_bytes_per_s")
    if not bandwidth or not row["median_ms"]:
        return None
    return row["bytes"] / bandwidth / (row["median_ms"] / 1e3)


def tflops(row: Row) -> float | None:
    return row["flops"] / row["median_ms"] / 1e9 if row["median_ms"] else None


def best_peer(rows: list[Row]) -> Row | None:
    """The fastest kernels that compute the same, among the rows of one case."""
    peers = [r for r in rows if r["provider"] not in (OURS, *YARDSTICKS) and r["median_ms"]]
    return min(peers, key=lambda row: row["median_ms"], default=None)


def same_case(row: Row) -> tuple[Any, ...]:
    """What rows of different providers share when they can be compared."""
    return row["op"], row["pass"], row["dtype"], tuple(sorted(row["shape"].items()))


def _judged(target: Target, document: dict[str, Any]) -> dict[str, Any]:
    found = {
        "case": target.case,
        "metric": target.metric,
        "target": str(target),
        "measured": None,
        "median_ms": None,
        "against": None,
        "verdict": NOT_MEASURED,
    }
    rows = [
        row
        for row in rows_of(document, target.step)
        if (row["op"], row["pass"], row["dtype"], row["shape"])
        == (target.op, target.pass_, DTYPE, target.shape)
    ]
    ours = next((row for row in rows if is_main(row) and row["median_ms"]), None)
    if ours is None or document.get("dry", True):
        return found
    found["median_ms"] = ours["median_ms"]
    if target.metric == FLOOR:
        found["measured"] = fraction_of_floor(ours, document)
    elif target.metric == MICROSECONDS:
        found["measured"] = 1e3 * ours["median_ms"]
    elif target.metric == TFLOPS:
        found["measured"] = tflops(ours)
    elif peer := best_peer(rows):
        found |= {"measured": peer["median_ms"] / ours["median_ms"], "against": peer["provider"]}
    if found["measured"] is not None:
        found["verdict"] = MET if target.reached(found["measured"]) else MISSED
    return found
