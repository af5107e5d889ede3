"""The tiles that tuning has chosen, kept from one process to the next in one file of JSON:

    {"format": 1, "tiles": {"chunk 128 128 torch.bfloat16 sm_90 ...": {"block": 64, "key": 128, ...}, ...}}

It is a cache: what is wrong with it is a warning, never an error.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

FORMAT = 1


def path() -> Path:
    """$LIGHTNING_ATTN_CACHE_DIR/tiles.json, or that in lightning_attn in $XDG_CACHE_HOME or ~/.cache; RuntimeError for a
    user who has no home.
    """
    if directory := os.environ.get("LIGHTNING_ATTN_CACHE_DIR"):
        return Path(directory, "tiles.json")
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches, "lightning_attn", "tiles.json")


def read() -> dict[str, Any]:
    """The entries by their names, as they are in the file; none where there is no file, or not one of ours."""
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
        ours = isinstance(content, dict) and content.get("format") == FORMAT
        if not (ours and isinstance(content.get("tiles"), dict)):
            raise ValueError(f"{path()} is not of format {FORMAT}")
        return content["tiles"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RuntimeError) as error:  # nested too deep: a RuntimeError
        warnings.warn(f"no tuned tiles are read: {error}", RuntimeWarning, stacklevel=2)
        return {}


def store(name: str, tiles: dict[str, int]) -> None:
    """Adds an entry to what the file holds by now. Of two processes that store at the same moment one may lose its entry,
    and will tune again one day; no reader ever sees half a file.
    """
    content = {"format": FORMAT, "tiles": read() | {name: tiles}}
    try:
        _replace(path(), json.dumps(content, indent=1, sort_keys=True) + "\n")
    except (OSError, RuntimeError) as error:
        warnings.warn(f"tuned tiles are not kept: {error}", RuntimeWarning, stacklevel=2)


def _replace(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=target.parent, prefix=target.name, delete=False
    ) as file:
        try:
            file.write(text)
            file.close()
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise
