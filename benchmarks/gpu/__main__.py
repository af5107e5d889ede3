"""Prove the library on this GPU machine: build, tests, checks, measurements beside the peers, one JSON.

    python -m benchmarks.gpu --out DIR                      # from the root of the repository
    python -m benchmarks.gpu --out DIR --only decode tests
    python -m benchmarks.gpu --out DIR --dry                # without a GPU: every part, on tiny shapes

Nothing need be installed but PyTorch, Triton and what the tests import. DIR/gpu.json is rewritten after every step, so a run
that is killed leaves what it has measured; DIR/logs holds what every command printed. Exits with 1 if a step has failed or
was cut short.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from . import process, wheels
from .record import Record
from .run import run_steps
from .show import summary
from .steps import STEPS, Context

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 520.0  # seconds


def main() -> int:
    options = _options()
    process.end_with_groups()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
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
        sys.argv[1:],
        {name: value for name, value in os.environ.items() if name.startswith(("LIGHTNING_ATTN_", "CUDA_"))},
        found,
    )
    context = Context(ROOT, out, temp, options.dry, _environment(temp, paths, options.dry), {})
    run_steps(STEPS, context, record, only=options.only, say=_say)
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
    parser.add_argument("--dry", action="store_true", help="without a GPU, on tiny shapes; measures nothing")
    names = [step.name for step in STEPS]
    parser.add_argument("--only", nargs="+", choices=names, default=[], metavar="STEP", help=", ".join(names))
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="seconds for everything (default: %(default)g)"
    )
    parser.add_argument("--wheels", type=Path, help="directory with peers as pure wheels, to be measured too")
    return parser.parse_args()


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
    env["HYPOTHESIS_STORAGE_DIRECTORY"] = str(temp / "hypothesis")
    env["MPLCONFIGDIR"] = str(temp / "matplotlib")
    for name in ("TRITON_INTERPRET", "LIGHTNING_ATTN_EMULATE_CUDA"):
        env.pop(name, None)
    if dry:
        env |= {"TRITON_INTERPRET": "1", "LIGHTNING_ATTN_EMULATE_CUDA": "1", "CUDA_VISIBLE_DEVICES": ""}
    return env


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
