"""The steps of a run, in order, each with its commands and its share of the time.

The order is that of what is lost without it. The build and the smoke test come first, for nothing after them is worth
much if they fail; then, with the peers warmed up, the figures that the targets ask for, which only this machine can give, and which check what they
time; then the tests; last what says least: the sanitizer, slow, and the norm and the layer, which have no target.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .record import LEFT_OUT, OK, Outcome

GPU_BACKENDS = ("triton", "cuda")
MEASURED = ("forward", "backward", "decode", "experts", "expert_decode", "norm", "layer")
SANITIZER = "compute-sanitizer"


@dataclass(frozen=True)
class Context:
    """Where a run happens. `facts` is what the step "machine" has found, empty before; a `why_not` among them is why
    nothing can run here.
    """

    root: Path
    out: Path
    temp: Path
    dry: bool
    env: dict[str, str]
    facts: dict[str, Any]

    def log(self, part: str) -> Path:
        return self.out / "logs" / f"{part}.log"

    def json(self, part: str) -> Path:
        return self.out / "logs" / f"{part}.json"

    def module(self, name: str, part: str, *options: str) -> Command:
        """A program of this package that leaves its result as JSON and minds its time itself."""
        dry = ["--dry"] if self.dry else []
        head = [sys.executable, "-m", f"benchmarks.gpu.{name}", "--json", str(self.json(part))]
        return lambda limit: [*head, *options, "--limit", f"{max(1.0, limit - MARGIN):.0f}", *dry]


MARGIN = 3.0  # seconds, in which a program that minds its time writes what it has
Command = Callable[[float], list[str]]  # of the seconds that it is given
Parts = dict[str, Command | Outcome]  # what is to run, or why it need not


@dataclass(frozen=True)
class Step:
    """`most` and `least` are seconds: that it may take, and that the steps before it leave to it, as far as there is
    time at all. `excuse` finds in the output of a command that failed the reason why that says nothing of the library. A
    command whose JSON says that it is `unfinished` is run again, to go on behind what ended it.
    """

    name: str
    most: float
    least: float
    parts: Callable[[Context], Parts]
    always: bool = False
    excuse: Callable[[str], str | None] = lambda text: None


# ---- build -------------------------------------------------------------------------------------------------------


def _build(context: Context) -> Parts:
    reason = _stale(context)
    if reason is None:
        return {"build": Outcome(OK, "up to date")}
    if context.dry:
        return {"build": Outcome(LEFT_OUT, f"{reason}, and a dry run builds nothing")}
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--inplace",
        "--build-temp",
        str(context.temp / "build"),
    ]
    return {"build": lambda limit: command}


def _stale(context: Context) -> str | None:
    """Why the extension has to be built; None if it is as its sources are, and imports."""
    extension = context.root / "lightning_attn" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not extension.exists():
        return "the extension is not there"
    if not (extension.parent / "_cuda" / "step.cu").exists():
        return "the source of the CUDA kernel is not beside the extension"
    sources = [context.root / "setup.py", *filter(Path.is_file, (context.root / "csrc").rglob("*"))]
    if newer := [s.name for s in sources if s.stat().st_mtime > extension.stat().st_mtime]:
        return f"{newer[0]} is newer than the extension"
    check = [sys.executable, "-c", "import torch; from lightning_attn import _C"]
    try:
        done = subprocess.run(
            check, cwd=context.root, env=context.env, capture_output=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        return "the extension does not import within a minute"
    return "the extension does not import" if done.returncode else None


# ---- what runs once ----------------------------------------------------------------------------------------------


def _machine(context: Context) -> Parts:
    return {"machine": context.module("machine", "machine")}


def _smoke(context: Context) -> Parts:
    return {"smoke": context.module("smoke", "smoke")}


def _warm(context: Context) -> Parts:
    return {"warm": context.module("warm", "warm")}


def _tests(context: Context) -> Parts:
    return {"tests": context.module("suite", "tests", "--logs", str(context.out / "logs" / "tests"))}


def _check(context: Context) -> Parts:
    """Of every GPU backend that is there; of all, if that is not known."""
    reasons = {backend: context.facts.get("backends", {}).get(backend, "ok") for backend in GPU_BACKENDS}
    there = [backend for backend, reason in reasons.items() if reason == "ok"]
    if not there:
        return {
            "check": Outcome(LEFT_OUT, "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
        }
    options = [word for backend in there for word in ("--backend", backend)]
    return {
        "check": context.module("checks", "check", *options, "--logs", str(context.out / "logs" / "check"))
    }


def _sanitizer(context: Context) -> Parts:
    """First the program alone, which compiles its kernels."""
    program = [
        sys.executable,
        str(context.root / "tests" / "sanitize.py"),
        *(["--dry"] if context.dry else []),
    ]
    alone: Parts = {"alone": lambda limit: program}
    if context.dry:
        return alone | {SANITIZER: Outcome(LEFT_OUT, "a dry run has no GPU")}
    places = os.pathsep.join((context.env.get("PATH", os.defpath), "/usr/local/cuda/bin"))
    tool = shutil.which(SANITIZER, path=places)
    if tool is None:
        return alone | {SANITIZER: Outcome(LEFT_OUT, f"{SANITIZER} is not found")}
    check = [tool, "--error-exitcode", "9", "--print-limit", "20", "--tool"]
    # Of PyTorch's large blocks memcheck would see only the outer ends.
    apart = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    return alone | {
        "memcheck": lambda limit: [*apart, *check, "memcheck", *program],
        "racecheck": lambda limit: [*check, "racecheck", *program],
    }


def _device_refused(text: str) -> str | None:
    return f"{SANITIZER} does not work on this machine" if "Device not supported" in text else None


def _measured(name: str) -> Callable[[Context], Parts]:
    return lambda context: {name: context.module("measure", name, name)}


# A cold run on a fast machine is to end within nine minutes; the least of all leaves some of that.
STEPS = (
    Step("build", 150, 60, _build),
    Step("machine", 60, 15, _machine, always=True),  # the head of the file
    Step("smoke", 75, 30, _smoke),
    Step("warm", 100, 20, _warm),
    Step("forward", 110, 50, _measured("forward")),
    Step("backward", 100, 45, _measured("backward")),
    Step("decode", 70, 30, _measured("decode")),
    Step("experts", 60, 25, _measured("experts")),
    Step("expert_decode", 45, 20, _measured("expert_decode")),
    Step("tests", 200, 110, _tests),
    Step("check", 60, 25, _check),
    Step("sanitizer", 150, 40, _sanitizer, excuse=_device_refused),
    Step("norm", 30, 10, _measured("norm")),
    Step("layer", 45, 15, _measured("layer")),
)
