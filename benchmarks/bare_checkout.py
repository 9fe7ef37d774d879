"""Makes toka importable from a checkout that nobody installed, also where some of its packages are missing.

A machine that is lent for its GPU has PyTorch and Triton, but often no way to install anything. `prepare()` then builds a directory of
links in which toka lies as an installation would lay it out (compile/, kernels/ and warmup/ below it) and puts it first on sys.path
and, for processes started from here, on PYTHONPATH. Of the packages in STAND_INS, those that are missing are replaced in the same
directory by the small modules in stand_ins/, which serve the engine in this process and nothing else: no server, no GGUF file.

This module needs the standard library only.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
STAND_INS = ("gguf", "msgspec")
NOT_NEEDED = ("fastapi", "openai", "orjson", "pydra", "uvicorn", "zmq")
"""Packages of the server and of its clients, without which the engine, the kernels and their tests work."""

_ROOMS = ("compile", "kernels", "warmup")


def missing_packages() -> list[str]:
    """Packages that toka depends on and that can't be imported here, stand-ins aside."""
    return [name for name in (*STAND_INS, *NOT_NEEDED) if not _can_import(name) or _is_stand_in(name)]


def prepare() -> list[str]:
    """Make `import toka.kernels` work in this process and those that it starts; returns what stands in for a missing package.

    To be called before toka is first imported. Does nothing where toka is installed and nothing is missing.
    """
    stand_ins = [name for name in STAND_INS if not _can_import(name)]
    is_installed = _can_import("toka.warmup")
    if is_installed and not stand_ins:
        return [name for name in STAND_INS if _is_stand_in(name)]
    tree = Path(tempfile.mkdtemp(prefix="toka-tree-"))
    atexit.register(shutil.rmtree, tree, ignore_errors=True)
    for name in stand_ins:
        source = CHECKOUT / "benchmarks" / "stand_ins" / name
        _link(tree, source if source.is_dir() else source.with_suffix(".py"))
    if not is_installed:
        _link_toka(tree / "toka")
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
    importlib.invalidate_caches()
    return stand_ins


def _link_toka(package: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "toka"]:
        del sys.modules[name]  # found without its rooms, by the search for them
    package.mkdir()
    for entry in (CHECKOUT / "toka").iterdir():
        if entry.name != "__pycache__":
            _link(package, entry)
    for room in _ROOMS:
        _link(package, CHECKOUT / room)


def _link(directory: Path, source: Path) -> None:
    (directory / source.name).symlink_to(source)


def _can_import(name: str) -> bool:
    """Whether the module is there; its parents are imported, itself not."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:  # a parent is missing
        return False


def _is_stand_in(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None and "stand_ins" in Path(spec.origin).resolve().parts
