"""What the programs share that a step runs: their options."""

from __future__ import annotations

import argparse
from pathlib import Path


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Of `python -m benchmarks.gpu.<name>`: where its JSON goes, the seconds that it has, and whether it is a dry run."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.gpu.{name}", description=description)
    made.add_argument("--json", type=Path, required=True)
    made.add_argument(
        "--limit", type=float, default=600.0, help="seconds; what takes longer is ended from outside"
    )
    made.add_argument("--dry", action="store_true")
    return made
