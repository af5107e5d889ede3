"""Peers that lie beside as wheels, made importable without an installer."""

from __future__ import annotations

import compileall
import shutil
import zipfile
from pathlib import Path


def unpack(directory: Path, into: Path) -> dict[str, str]:
    """Every pure wheel of `directory` unpacked in `into`, which is then a directory for PYTHONPATH.

    By file name, "ok" or why a wheel was left out. Those with machine code are: whether they fit is for pip to say.
    """
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    found: dict[str, str] = {}
    for wheel in sorted(directory.glob("*.whl")):
        if not wheel.stem.endswith("-none-any"):
            found[wheel.name] = "left out: it is not a pure wheel; install it"
            continue
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(into)
            found[wheel.name] = "ok"
        except (OSError, zipfile.BadZipFile) as error:
            found[wheel.name] = f"left out: {error}"
    for data in into.glob("*.data"):  # the rare wheel that keeps its modules there
        for folder in (data / "purelib", data / "platlib"):
            if folder.is_dir():
                shutil.copytree(folder, into, dirs_exist_ok=True)
    compileall.compile_dir(into, quiet=2, workers=0)  # once here, not in every process
    return found
