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
        apart = into.with_name(f"{into.name}.new")
        shutil.rmtree(apart, ignore_errors=True)
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(apart)
            for data in apart.glob("*.data"):  # the rare wheel that keeps its modules there
                for folder in (data / "purelib", data / "platlib"):
                    if folder.is_dir():
                        shutil.copytree(folder, apart, dirs_exist_ok=True)
            shutil.copytree(apart, into, dirs_exist_ok=True)  # only what is whole
            found[wheel.name] = "ok"
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the run goes on
            found[wheel.name] = f"left out: {type(error).__name__}: {error}"
        shutil.rmtree(apart, ignore_errors=True)
    compileall.compile_dir(into, quiet=2, workers=0)  # once here, not in every process
    return found
