"""Prove the library on this GPU machine: build, tests, checks, measurements beside the peers, one JSON.

    python -m benchmarks.gpu --out DIR                      # from the root of the repository
    python -m benchmarks.gpu --out DIR --only decode tests
    python -m benchmarks.gpu --out DIR --dry                # without a GPU: every part, on tiny shapes

The library need not be installed; PyTorch, Triton, CuPy, what the build takes (a C++ compiler, setuptools, pybind11) and what
the command line and the tests import must be. DIR/gpu.json is rewritten after every step, so a run
that is killed leaves what it has measured; DIR/logs holds what every command printed. Exits with 1 if a step has failed or
was cut short.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from . import process, wheels
from .record import Record
from .run import run_steps
from .show import summary
from .steps import STEPS, Context

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 520.0  # seconds
DRY_PATIENCE = 4  # so many times as long may a step of a dry run take: interpreted, on a CPU with other work


def main() -> int:
    start = time.monotonic()
    options = _options()
    process.end_with_groups()
    out = options.out.resolve()
    temp = _temporary()
    paths = [str(ROOT)]
    found: dict[str, str] = {}
    if options.wheels:
        beside = temp / "wheels"
        found = wheels.unpack(options.wheels.resolve(), beside)
        paths.append(str(beside))
        for name, outcome in found.items():
            print(f"{name}: {outcome}")
    record = Record(
        out / "gpu.json",
        options.dry,
        options.limit,
        [word for word in sys.argv[1:] if os.sep not in word],
        found,
    )
    context = Context(ROOT, out, temp, options.dry, _environment(temp, paths, options.dry), {})
    patience = DRY_PATIENCE if options.dry else 1
    steps = [replace(step, most=patience * step.most) for step in STEPS]
    run_steps(steps, context, record, only=options.only, start=start, say=_say)
    for line in summary(record.document()):
        _say(line)
    return int(not all(outcome.passes for outcome in record.steps.values()))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for gpu.json and the logs")
    parser.add_argument(
        "--dry", action="store_true", help="without a GPU, on tiny shapes: tries every part but the build"
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--only", nargs="+", choices=names, default=[], metavar="STEP", help=", ".join(names))
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="seconds for everything (default: %(default)g)"
    )
    parser.add_argument("--wheels", type=Path, help="directory with peers as pure wheels, to be measured too")
    options = parser.parse_args()
    if not 0 < options.limit < math.inf:
        parser.error("--limit has to be a number of seconds")
    if options.wheels and not options.wheels.is_dir():
        parser.error(f"--wheels: {options.wheels} is not a directory")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return options


def _temporary() -> Path:
    """For caches and whatever else a run leaves; a second run finds them warm."""
    temp = Path(tempfile.gettempdir(), f"lightning_attn-gpu-{os.getuid()}")
    temp.mkdir(mode=0o700, exist_ok=True)
    return temp


def _environment(temp: Path, paths: list[str], dry: bool) -> dict[str, str]:
    """Of every command: the checkout is importable, caches lie outside of it, a GPU is used unless it is a dry run."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [env.get("PYTHONPATH")])])
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    for name in ("TRITON_CACHE", "LIGHTNING_ATTN_CACHE", "TORCHINDUCTOR_CACHE", "CUPY_CACHE"):
        env[f"{name}_DIR"] = str(temp / name.lower())
    env["TRITON_CACHE_AUTOTUNING"] = "1"  # what a peer has tried once, in whatever process
    env["HYPOTHESIS_STORAGE_DIRECTORY"] = str(temp / "hypothesis")
    env["MPLCONFIGDIR"] = str(temp / "matplotlib")
    # What they say is for other calls than these.
    for name in ("BACKEND", "CHECK", "AUTOTUNE", "EMULATE_CUDA"):
        env.pop(f"LIGHTNING_ATTN_{name}", None)
    env.pop("TRITON_INTERPRET", None)
    if dry:
        env |= {"TRITON_INTERPRET": "1", "LIGHTNING_ATTN_EMULATE_CUDA": "1", "CUDA_VISIBLE_DEVICES": ""}
    return env


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
