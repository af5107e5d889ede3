"""The JSON of a run: what it holds, and how it is written so that a killed run leaves what was measured."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .targets import judged

OK, FAILED, TIMED_OUT, LEFT_OUT = "ok", "failed", "timed out", "left out"
WORST_FIRST = (FAILED, TIMED_OUT, OK, LEFT_OUT)  # left out beside ok: the rest has run


@dataclass(frozen=True)
class Outcome:
    """Of a step, or of one of its parts. `cut` says what the step left undone when its time was up."""

    outcome: str
    why: str | None = None
    seconds: float = 0.0
    allowed_s: float | None = None
    exit_code: int | None = None
    tail: str = ""
    log: str | None = None
    cut: list[str] = field(default_factory=list)
    parts: dict[str, Any] = field(default_factory=dict)

    @property
    def passes(self) -> bool:
        return self.outcome in (OK, LEFT_OUT)


def together(parts: dict[str, Outcome]) -> Outcome:
    """The outcome of a step of several parts: the worst; its reasons and its tail are those of the parts."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    worst = min(parts.values(), key=lambda part: WORST_FIRST.index(part.outcome))
    reasons = [f"{name}: {part.why}" for name, part in parts.items() if part.why]
    return Outcome(
        worst.outcome,
        "; ".join(reasons) or None,
        sum(part.seconds for part in parts.values()),
        worst.allowed_s,
        worst.exit_code,
        worst.tail,
        worst.log,
        [f"{name}: {what}" for name, part in parts.items() for what in part.cut],
        {name: asdict(part) | {"parts": {}} for name, part in parts.items()},
    )


@dataclass
class Record:
    """What `gpu.json` holds; rewritten after every step."""

    path: Path
    dry: bool
    limit_s: float
    command: list[str]
    wheels: dict[str, str] = field(default_factory=dict)  # peers beside the checkout, and why one is left out
    steps: dict[str, Outcome] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    complete: bool = False
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def document(self) -> dict[str, Any]:
        facts = self.results.get("machine") or {}
        document = {
            "dry": self.dry,
            **{
                name: facts.get(name)
                for name in ("versions", "device", "backends", "missing_peers", "commit")
            },
            "date": self.date,
            "command": self.command,
            "wheels": self.wheels,
            "limit_s": self.limit_s,
            "complete": self.complete,
            **self._limits(),
            "steps": {name: asdict(outcome) for name, outcome in self.steps.items()},
            "results": self.results,
        }
        return document | {"targets": judged(document)}

    def _limits(self) -> dict[str, Any]:
        """The best copy bandwidth and matrix rates of all measurements of the run: noise only makes them smaller."""
        found = [r["limits"] for r in self.results.values() if isinstance(r, dict) and r.get("limits")]
        best = functools.reduce(better_limits, found, {})
        return {
            "copy_bytes_per_s": best.get("copy_bytes_per_s"),
            "matrix_flops_per_s": best.get("gemm_flops_per_s", {}),
        }

    def write(self) -> None:
        replace_json(self.path, self.document())


def better_limits(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements of what the machine reaches, as `bench` has them in its JSON."""
    rates = dict(old.get("gemm_flops_per_s", {}))
    for dtype, rate in new["gemm_flops_per_s"].items():
        rates[dtype] = max(rate, rates.get(dtype, 0.0))
    copy = max(new["copy_bytes_per_s"], old.get("copy_bytes_per_s", 0.0))
    return {"gemm_flops_per_s": rates, "copy_bytes_per_s": copy}


def replace_json(path: Path, data: Any) -> None:
    """The file holds the old or the new data at any time, never half of it."""
    text = json.dumps(data, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text)
    os.replace(new, path)


def read_json(path: Path) -> Any:
    """None if there is no such file."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
